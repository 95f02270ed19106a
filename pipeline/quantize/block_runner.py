"""Runs a model on calibration tokens one decoder block at a time, with one block's weights in memory.

Blocks are called just as the model itself calls them: their places in the model are taken by stand-ins that note the
arguments, so there is no code for any one architecture.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.kernels.linear import QExperts

from ..errors import CheckpointError, NumericsError
from ..methods.hessian import Hessian, bfloat16_products
from ..models.modules import dense_layer, replace_layers, set_tensor
from ..models.structure import TensorNames, decoder, skeleton
from ..storage.checkpoint import Checkpoint
from ..system.threads import pool
from .plan import PlannedTensor

_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # that go through a block at a time: what caches, and what memory likes
_MOST_AT_A_TIME = 4  # batches: one for each core where there are few, but their activations are all in memory
_WIDE = 4096  # inputs from which on a Hessian is best summed by all threads together
_MOST_DROPPED = 0.01  # of a layer's tokens may have infinite activations


@dataclass(frozen=True)
class _Call:
    """What a block is called with, besides the hidden states."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


class _Passed(Tensor):
    """A stand-in's output: some models take a block's output as it is, others take [0] of it, and this serves both.

    Raises:
        TypeError: more than that is wanted, which only the block could give.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        if not isinstance(index, int):
            return plain[index]
        if index:
            raise TypeError(f"output {index} of a block is wanted")
        return plain

    def __iter__(self) -> Iterator[Tensor]:
        raise TypeError("several outputs of a block are wanted")


class _Done(Exception):
    """What was wanted of a forward is there: what comes after need not run."""


class _StandIn(nn.Module):
    """In the place of a block: passes its input on."""

    def __init__(self, walk: "Walk", number: int, block: nn.Module):
        super().__init__()
        plain = {name: value for name, value in vars(block).items() if not name.startswith("_")}
        vars(self).update(plain)  # a model may ask its blocks what they are, as for the mask that is theirs
        self._note = lambda hidden, call: walk._passed(number, hidden, call)

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return self._note(hidden_states, _Call(arguments, options)).as_subclass(_Passed)


class Walk:
    """The blocks of a checkpoint's model, and what each is called with for the token ids [windows, context].

    `embed` comes first; then `enter`, any of the block's methods, and `leave`, for block after block.
    """

    def __init__(
        self, checkpoint: Checkpoint, outside: Iterable[PlannedTensor], ids: Tensor, dtype: torch.dtype, device: str
    ):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        self.model = skeleton(checkpoint, dtype)
        self.names = TensorNames(self.model)
        blocks = self.model.get_submodule(decoder(self.model))
        assert isinstance(blocks, nn.ModuleList)
        self._blocks, self._real = blocks, list(blocks)
        for module in self.model.modules():
            module._buffers.update({name: b.to(self.device) for name, b in module._buffers.items() if b is not None})
        for number, block in enumerate(self._real):
            blocks[number] = _StandIn(self, number, block)
        self._outside = list(outside)
        self.batches = ids.split(max(1, _BATCH_TOKENS.get(self.device.type, _BATCH_TOKENS["cpu"]) // ids.shape[1]))
        self._workers = min(torch.get_num_threads(), _MOST_AT_A_TIME) if self.device.type == "cpu" else 1
        self._calls: list[list[_Call]] = []
        self._first: Tensor | None = None  # block 0's inputs, as last seen
        self._ending: Tensor | None = None  # the last block's outputs, to be passed on

    def _passed(self, number: int, hidden: Tensor, call: _Call) -> Tensor:
        last = number == len(self._blocks) - 1
        if self._ending is not None:
            return self._ending if last else hidden
        if number == 0:
            self._first, self._version = hidden, hidden._version
        if (
            number != len(self._calls[-1])
            or self._first is None
            or (hidden.data_ptr(), hidden.shape, hidden._version)
            != (self._first.data_ptr(), self._first.shape, self._version)
        ):
            raise TypeError(f"block {number} reads something else than what the block before it puts out")
        seen = self._calls[0][number] if len(self._calls) > 1 else None
        self._calls[-1].append(_shared(call, seen))
        if last:
            raise _Done
        return hidden

    @contextlib.contextmanager
    def _ends(self) -> Iterator[None]:
        """What lies outside the blocks, embeddings and head, is in memory for as long as this lasts."""
        held = []
        for entry in self._outside:
            if self.names.known(entry.target.parameter):
                set_tensor(self.model, entry.target.parameter, self.checkpoint.read(entry.info.name), self.device)
                held.append(entry.target.parameter)
        self.model.tie_weights()
        try:
            yield
        finally:
            for name in {*held, *dict(self.model.all_tied_weights_keys)}:
                path, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(path)
                if (parameter := module._parameters.get(leaf)) is not None:
                    module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    @torch.no_grad()
    def embed(self) -> Iterator[Tensor]:
        """The inputs of block 0, [windows, context, hidden] batch by batch; notes what every block is called with."""
        self._calls.clear()
        with self._ends():
            for batch in self.batches:
                self._calls.append([])
                self._trace(batch)
                assert self._first is not None
                yield self._first

    def _trace(self, batch: Tensor) -> None:
        """Note what the blocks are called with for a batch of token ids.

        Raises:
            CheckpointError: the model does more between its blocks than to hand on what one puts out to the next.
        """
        reason = "not all of them are called"
        try:
            self.model(input_ids=batch.to(self.device), use_cache=False)
        except _Done:
            shape = tuple(self._first.shape) if self._first is not None else ()
            if shape[:-1] == batch.shape:
                return
            reason = f"they read tensors of shape {list(shape)} for {list(batch.shape)} tokens"
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # what a stand-in is not good enough for
            reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{type(self.model).__name__} is no plain chain of blocks ({reason}), so what each reads cannot be told; "
            "use a method that needs no calibration"
        )

    @torch.no_grad()
    def logits(self, outputs: Tensor) -> Tensor:
        """What the model makes of the last block's outputs for the first windows: [windows, context, vocabulary]."""
        self._ending = outputs.to(self.device)
        try:
            with self._ends():
                ids = self.batches[0][: len(outputs)].to(self.device)
                return self.model(input_ids=ids, use_cache=False).logits.cpu()
        finally:
            self._ending = None

    def enter(self, number: int, weights: Iterable[tuple[PlannedTensor, Tensor]]) -> None:
        """Give a block its weights, and the place that is its own."""
        self._blocks[number] = block = self._real[number]
        experts = {}
        for entry, tensor in weights:
            if entry.target.expert:
                experts[entry.target] = dense_layer(tensor.to(self.device, self.dtype))
            elif self.names.known(entry.target.parameter):
                set_tensor(self.model, entry.target.parameter, tensor, self.device)
        replace_layers(self.model, self.names, experts.items())
        self._block, self._number = block, number

    def leave(self) -> None:
        self._blocks[self._number] = self._real[self._number] = _StandIn(self, self._number, self._block)
        del self._block

    @torch.no_grad()
    def forward(self, batch: int, inputs: Tensor) -> Tensor:
        """The block's outputs for its inputs [windows, context, hidden] of one batch."""
        call = self._calls[batch][self._number]
        found = self._block(inputs.to(self.device), *call.arguments, **call.options)
        return found[0] if isinstance(found, tuple | list) else found

    def layer(self, entry: PlannedTensor) -> nn.Module:
        """The module that multiplies by an entry's weight."""
        if entry.target.expert is None:
            return self.model.get_submodule(entry.target.parameter.removesuffix(".weight"))
        experts = self.model.get_submodule(entry.target.parameter)
        assert isinstance(experts, QExperts)
        expert, piece, _ = entry.target.expert
        return experts.experts[expert][piece]  # type: ignore[index]

    def set_weight(self, entry: PlannedTensor, weight: Tensor) -> None:
        """Replace a layer's weight by `weight` [out, in]."""
        stored = weight.t().contiguous() if entry.kind == "conv1d" else weight
        self.layer(entry).weight = nn.Parameter(stored.to(self.device, self.dtype), requires_grad=False)

    def sharing(self, entries: list[PlannedTensor], inputs: Tensor) -> list[list[PlannedTensor]]:
        """The entries that read the very same inputs, together, in the order in which the block calls them.

        Args:
            inputs: of one batch. Experts that none of its tokens reach count as called last.
        """
        seen: list[tuple[Any, Tensor | None, list[PlannedTensor]]] = []

        def note(entry: PlannedTensor, x: Tensor | None) -> None:
            expert = entry.target.expert
            key = (entry.target.parameter, expert[0]) if expert else None
            for known, tensor, group in seen:
                if known == key if key else (known is None and tensor is x):
                    group.append(entry) if entry not in group else None
                    return
            seen.append((key, x, [entry]))

        with self._hooked(entries, note):
            self.forward(0, inputs)
        called = {id(entry) for _, _, group in seen for entry in group}
        for entry in entries:
            if id(entry) not in called:
                note(entry, torch.empty(0))
        return [group for _, _, group in seen]

    def hessians(self, groups: list[list[PlannedTensor]], inputs: Iterable[Tensor]) -> list[Hessian]:
        """Of each group's inputs, over all batches.

        Raises:
            NumericsError: more than 1% of a layer's inputs are NaN or infinite.
        """
        found = {id(group[0]): Hessian(group[0].shape[1], self.device) for group in groups}
        seen = threading.local()

        leaders = [group[0] for group in groups]

        def note(entry: PlannedTensor, x: Tensor) -> None:
            seen.inputs.append((id(entry), x))
            if entry is leaders[-1] and not entry.target.expert:
                raise _Done

        def collect(batch: tuple[int, Tensor]) -> list[tuple[int, Tensor]]:
            seen.inputs = []
            with contextlib.suppress(_Done):
                self.forward(*batch)
            return seen.inputs

        with self._hooked(leaders, note), pool(self._workers) as run:
            for wave in self._waves(inputs):
                collected = [item for batch in run(collect, wave) for item in batch]

                def add(entry: PlannedTensor, given: list[tuple[int, Tensor]] = collected) -> None:
                    for layer, x in given:
                        if layer == id(entry):
                            found[layer].add(x)

                with bfloat16_products(x.dtype for _, x in collected):
                    list(run(add, [entry for entry in leaders if entry.shape[1] <= _WIDE]))
                    for entry in leaders:
                        if entry.shape[1] > _WIDE:
                            add(entry)
        for group in groups:
            hessian = found[id(group[0])]
            if hessian.dropped > _MOST_DROPPED * (hessian.dropped + hessian.tokens):
                raise NumericsError(
                    f"{group[0].module}: {hessian.dropped} of {hessian.dropped + hessian.tokens} calibration tokens "
                    "gave it NaN or infinite inputs; use a float32 or bfloat16 checkpoint, or other calibration text"
                )
        return [found[id(group[0])] for group in groups]

    def outputs(self, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
        """The block's outputs, batch by batch."""
        ahead: Iterator[Tensor] = iter(())
        with pool(self._workers) as run:
            for wave in self._waves(inputs):
                following = run(lambda batch: self.forward(*batch), wave)
                yield from ahead  # while the next ones are made
                ahead = following
            yield from ahead

    def _waves(self, inputs: Iterable[Tensor]) -> Iterator[list[tuple[int, Tensor]]]:
        """Numbered batches, as many as are worked on at a time."""
        batches = enumerate(inputs)
        while wave := list(islice(batches, self._workers)):
            yield wave

    @contextlib.contextmanager
    def _hooked(self, entries: list[PlannedTensor], note: Any) -> Iterator[None]:
        """note(entry, inputs) at each call of an entry's layer."""
        handles = [
            self.layer(entry).register_forward_pre_hook(lambda _, inputs, entry=entry: note(entry, inputs[0]))
            for entry in entries
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _shared(call: _Call, seen: _Call | None) -> _Call:
    """The call, its tensors replaced by equal ones of an earlier call: masks and positions are the same for all."""

    def same(value: Any, known: Any) -> Any:
        if isinstance(value, Tensor):
            equal = isinstance(known, Tensor) and value.shape == known.shape and torch.equal(value, known)
            return known if equal else value
        if isinstance(value, tuple) and isinstance(known, tuple) and len(value) == len(known):
            return tuple(map(same, value, known))
        return value

    if seen is None:
        return call
    options = {name: same(value, seen.options.get(name)) for name, value in call.options.items()}
    return _Call(same(call.arguments, seen.arguments), options)
