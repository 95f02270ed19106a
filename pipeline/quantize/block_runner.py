"""Runs a model on calibration tokens one decoder block at a time, with one block's weights in memory.

The model itself says what its blocks are called with: stand-ins take the blocks' places and note the arguments. So
there is no code for any one architecture.
"""

import contextlib
import copy
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitpress.kernels.activations.base import straight_through
from bitpress.kernels.linear import QExperts
from bitpress.kernels.products import Products
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..errors import CheckpointError, NumericsError
from ..methods.base import Folding, LayerGroup, Method, Statistic
from ..methods.hessian import bfloat16_products
from ..models.modules import assembled_tensors, converted_tensors, dense_layer, replace_layers, set_tensor
from ..models.structure import TensorNames, decoder, replace_module, skeleton, tied, towers, weight_kind
from ..storage.checkpoint import Checkpoint
from ..storage.finite import check_finite
from ..system.progress import OnStep
from ..system.threads import divided, pool
from .foldings import probe, rows_of_inputs, segments
from .plan import PlannedTensor, Unit

Stored = Tensor | QTensor  # as the files hold it, or a quantized layer's weight

PROBE_TOKENS = 64
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # that go through a block at a time: what caches, and what memory likes
_MOST_AT_A_TIME = 4  # batches: one for each core where there are few, but their activations are all in memory
_WIDE = 4096  # inputs from which on a statistic is best summed by all threads together
_HELD_OUT = 8  # one batch of so many judges what is learned from the others
_LEAST_WEIGHT = 1e-8  # of a token, by gradient: where all are 0, as before a layer of zeros, all tokens count alike
_MOST_DROPPED = 0.01  # of a layer's tokens may have infinite activations


@dataclass(frozen=True)
class _Call:
    """What a block is called with, besides the hidden states."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


class _Passed(Tensor):
    """A stand-in's output. Some models take a block's output as it is, others take [0] of it; this serves both.

    Raises:
        TypeError: the model takes more than that, which only the block could give.
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
    """Ends a forward once everything that was wanted of it is known."""


class _StandIn(nn.Module):
    """Takes the place of a block and passes its input on."""

    def __init__(self, runner: "BlockRunner", number: int, block: nn.Module):
        super().__init__()
        plain = {name: value for name, value in vars(block).items() if not name.startswith("_")}
        vars(self).update(plain)  # a model may ask a block for its attributes, such as the kind of mask that it reads
        self._note = lambda hidden, call: runner._passed(number, hidden, call)

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return self._note(hidden_states, _Call(arguments, options)).as_subclass(_Passed)


class _RoundedInputs(nn.Module):
    """Stands for a layer whose scheme rounds inputs, and multiplies as the reference kernel does: in float32.

    A gradient passes the rounding as if there were none.
    """

    def __init__(self, qtensor: QTensor, transposed: bool, bias: Tensor | None):
        """Dequantize the weight.

        Args:
            transposed: the weight is held as [in, out], like that of the layer that this stands for.
        """
        super().__init__()
        assert qtensor.scheme.activations
        weight = qtensor.dequantize(torch.float32)
        self.weight = nn.Parameter(weight.t() if transposed else weight, requires_grad=False)
        self.bias, self.transposed, self.activations = bias, transposed, qtensor.scheme.activations
        for name, tensor in qtensor.extra.items():
            self.register_buffer(name, tensor)
        self.stored = tuple(qtensor.extra)

    def forward(self, x: Tensor) -> Tensor:
        rounded = straight_through(self.activations, x, {name: self.get_buffer(name) for name in self.stored})
        weight = self.weight.to(torch.float32)
        y = nn.functional.linear(rounded, weight.t() if self.transposed else weight)
        return (y if self.bias is None else y + self.bias.to(torch.float32)).to(x.dtype)


class BlockRunner:
    """The blocks of a checkpoint's model, and what each is called with for the token ids [windows, context].

    `embed` comes first; then `load_block`, any of the block's methods, and `unload_block`, for block after block.
    path: of the list of blocks in the model.
    probe: the first ids [1, tokens], which go through the blocks by themselves, too, as a batch after all others. They
        are multiplied in the order in which a reloaded model multiplies them, so that it can be compared to the bit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        outside: Iterable[PlannedTensor],
        ids: Tensor,
        dtype: torch.dtype,
        device: str,
        read: Callable[[PlannedTensor], Stored] | None = None,
        least_batches: int = 1,
        more_devices: Sequence[str] = (),
    ):
        """Build the model without its weights.

        Args:
            outside: the tensors outside the blocks. ids: int64 [windows, context].
            dtype: of weights and activations. device: where blocks run.
            read: gives a tensor as the model is to have it, where no caller gives it; by default as the files hold it.
            least_batches: into which the windows are divided, as far as there are as many windows.
            more_devices: like `device`, among which batches, and the statistics of layers, are divided.
        """
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        self.devices = [self.device, *map(torch.device, more_devices)]
        self.model = skeleton(checkpoint, dtype)
        self.names = TensorNames(self.model)
        self.path = decoder(self.model)
        blocks = self.model.get_submodule(self.path)
        assert isinstance(blocks, nn.ModuleList)
        self._blocks, self._real = blocks, list(blocks)
        for module in self.model.modules():
            module._buffers.update({name: b.to(self.device) for name, b in module._buffers.items() if b is not None})
        for number, block in enumerate(self._real):
            blocks[number] = _StandIn(self, number, block)
        unread = tuple(f"{tower}." for tower in towers(self.model))
        for tower in unread:  # no memory, but on the device: some models go by that of their first parameter
            for module in self.model.get_submodule(tower[:-1]).modules():
                for leaf, parameter in module._parameters.items():
                    if parameter is not None:
                        nothing = torch.zeros((), dtype=parameter.dtype, device=self.device).expand(parameter.shape)
                        module._parameters[leaf] = nn.Parameter(nothing, requires_grad=False)
        self._outside = [
            planned
            for planned in outside
            if self.names.known(planned.target.parameter) and not planned.target.parameter.startswith(unread)
        ]
        self._read = read or (lambda planned: checkpoint.read(planned.info.name))
        windows = BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"]) // ids.shape[1]
        self.batches = ids.split(max(1, min(windows, len(ids) // least_batches)))
        threads = min(torch.get_num_threads(), _MOST_AT_A_TIME) if self.device.type == "cpu" else 1
        self._workers = max(threads, len(self.devices))
        self.probe, self.probe_inputs = ids[:1, :PROBE_TOKENS], torch.empty(0)
        self._calls: list[dict[int, _Call]] = []  # of each batch, and of the probe: block -> what it is called with
        self._first: Tensor | None = None  # block 0's inputs, as last seen
        self._outputs: Tensor | None = None  # of the last block, whatever it reads

    def _passed(self, number: int, hidden: Tensor, call: _Call) -> Tensor:
        """Note a stand-in's call; returns the stand-in's output."""
        if self._outputs is not None:
            return self._outputs if number == max(self._calls[0]) else hidden
        calls = self._calls[-1]
        if not calls:
            self._first, self._version = hidden, hidden._version
        if (
            any(number <= earlier for earlier in calls)
            or self._first is None
            or (hidden.data_ptr(), hidden.shape, hidden._version)
            != (self._first.data_ptr(), self._first.shape, self._version)
        ):
            raise TypeError(f"block {number} reads something else than what the block before it puts out")
        calls[number] = _shared(call, self._calls[0].get(number) if len(self._calls) > 1 else None)
        if len(calls) == len(self._blocks) or (calls is not self._calls[0] and len(calls) == len(self._calls[0])):
            raise _Done
        return hidden

    def reached(self, number: int) -> bool:
        """Whether text alone goes through a block; cross-attention to images does nothing without an image."""
        return number in self._calls[0]

    @contextlib.contextmanager
    def outside_in_memory(self) -> Iterator[None]:
        """The model has its embeddings, its last norm and its head for as long as this lasts, and no tower."""
        held, rounding = [], []
        places = {planned.info.name: planned for planned in self._outside}
        targets = {name: planned.target for name, planned in places.items()}

        def read(planned: PlannedTensor) -> Tensor:
            stored = self._read(planned)
            if isinstance(stored, QTensor) and stored.scheme.activations:
                rounding.append((planned, stored))
            return self._as_stored(planned, stored)

        converted = converted_tensors(self.names, targets, lambda name: read(places[name]))
        plain = ((planned.target, read(planned)) for planned in self._outside if planned.target.converter is None)
        for target, tensor in chain(plain, converted):
            set_tensor(self.model, target, tensor, self.device)
            held.append(target.parameter)
        try:
            self.model.tie_weights()
        except ValueError as error:
            raise CheckpointError(
                f"{type(self.model).__name__} ties weights of some of its blocks to those of others, so they cannot "
                "be learned one after the other; use a method that needs no calibration"
            ) from error
        heads = {}
        for planned, qtensor in rounding:
            own = planned.target.parameter
            copies = [copy for copy, origin in tied(self.model).items() if origin == own]
            for name in copies if planned.kind == "embedding" else [own]:
                path = name.removesuffix(".weight")
                heads[path] = self.model.get_submodule(path)
                self._place(path, qtensor, planned)
        try:
            yield
        finally:
            for path, module in heads.items():
                replace_module(self.model, path, module)
            for name in {*held, *dict(self.model.all_tied_weights_keys)}:
                path, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(path)
                if (parameter := module._parameters.get(leaf)) is not None:
                    module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    @torch.no_grad()
    def embed(self) -> Iterator[Tensor]:
        """The inputs of block 0, [windows, context, hidden] batch by batch; notes what every block is called with.

        Once all were taken, `probe_inputs` has those of the probe.

        Raises:
            CheckpointError: the model does more between its blocks than to hand on what one puts out to the next.
        """
        self._calls.clear()
        self._first = None
        with self.outside_in_memory():
            for batch in (*self.batches, self.probe):
                self._calls.append({})
                reason: str | None = None
                try:
                    with contextlib.suppress(_Done):
                        self.model(input_ids=batch.to(self.device), use_cache=False)
                    if self._first is None or self._calls[-1].keys() != self._calls[0].keys():
                        reason = "not all of them are called"
                    elif self._first.shape[:-1] != batch.shape:
                        read = list(self._first.shape)
                        reason = f"they read tensors of shape {read} for {list(batch.shape)} tokens"
                except (AttributeError, LookupError, TypeError, ValueError) as error:  # a stand-in was not enough
                    reason = str(error).partition("\n")[0]
                if reason is not None:
                    raise CheckpointError(
                        f"{type(self.model).__name__} is no plain chain of blocks ({reason}), so what each reads "
                        "cannot be told; use a method that needs no calibration"
                    )
                assert self._first is not None
                if batch is not self.probe:
                    yield self._first
                else:
                    self.probe_inputs = self._first

    def head(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """What the model makes of the last block's outputs for ids [windows, context]: logits, with a gradient.

        It goes as long as the rest is outside_in_memory.
        """
        self._outputs = outputs.to(self.device)
        try:
            return self.whole_logits(ids)
        finally:
            self._outputs = None

    def whole_logits(self, ids: Tensor) -> Tensor:
        """Logits [windows, context, vocabulary] of a model that is in memory as a whole, for these ids."""
        with Products():
            return self.model(input_ids=ids.to(self.device), use_cache=False).logits

    def load_block(self, number: int, weights: Iterable[tuple[PlannedTensor, Stored]]) -> None:
        """Put a block back in its place, with its weights as the files store them, or quantized ones."""
        self._blocks[number] = block = self._real[number]
        experts, parts, rounding = {}, {}, []
        for planned, stored in weights:
            tensor = self._as_stored(planned, stored)
            if isinstance(stored, QTensor) and stored.scheme.activations:
                rounding.append((planned, stored))
            if planned.target.expert and weight_kind(self.model, planned.target):
                experts[planned.target] = dense_layer(tensor.to(self.device, self.dtype))
            elif planned.target.expert or planned.target.converter is not None:
                parts[planned.info.name] = planned.target, tensor
            elif self.names.known(planned.target.parameter):
                set_tensor(self.model, planned.target, tensor, self.device)
        replace_layers(self.model, self.names, experts.items())
        targets = {name: target for name, (target, _) in parts.items()}
        for target, tensor in assembled_tensors(self.names, targets, lambda name: parts[name][1]):
            set_tensor(self.model, target, tensor, self.device)
        self._block, self._number = block, number
        for planned, qtensor in rounding:
            self.set_quantized(planned, qtensor)

    def unload_block(self) -> None:
        """Let go of the block's weights."""
        self._blocks[self._number] = self._real[self._number] = _StandIn(self, self._number, self._block)
        del self._block

    def blocks_in_memory(
        self, units: Iterable[Unit], on_step: OnStep
    ) -> Iterator[tuple[Unit, dict[str, Tensor], list[Tensor]]]:
        """Each block that text goes through, loaded, with its weights by name and its inputs, batch by batch.

        What the next block reads is what this one puts out as it then is, so that its weights may be changed. The
        inputs of one block are in memory as a whole; `embed` is not needed for it.

        Args:
            on_step: called with (blocks done, blocks in all).
        Raises:
            NumericsError: weights that are not finite.
        """
        inputs = list(self.embed())
        blocks = [unit for unit in units if unit.block is not None]
        for number, unit in enumerate(blocks):
            assert unit.block is not None
            on_step(number, len(blocks))
            weights = {planned.info.name: self.checkpoint.read(planned.info.name) for planned in unit.tensors}
            for name, tensor in weights.items():
                check_finite(name, tensor)
            self.load_block(unit.block, ((planned, weights[planned.info.name]) for planned in unit.tensors))
            if self.reached(unit.block):
                yield unit, weights, inputs
                if unit is not blocks[-1]:
                    inputs = list(self.outputs(inputs))
            self.unload_block()
        on_step(len(blocks), len(blocks))

    @torch.no_grad()
    def last_outputs(
        self, units: Iterable[Unit], note: Callable[[int, list[Tensor]], None] = lambda done, inputs: None
    ) -> list[Tensor]:
        """What the last block puts out, batch by batch, one block in memory at a time; `embed` is not needed for it.

        Args:
            note: called with the blocks done and the next one's inputs.
        """
        hidden = list(self.embed())
        blocks = [(unit.block, unit.tensors) for unit in units if unit.block is not None]
        for done, (block, tensors) in enumerate(blocks):
            note(done, hidden)
            self.load_block(block, ((planned, self._read(planned)) for planned in tensors))
            hidden = list(self.outputs(hidden))
            self.unload_block()
        return hidden

    @contextlib.contextmanager
    def whole_model(self, units: Iterable[Unit]) -> Iterator[nn.Module]:
        """The model with all its weights in memory, for as long as this lasts; `embed` is not needed for it."""
        for unit in units:
            if unit.block is not None:
                self.load_block(unit.block, ((planned, self._read(planned)) for planned in unit.tensors))
        with self.outside_in_memory():
            yield self.model

    @torch.no_grad()
    def forward_probe(self, inputs: Tensor) -> Tensor:
        """The block's outputs for the probe's inputs [1, tokens, hidden]."""
        return self.differentiable(len(self.batches), inputs)

    @torch.no_grad()
    def probe_logits(self, outputs: Tensor) -> Tensor:
        """What the model makes of the last block's outputs for the probe, [tokens, vocabulary]."""
        with self.outside_in_memory():
            return self.head(outputs, self.probe)[0].cpu()

    @torch.no_grad()
    def forward(self, batch: int, inputs: Tensor) -> Tensor:
        """The block's outputs for its inputs [windows, context, hidden] of one batch."""
        return self.differentiable(batch, inputs)

    def differentiable(self, batch: int, inputs: Tensor) -> Tensor:
        """The same, for a gradient by the weights that `with_weights` put into the block."""
        if not self.reached(self._number):
            return inputs.to(self.device)
        return _outputs(self._block, inputs.to(self.device), self._calls[batch][self._number])

    def _forwards(self, differentiable: bool = False) -> Callable[[tuple[int, Tensor]], Tensor]:
        """A function of (number of a batch, its inputs) that gives the outputs of the block as it is now.

        It works on the batch's device. Devices are alike, so each gives a batch the same bits.

        Args:
            differentiable: the outputs have a gradient by the inputs.
        """
        copies = [self._block, *(_copy(self._block, device) for device in self.devices[1:])]

        @torch.set_grad_enabled(differentiable)
        def forward(batch: tuple[int, Tensor]) -> Tensor:
            number, inputs = batch
            device = self._device(number)
            if device == self.device or not self.reached(self._number):
                return self.differentiable(number, inputs)
            call = self._calls[number][self._number]
            moved = _Call(_moved(call.arguments, device), _moved(call.options, device))
            return _outputs(copies[self.devices.index(device)], inputs.to(device), moved)

        return forward

    def _device(self, batch: int) -> torch.device:
        """The device that a batch goes through blocks on."""
        return self.devices[batch % len(self.devices)]

    def divide(self, groups: Sequence[Sequence[PlannedTensor]]) -> list[torch.device]:
        """A device for each group of layers that read one input: for its statistics, and for solving its layers."""
        return [self.devices[number] for number in divide(groups, len(self.devices))]

    def layer(self, planned: PlannedTensor) -> nn.Module:
        """The module that multiplies by a weight of the block."""
        if planned.target.expert is None:
            return self.model.get_submodule(planned.target.parameter.removesuffix(".weight"))
        experts = self.model.get_submodule(planned.target.parameter)
        assert isinstance(experts, QExperts)
        expert, piece, _ = planned.target.expert
        return experts.experts[expert][piece]  # type: ignore[index]

    def set_tensor(self, planned: PlannedTensor, tensor: Tensor) -> None:
        """Replace a tensor of the block; `tensor` is laid out as in the files."""
        target = planned.target
        if target.expert and weight_kind(self.model, target):
            self.layer(planned).weight = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
        elif target.expert:
            expert, piece, _ = target.expert
            biases = self.model.get_parameter(target.parameter)
            self.names.experts[target.parameter].split(biases.data[expert])[piece].copy_(tensor)
        elif self.names.known(target.parameter):
            set_tensor(self.model, target, tensor, self.device)

    def set_quantized(self, planned: PlannedTensor, qtensor: QTensor) -> None:
        """From now on a layer of the block is what the reference kernel makes of it: its inputs may be rounded, too."""
        if qtensor.scheme.activations is None:
            self.set_tensor(planned, self._as_stored(planned, qtensor))
        elif planned.target.expert:
            experts = self.model.get_submodule(planned.target.parameter)
            assert isinstance(experts, QExperts)
            expert, piece, _ = planned.target.expert
            pieces = experts.experts[expert]
            assert isinstance(pieces, nn.ModuleList)
            pieces[piece] = _RoundedInputs(qtensor.to(self.device), False, None)
        elif self.names.known(planned.target.parameter):
            self._place(planned.target.parameter.removesuffix(".weight"), qtensor, planned)

    def _place(self, path: str, qtensor: QTensor, planned: PlannedTensor) -> None:
        """Put a layer that rounds its inputs where the model has another."""
        bias = getattr(self.model.get_submodule(path), "bias", None)
        layer = _RoundedInputs(qtensor.to(self.device), planned.kind == "conv1d", bias)
        replace_module(self.model, path, layer)

    def _as_stored(self, planned: PlannedTensor, stored: Stored) -> Tensor:
        """A tensor as the files of an unquantized checkpoint hold it."""
        return planned.turned(stored.dequantize(self.dtype)) if isinstance(stored, QTensor) else stored

    @contextlib.contextmanager
    def with_weights(self, weights: Sequence[tuple[PlannedTensor, Tensor]]) -> Iterator[None]:
        """Meanwhile, layers of the block multiply by these weights [out, in], and by no copies of them."""
        before = []
        try:
            for planned, weight in weights:
                module = self.layer(planned)
                before.append((module, module._parameters["weight"]))
                module._parameters["weight"] = weight.t() if planned.kind == "conv1d" else weight  # type: ignore[assignment]
            yield
        finally:
            for module, parameter in before:
                module._parameters["weight"] = parameter

    def groups(self, layers: Sequence[PlannedTensor], inputs: Tensor) -> list[list[PlannedTensor]]:
        """The layers that read the very same input, together, in the order in which the block calls them.

        Args:
            inputs: of one batch. Layers that are not called for it, such as experts that none of its tokens reach,
                count as called last.
        """
        return [group for group, _ in self.groups_and_norms(layers, inputs)]

    def groups_and_norms(
        self, layers: Sequence[PlannedTensor], inputs: Tensor
    ) -> list[tuple[list[PlannedTensor], str | None]]:
        """The same groups, each with the path in the model of the norm whose output is the group's input.

        A norm is a module with a weight of one dimension. None where the input comes from anything else.
        """
        groups: list[tuple[Any, Tensor | None, list[PlannedTensor]]] = []  # expert, input, layers
        normalized: list[tuple[str, Any]] = []

        def note(planned: PlannedTensor, x: Tensor | None) -> None:
            expert = planned.target.expert
            key = (planned.target.parameter, expert[0]) if expert else None
            for other, tensor, group in groups:
                if key == other if key else (other is None and tensor is x):
                    group.append(planned) if planned not in group else None
                    return
            groups.append((key, x, [planned]))

        def watch(path: str, module: nn.Module) -> Any:
            return module.register_forward_hook(lambda _, inputs, output: normalized.append((path, output)))

        prefix = f"{self.path}.{self._number}"
        handles = [
            watch(f"{prefix}.{path}", module)
            for path, module in self._block.named_modules()
            if (weight := module._parameters.get("weight")) is not None and weight.dim() == 1
        ]
        try:
            with self._hooked(layers, note):
                self.forward(0, inputs)
        finally:
            for handle in handles:
                handle.remove()
        called = {id(planned) for _, _, group in groups for planned in group}
        for planned in layers:
            if id(planned) not in called:
                note(planned, torch.empty(0))
        sources = [next((path for path, output in normalized if output is x), None) for _, x, _ in groups]
        return [(group, source) for (_, _, group), source in zip(groups, sources)]

    def collect(
        self,
        wanted: Sequence[tuple[PlannedTensor, Sequence[type[Statistic]]]],
        inputs: Iterable[Tensor],
        devices: Sequence[torch.device] = (),
    ) -> list[dict[type[Statistic], Statistic]]:
        """Statistics of layers' inputs over all batches.

        Several devices let batches through the block at the same time. A layer's inputs are then sent to the device
        that has its statistics, and added there in the order of the batches. So sums are the same to the bit as those
        of one device: no two partial sums are ever added.

        Args:
            wanted: layers in the order in which the block calls them, and the statistics that are wanted of each.
            inputs: of the block, batch by batch. devices: that hold each layer's statistics; by default the first one.
        Raises:
            NumericsError: more than 1% of a layer's inputs are NaN or infinite.
        """
        if not wanted:
            return []
        layers = [planned for planned, _ in wanted]
        places = dict(zip(map(id, layers), devices or [self.device] * len(layers), strict=True))
        statistics = {
            id(each): {kind: kind(each.shape[1], places[id(each)]) for kind in kinds} for each, kinds in wanted
        }
        weighted = [planned for planned, kinds in wanted if any(kind.by_gradient for kind in kinds)]
        seen = threading.local()

        def note(planned: PlannedTensor, x: Tensor) -> None:
            seen.inputs.append((id(planned), False, x.detach()))
            if planned is layers[-1] and not planned.target.expert and not weighted:
                raise _Done

        def note_weighted(planned: PlannedTensor, x: Tensor, output: Tensor) -> None:
            inputs = seen.inputs  # a GPU's gradients come in a thread of their own

            def weigh(gradient: Tensor) -> None:
                size = gradient.to(torch.float32).square().sum(-1, keepdim=True).sqrt().clamp(min=_LEAST_WEIGHT)
                dtype = torch.float32 if x.dtype == torch.float16 else x.dtype  # float16 has no room below
                inputs.append((id(planned), True, (x.detach().to(torch.float32) * size).to(dtype)))

            output.register_hook(weigh)

        def run_block(batch: tuple[int, Tensor]) -> list[tuple[int, bool, Tensor]]:
            seen.inputs = []
            if weighted:
                number, states = batch
                with torch.enable_grad():
                    states = states.to(self._device(number)).detach().requires_grad_()
                    torch.autograd.grad(_projection(forward((number, states)), number), states)
                return seen.inputs
            with contextlib.suppress(_Done):
                forward(batch)
            return seen.inputs

        exact = all(kind.multiplies_inputs for _, kinds in wanted for kind in kinds)
        wide = _WIDE if len(self.devices) == 1 else math.inf  # several devices share no threads
        with self._hooked(layers, note), self._watched(weighted, note_weighted), self._start() as run:
            forward = self._forwards(bool(weighted))  # copies have the hooks, too
            for wave in self._waves(inputs):
                through = run(run_block, wave, [self._device(number) for number, _ in wave])
                collected = [item for batch in through for item in batch]

                def add(planned: PlannedTensor, collected: list[tuple[int, bool, Tensor]] = collected) -> None:
                    for layer, by_gradient, x in collected:
                        if layer == id(planned):
                            for kind, statistic in statistics[layer].items():
                                if kind.by_gradient == by_gradient:
                                    statistic.add(x.to(places[layer]))

                with bfloat16_products(x.dtype for _, _, x in collected) if exact else contextlib.nullcontext():
                    narrow = [planned for planned in layers if planned.shape[1] <= wide]
                    list(run(add, narrow, [places[id(planned)] for planned in narrow]))
                    for planned in layers:
                        if planned.shape[1] > wide:
                            add(planned)
        for planned in layers:
            for statistic in statistics[id(planned)].values():
                tokens = statistic.dropped + statistic.tokens
                if statistic.dropped > _MOST_DROPPED * tokens:
                    raise NumericsError(
                        f"{planned.module}: {statistic.dropped} of {tokens} calibration tokens gave it NaN or infinite "
                        "inputs; use a float32 or bfloat16 checkpoint, or other calibration text"
                    )
        return [statistics[id(planned)] for planned in layers]

    def gradients(
        self, layers: Sequence[PlannedTensor], inputs: Iterable[Tensor], by_outputs: Iterable[Tensor]
    ) -> tuple[list[Tensor], dict[str, list[tuple[Tensor, Tensor]]]]:
        """The gradient by the block's inputs; and what its layers read, with the gradient by what they put out.

        Args:
            inputs: of the block, batch by batch. by_outputs: the gradient by the block's outputs, likewise.
        Returns:
            The first batch by batch. By layer and call, its inputs [tokens, in] and the gradient [tokens, out]; a layer
            that text does not go through has none.
        """
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {planned.module: [] for planned in layers}

        def note(planned: PlannedTensor, x: Tensor, output: Tensor) -> None:
            read, own = x.detach().flatten(0, -2), seen[planned.module]
            output.register_hook(lambda gradient: own.append((read, gradient.flatten(0, -2))))

        by_inputs: list[Tensor] = []
        with self._watched(layers, note), torch.enable_grad():
            for number, (batch, gradient) in enumerate(zip(inputs, by_outputs, strict=True)):
                batch = batch.to(self.device).detach().requires_grad_()
                by_inputs += torch.autograd.grad(self.differentiable(number, batch), batch, gradient)
        return by_inputs, seen

    def outputs(self, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
        """The block's outputs, batch by batch."""
        ahead: Iterator[Tensor] = iter(())
        forward = self._forwards()
        with self._start() as run:
            for wave in self._waves(inputs):
                following = run(forward, wave, [self._device(number) for number, _ in wave])
                yield from ahead  # while the next ones are computed
                ahead = following
            yield from ahead

    @contextlib.contextmanager
    def _start(self) -> Iterator[Callable[..., Iterator[Any]]]:
        """A function that starts function(item) for every item, given the items' devices; the results come in order.

        Each device has a thread of its own. One device that is the CPU has several, which share its cores.
        """
        if len(self.devices) > 1:
            yield divided
            return
        with pool(self._workers) as run:
            yield lambda function, items, devices: run(function, items)

    def _waves(self, inputs: Iterable[Tensor]) -> Iterator[list[tuple[int, Tensor]]]:
        """Numbered batches, as many as are worked on at a time."""
        batches = enumerate(inputs)
        while wave := list(islice(batches, self._workers)):
            yield wave

    def _hooked(
        self, layers: Sequence[PlannedTensor], note: Callable[[PlannedTensor, Any], None]
    ) -> contextlib.AbstractContextManager[None]:
        """note(layer, input) at each call of a layer's module."""
        return _until_left(
            self.layer(planned).register_forward_pre_hook(
                lambda _, inputs, planned=planned: note(planned, inputs[0]) if inputs else None
            )
            for planned in layers
        )

    def _watched(
        self, layers: Sequence[PlannedTensor], note: Callable[[PlannedTensor, Tensor, Tensor], None]
    ) -> contextlib.AbstractContextManager[None]:
        """note(layer, input, output) at each call of a layer's module."""
        return _until_left(
            self.layer(planned).register_forward_hook(
                lambda _, inputs, output, planned=planned: note(planned, inputs[0], output) if inputs else None
            )
            for planned in layers
        )


@contextlib.contextmanager
def _until_left(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are registered on entering, and removed on leaving."""
    handles = list(hooks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class BlockView:
    """The block that a runner has loaded, as `Method.transform` sees and changes it; see methods.base.BlockView."""

    def __init__(
        self,
        runner: BlockRunner,
        tensors: Sequence[PlannedTensor],
        weights: dict[str, Tensor],
        inputs: Callable[[], Iterator[Tensor]],
        method: Method | None = None,
    ):
        """Show a block to a method or, without one, to a transform of all quantized layers.

        Args:
            tensors: all of the block. weights: the same by name, as in the files; `set` changes them in place.
            inputs: of the block, from the start at every call.
        """
        self._runner, self._weights, self.inputs, self._method = runner, weights, inputs, method
        self._tensors = {planned.info.name: planned for planned in tensors}

    @cached_property
    def _groups(self) -> list[tuple[list[PlannedTensor], str | None]]:
        """The groups with a layer of this method, each with the path of its norm in the block."""
        names = self._runner.names
        layers = [
            planned
            for name, planned in self._tensors.items()
            if name.endswith(".weight") and len(planned.info.shape) > 1
            if planned.target.expert
            or (names.known(planned.target.parameter) and planned.target.parameter not in names.experts)
        ]
        own = {
            name
            for name, planned in self._tensors.items()
            if planned.spec and (self._method is None or planned.spec.method == self._method)
        }
        groups = self._runner.groups_and_norms(layers, next(iter(self.inputs())))
        return [(group, norm) for group, norm in groups if any(planned.info.name in own for planned in group)]

    @cached_property
    def groups(self) -> list[LayerGroup]:
        named = {planned.target.parameter: planned.module for planned in self._tensors.values()}
        return [
            LayerGroup(tuple(planned.module for planned in group), named.get(f"{norm}.weight"))
            for group, norm in self._groups
        ]

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        stored = self._weights[name]
        return stored.t() if self._transposed(name) else stored

    def set(self, name: str, tensor: Tensor) -> None:
        planned = self._tensors.get(name)
        if planned is None:
            raise ValueError(f"{name!r} is no tensor of the block")
        stored = tensor.t().contiguous() if self._transposed(name) else tensor
        if tuple(stored.shape) != planned.info.shape:
            raise ValueError(f"{name} is set to shape {list(tensor.shape)}, expected {list(self.tensor(name).shape)}")
        stored = stored.cpu() if planned.spec else stored.to("cpu", planned.info.dtype)
        check_finite(name, stored)
        self._weights[name] = stored
        self._runner.set_tensor(planned, stored)

    def _transposed(self, name: str) -> bool:
        """Whether the files store a layer's weight as [in, out]."""
        target = self._tensors[name].target
        known = target.expert is None and self._runner.names.known(target.parameter)
        return known and weight_kind(self._runner.model, target) == "conv1d"

    def scheme(self, layer: str) -> Scheme | None:
        spec = self._tensors[f"{layer}.weight"].spec
        return spec.scheme if spec else None

    @cached_property
    def foldings(self) -> list[Folding | None]:
        inputs = next(iter(self.inputs()))
        outputs = self._runner.forward(0, inputs)
        return [
            next((each for each in self._candidates(number, inputs) if self._proved(each, inputs, outputs)), None)
            for number in range(len(self.groups))
        ]

    def _candidates(self, number: int, inputs: Tensor) -> Iterator[Folding]:
        """Foldings of a group that may hold: by its norm, or by a layer that is called before it, the nearest first."""
        layers, norm = self._groups[number]
        if layers[0].target.expert:
            return
        reader, width = self._runner.layer(layers[0]), layers[0].shape[1]
        if norm is not None:
            names = self._parameters(norm)
            if names and all(self._tensors[name].info.shape == (width,) for name in names):
                yield Folding(self.groups[number], names, torch.arange(width))
            return

        plain = self._input(reader, inputs)
        if plain is None:
            return
        for before in reversed([planned for group, _ in self._groups[:number] for planned in group]):
            if before.target.expert:
                continue
            names = self._parameters(before.target.parameter.removesuffix(".weight"))

            def inputs_with(factors: Tensor, names: tuple[str, ...] = names) -> Tensor | None:
                with self._unchanged_after(names):
                    self._scale_rows(names, factors)
                    return self._input(reader, inputs)

            for start in segments(before.shape[0], width):
                rows = rows_of_inputs(plain, before.shape[0], start, inputs_with)
                if rows is not None and len(rows.unique()) > 1:
                    yield Folding(self.groups[number], names, rows)

    def _input(self, layer: nn.Module, inputs: Tensor) -> Tensor | None:
        """What a layer of the block reads, [tokens, in], for the block's inputs; None where it is not called."""
        seen: list[Tensor] = []

        def read(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0].flatten(0, -2).cpu())
            raise _Done

        handle = layer.register_forward_pre_hook(read)
        try:
            with contextlib.suppress(_Done):
                self._runner.forward(0, inputs)
        finally:
            handle.remove()
        return seen[0] if seen else None

    def _parameters(self, path: str) -> tuple[str, ...]:
        """The names in the files of a module's weight and bias, as far as it has them."""
        wanted = (f"{path}.weight", f"{path}.bias")
        return tuple(name for name, planned in self._tensors.items() if planned.target.parameter in wanted)

    @contextlib.contextmanager
    def _unchanged_after(self, names: Iterable[str]) -> Iterator[None]:
        """These tensors may be changed meanwhile; afterwards they are as they were."""
        before = {name: self.tensor(name) for name in names}
        try:
            yield
        finally:
            for name, tensor in before.items():
                self.set(name, tensor)

    def _scale_rows(self, names: Iterable[str], factors: Tensor) -> None:
        """Multiply each row of these tensors by a factor [rows]."""
        for name in names:
            tensor = self.tensor(name)
            self.set(name, tensor * factors.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.dtype))

    def _proved(self, folding: Folding, inputs: Tensor, outputs: Tensor) -> bool:
        """Whether the block puts out the same bits after a folding; it is undone again."""
        with self._unchanged_after((*folding.tensors, *(f"{layer}.weight" for layer in folding.group.layers))):
            self.fold(folding, probe(folding.rows))
            return torch.equal(self._runner.forward(0, inputs), outputs)

    def fold(self, folding: Folding, scale: Tensor) -> None:
        rows = self.tensor(folding.tensors[0]).shape[0]
        self._scale_rows(folding.tensors, torch.ones(rows).index_copy(0, folding.rows, scale.reciprocal()))
        for layer in folding.group.layers:
            tensor = self.tensor(f"{layer}.weight")
            self.set(f"{layer}.weight", tensor * scale.to(tensor.dtype))

    def outputs(self, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
        return self._runner.outputs(inputs)

    @cached_property
    def _first(self) -> tuple[Tensor, Tensor]:
        """The first batch of the block's inputs, and what it puts out: the same bits after each folding."""
        inputs = next(iter(self.inputs()))
        return inputs, self._runner.forward(0, inputs)

    def error(self, products: Mapping[str, Callable[[Tensor], Tensor]]) -> float:
        inputs, expected = self._first
        handles = []
        try:
            for layer, product in products.items():

                def put_out(module: nn.Module, arguments: Any, output: Tensor, product: Any = product) -> Tensor:
                    bias = getattr(module, "bias", None)
                    y = product(arguments[0].to(torch.float32))
                    return (y if bias is None else y + bias).to(output.dtype)

                module = self._runner.layer(self._tensors[f"{layer}.weight"])
                handles.append(module.register_forward_hook(put_out))
            outputs = self._runner.forward(0, inputs).to(torch.float32)
        finally:
            for handle in handles:
                handle.remove()
        wide = expected.to(torch.float32)
        whole = (outputs - wide).square().sum() / wide.square().sum().clamp(min=1e-30)
        return (relative_errors(outputs, wide).mean() + whole).item()

    def collect(self, statistic: type[Statistic]) -> list[Any]:
        quantized = [next(planned for planned in group if planned.spec) for group, _ in self._groups]
        wanted = [(planned, (statistic,)) for planned in quantized]
        return [each[statistic] for each in self._runner.collect(wanted, self.inputs())]

    @cached_property
    def _statistics(self) -> dict[str, dict[type[Statistic], Statistic]]:
        """Layer -> what its method wants to know of its inputs, for the groups that can be folded."""
        folded = [group for (group, _), folding in zip(self._groups, self.foldings) if folding]
        methods = [each.spec.method for group in folded for each in group if each.spec]
        groups = apart(folded, chain.from_iterable(method.statistics for method in methods))
        kinds = [
            tuple(dict.fromkeys(kind for each in group if each.spec for kind in each.spec.method.statistics))
            for group in groups
        ]
        collected = self._runner.collect([(group[0], own) for group, own in zip(groups, kinds)], self.inputs())
        return {planned.module: own for group, own in zip(groups, collected) for planned in group}

    def as_quantized(self, layer: str, scale: Tensor) -> Tensor | None:
        spec = self._tensors[f"{layer}.weight"].spec
        assert spec
        if not spec.method.statistics:
            return None
        own = spec.method.divided(tuple(self._statistics[layer][kind] for kind in spec.method.statistics), scale)
        if own is None:
            return None
        weight = self.tensor(f"{layer}.weight").to(scale) * scale
        return spec.method.quantize(weight, spec.scheme, torch.float32, own)[0].dequantize()


class TrainableBlock:
    """The block that a runner has loaded, as `Method.learn` learns it; see methods.base.TrainableBlock."""

    def __init__(
        self,
        runner: BlockRunner,
        layers: Mapping[str, tuple[PlannedTensor, Tensor]],
        inputs: Callable[[int], Tensor],
        expected: Callable[[int], Tensor],
        on_step: OnStep,
    ):
        """Show a block whose layers are quantized to a method.

        Args:
            layers: by name, with their weights as in the files. inputs: of the block, by the number of a batch.
            expected: what the unquantized block puts out for them.
        """
        self._runner, self._layers, self._inputs, self._expected = runner, layers, inputs, expected
        self.on_step = on_step
        total = len(runner.batches)
        step = max(2, min(_HELD_OUT, total))  # every so many batches, the last one is held out
        self._held_out = [number for number in range(total) if number % step == step - 1]
        self._learned = [number for number in range(total) if number % step != step - 1]

    @property
    def batches(self) -> int:
        return len(self._learned)

    def weight(self, layer: str) -> Tensor:
        planned, weight = self._layers[layer]
        return (weight.t() if planned.kind == "conv1d" else weight).to(self._runner.device)

    def error(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        return self._error(self._learned[batch], weights)

    @torch.no_grad()
    def held_out_error(self, layers: Mapping[str, QTensor]) -> float:
        weights = {name: qtensor.dequantize(self._runner.dtype) for name, qtensor in layers.items()}
        return math.fsum(self._error(number, weights).item() for number in self._held_out) / len(self._held_out)

    def _error(self, number: int, weights: Mapping[str, Tensor]) -> Tensor:
        """The error of one batch of all; each token counts the same, however large its outputs are."""
        runner, inputs = self._runner, self._inputs(number)
        own = [(self._layers[name][0], weight.to(runner.dtype)) for name, weight in weights.items()]
        with runner.with_weights(own):
            outputs = runner.differentiable(number, inputs)
        return relative_errors(outputs, self._expected(number).to(runner.device)).mean()


def divide(groups: Sequence[Sequence[PlannedTensor]], parts: int) -> list[int]:
    """The part that each group of layers that read one input belongs to, so that all parts take about as long.

    The group with most work comes first; each goes to the part that has least to do.
    """
    loads, chosen = [0] * parts, [0] * len(groups)
    for number in sorted(range(len(groups)), key=lambda number: -work_on(groups[number])):
        chosen[number] = loads.index(min(loads))
        loads[chosen[number]] += work_on(groups[number])
    return chosen


def work_on(group: Sequence[PlannedTensor]) -> int:
    """What the work on a group's statistics, their factor and its layers grows by: the square of the inputs, for each
    input and each output."""
    width = group[0].shape[1]
    return width**2 * (width + sum(each.shape[0] for each in group))


def _copy(block: nn.Module, device: torch.device) -> nn.Module:
    """A block with all that it is, its tensors on another device."""
    memo: dict[int, Any] = {}
    for module in block.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(tensor.to(device), requires_grad=False)
            elif isinstance(tensor, Tensor):
                memo[id(tensor)] = tensor.to(device)
    return copy.deepcopy(block, memo)


def _moved(value: Any, device: torch.device) -> Any:
    """What a block is called with, its tensors on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    return type(value)(_moved(each, device) for each in value) if isinstance(value, tuple | list) else value


def _outputs(block: nn.Module, inputs: Tensor, call: _Call) -> Tensor:
    """The hidden states that a block puts out."""
    with Products():
        output = block(inputs, *call.arguments, **call.options)
    return output[0] if isinstance(output, tuple | list) else output


def _projection(outputs: Tensor, seed: int) -> Tensor:
    """Outputs [..., hidden], each token's divided by its norm, on a random direction of signs.

    The squared gradient of this by anything is, on average over directions, how much that moves the outputs: the sum of
    the relative squared errors of all tokens, to first order (Hutchinson's estimator).
    """
    signs = torch.randint(0, 2, outputs.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    wide = outputs.to(torch.float32)
    norms = wide.detach().square().sum(-1, keepdim=True).clamp(min=1e-30).sqrt()
    return (wide * (2 * signs - 1).to(wide) / norms).sum()


def apart(groups: list[list[PlannedTensor]], kinds: Iterable[type[Statistic]]) -> list[list[PlannedTensor]]:
    """Groups of layers that have the same statistics, given those that read the same input."""
    alone = any(kind.by_gradient for kind in kinds)
    return [[planned] for group in groups for planned in group] if alone else groups


def relative_errors(outputs: Tensor, expected: Tensor) -> Tensor:
    """The squared error of each token's outputs [..., hidden], as a fraction of what is expected; float32 [...]."""
    wide = expected.to(torch.float32)
    return (outputs.to(torch.float32) - wide).square().sum(-1) / wide.square().sum(-1).clamp(min=1e-30)


def _shared(call: _Call, earlier: _Call | None) -> _Call:
    """The call, its tensors replaced by equal ones of an earlier call: masks and positions are the same for all."""

    def same(value: Any, known: Any) -> Any:
        if isinstance(value, Tensor):
            equal = isinstance(known, Tensor) and value.shape == known.shape and torch.equal(value, known)
            return known if equal else value
        if isinstance(value, tuple) and isinstance(known, tuple) and len(value) == len(known):
            return tuple(map(same, value, known))
        return value

    if earlier is None:
        return call
    options = {name: same(value, earlier.options.get(name)) for name, value in call.options.items()}
    return _Call(same(call.arguments, earlier.arguments), options)
