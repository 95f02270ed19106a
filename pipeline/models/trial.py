"""Tries a plan before anything is written: a few tokens through the model, its layers quantized.

Not every module that looks like a linear layer may be replaced: some models read the weight of one themselves. What a
model does is seen when it runs. Nothing of the files is read for that. Weights are samples, one for each shape, and of
the decoder's blocks only the first one of each kind runs: so the trial takes seconds, and the memory of a few layers,
whatever the model's size.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from bitpress.kernels.linear import QEmbedding, QLinear
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..errors import CheckpointError
from ..storage.checkpoint import Checkpoint
from .kv_cache import CacheShape, cache_windows, shapes_seen
from .modules import replace_layers
from .structure import ParameterPath, TensorNames, decoder, skeleton

_TOKENS = 4
_ROWS = 8  # of the head, whose other rows would only take time


@dataclass(frozen=True)
class TrialLayer:
    """A layer as it is to be.

    scheme: None for an expert that stays as it is beside quantized ones. shape: [out, in]. kind: see weight_kind.
    """

    scheme: Scheme | None
    shape: tuple[int, ...]
    kind: str = "linear"


@dataclass
class _Trial:
    """One model of samples. repeat: only the first block of each kind runs; the others give what that one gave."""

    checkpoint: Checkpoint
    layers: Mapping[ParameterPath, TrialLayer]
    repeat: bool
    readers: dict[ParameterPath, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = skeleton(self.checkpoint)
        if self.model.dtype == torch.float16:  # many operations do not know it on the CPU
            self.model = skeleton(self.checkpoint, torch.float32)
        self.model.config._experts_implementation = "eager"  # the others want all experts in one piece of memory
        self.names = TensorNames(self.model)
        self.kinds = _kinds(self.model, self.names, self.layers)

    @torch.no_grad()
    def run(self) -> Exception | None:
        """Run the model; `readers` then holds the layers whose weights something reads, and what reads them.

        Returns what the model raises.
        """
        _fill(self.model)
        ids = _plain_ids(self.model)
        self._shrink_head()
        first = {target for target in self.layers if self.names.block(target.parameter) in (*self.kinds.values(), None)}
        replace_layers(
            self.model,
            self.names,
            [
                (target, self._maker(target, self.layers[target], max(ids) + 1))
                for target in self.layers
                if target in first
            ],
        )
        if self.repeat:
            blocks = self.model.get_submodule(decoder(self.model))
            assert isinstance(blocks, nn.ModuleList)
            originals = list(blocks)
            for number, kind in self.kinds.items():
                if number != kind:
                    blocks[number] = _Repeat(originals[number], originals[kind])
        try:
            self.model(input_ids=torch.tensor([ids]), use_cache=False)
        except Exception as error:  # whatever it may be: the model comes from an untrusted config
            return error
        return None

    def _shrink_head(self) -> None:
        """Leave a head that is not quantized a few rows only."""
        head = self.model.get_output_embeddings()
        if type(head) is nn.Linear:
            head.weight = nn.Parameter(head.weight[:_ROWS], requires_grad=False)
            head.bias = None if head.bias is None else nn.Parameter(head.bias[:_ROWS], requires_grad=False)

    def _maker(self, target: ParameterPath, layer: TrialLayer, ids: int) -> Callable[[Tensor | None], nn.Module]:
        path = target.parameter.rpartition(".")[0]
        parent = self.model.get_submodule(path.rpartition(".")[0])
        rows, width = layer.shape
        if self.names.block(target.parameter) is None:
            rows = min(rows, ids if layer.kind == "embedding" else _ROWS)

        def make(bias: Tensor | None) -> nn.Module:
            bias = None if bias is None else bias[:rows]
            dtype = self.model.dtype
            dense = _sample(width, dtype).expand(rows, width)
            module: nn.Module
            if layer.scheme is None:
                return _Dense(dense, bias)
            if layer.scheme.problems((rows, width)):  # which the plan is about to refuse, or to fit
                module = _Dense(dense, bias)
            elif layer.kind == "embedding":
                module = QEmbedding(_qtensor(layer.scheme, (rows, width)), dtype)
            else:
                module = QLinear(_qtensor(layer.scheme, (rows, width)), bias, dtype, "reference")
            read = dense.t() if layer.kind == "conv1d" else dense
            return _Probe(module, read, lambda: self.readers.setdefault(target, type(parent).__name__))

        return make


class _Probe(nn.Module):
    """A quantized layer that notices when its weight is read, which it does not have."""

    def __init__(self, layer: nn.Module, weight: Tensor, note: Callable[[], Any]):
        super().__init__()
        self.layer, self._weight, self._note = layer, weight, note

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return self.layer(*arguments, **options)

    @property
    def weight(self) -> Tensor:
        self._note()
        return self._weight.contiguous()  # some models write to it, as Rwkv does

    def __getattr__(self, name: str) -> Any:
        return getattr(super().__getattr__("layer"), name) if name != "layer" else super().__getattr__(name)


class _Dense(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self._weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self.bias)


class _Repeat(nn.Module):
    """Stands in the place of a block and gives what another block of its kind gave."""

    def __init__(self, block: nn.Module, first: nn.Module):
        super().__init__()
        vars(self).update({name: value for name, value in vars(block).items() if not name.startswith("_")})
        self._first = [first]  # in a list, it is no submodule
        self._outputs: list[Any] = []
        first.register_forward_hook(lambda module, inputs, output: self._outputs.append(output))

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self._outputs[-1] if self._outputs else self._first[0](*arguments, **options)


def layers_to_keep(
    checkpoint: Checkpoint, model: PreTrainedModel, names: TensorNames, layers: Mapping[ParameterPath, TrialLayer]
) -> dict[ParameterPath, str]:
    """The layers that cannot be quantized, each with the reason; the model runs with all others quantized.

    Args:
        model: the checkpoint's skeleton, which is left as it is. layers: what is to be quantized.
    Raises:
        CheckpointError: the model does not even run as it is.
    """
    kinds = _kinds(model, names, layers)
    reasons: dict[ParameterPath, str] = {}
    readers, error = _try(checkpoint, layers)
    if error is not None:
        _, dense_error = _try(checkpoint, {})
        if dense_error is not None:
            raise CheckpointError(
                f"{type(model).__name__} does not run on token ids alone in transformers "
                f"({_line(dense_error)}); bitpress quantizes models that read text"
            ) from dense_error
        for group in _groups(names, layers).values():
            _, group_error = _try(checkpoint, {target: layers[target] for target in group})
            if group_error is not None:
                quantized = [target for target in group if layers[target].scheme]
                reasons |= dict.fromkeys(quantized, f"the model does not run with it quantized: {_line(group_error)}")
        rest = {target: layer for target, layer in layers.items() if target not in reasons}
        readers, error = _try(checkpoint, rest)
        if error is not None:
            raise CheckpointError(
                f"{type(model).__name__} does not run on quantized layers ({_line(error)}); keep some by a rule, "
                "as in layers: {'NAME': none} (--layer 'NAME=none')"
            ) from error
    blocks: dict[int | None, list[int | None]] = {None: [None]}
    blocks |= {kind: [number for number, first in kinds.items() if first == kind] for kind in kinds.values()}
    for target, reader in readers.items():
        block, inner = names.block(target.parameter), names.in_block(target.parameter)
        for other in layers:
            same = (
                names.block(other.parameter) in blocks.get(block, [None]) and names.in_block(other.parameter) == inner
            )
            if same and layers[other].scheme:
                reasons[other] = f"{reader} reads its weight itself"
    return reasons


def cache_shapes(checkpoint: Checkpoint) -> dict[str, CacheShape]:
    """Path of each attention that puts keys and values into a cache -> what it keeps of each token.

    Raises:
        CheckpointError: the model does not run on token ids alone.
    """
    error: Exception | None = None
    for repeat in (True, False):
        trial = _Trial(checkpoint, {}, repeat)
        with shapes_seen(trial.model) as seen:
            error = trial.run()
        if error is None:
            break
    if error is not None:
        name = type(trial.model).__name__
        raise CheckpointError(f"{name} does not run on token ids alone in transformers ({_line(error)})") from error
    inside: dict[int | None, dict[str, CacheShape]] = {}
    for path, shape in seen.items():
        inside.setdefault(trial.names.block(path), {})[trial.names.in_block(path)] = shape
    blocks, windows = decoder(trial.model), cache_windows(trial.model)
    return {
        f"{blocks}.{number}.{path}": replace(shape, window=windows.get(number))
        for number, kind in trial.kinds.items()
        for path, shape in inside.get(kind, {}).items()
    }


def _try(
    checkpoint: Checkpoint, layers: Mapping[ParameterPath, TrialLayer]
) -> tuple[dict[ParameterPath, str], Exception | None]:
    """What reads the weights of some layers, and what the model raised."""
    for repeat in (True, False):  # a model that does more with its blocks than to call them has them all
        trial = _Trial(checkpoint, layers, repeat)
        error = trial.run()
        if error is None:
            break
    _qtensor.cache_clear()
    return trial.readers, error


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def _groups(names: TensorNames, layers: Collection[ParameterPath]) -> dict[str, list[ParameterPath]]:
    """The layers of all blocks that have the same name in their block, all experts among them, together."""
    groups: dict[str, list[ParameterPath]] = {}
    for target in layers:
        groups.setdefault(names.in_block(target.parameter), []).append(target)
    return groups


def _kinds(model: PreTrainedModel, names: TensorNames, layers: Mapping[ParameterPath, TrialLayer]) -> dict[int, int]:
    """Block -> the first block of its kind.

    Blocks are of a kind where their modules, these modules' switches, the shapes of their weights, and what is to be
    done to these are the same.
    """
    planned: dict[int | None, list[tuple[str, Any, TrialLayer]]] = {}
    for target, layer in layers.items():
        entry = (names.in_block(target.parameter), target.expert, layer)
        planned.setdefault(names.block(target.parameter), []).append(entry)
    first: dict[Any, int] = {}
    kinds = {}
    for number, block in enumerate(model.get_submodule(decoder(model)).children()):
        kind = (tuple(_facts(block)), tuple(planned.get(number, ())))
        kinds[number] = first.setdefault(kind, number)
    return kinds


def _facts(block: nn.Module) -> Iterator[Any]:
    for path, module in block.named_modules():
        switches = [item for item in vars(module).items() if isinstance(item[1], bool | str | None)]
        shapes = [(name, tuple(each.shape)) for name, each in module._parameters.items() if each is not None]
        yield path, type(module), tuple(switches), tuple(shapes)


@cache
def _sample(width: int, dtype: torch.dtype) -> Tensor:
    return (0.02 * torch.randn(width, generator=torch.Generator().manual_seed(0))).to(dtype)


@cache
def _qtensor(scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    return QTensor.of(scheme, shape, scheme.random(shape, torch.Generator().manual_seed(0)))


def _fill(model: nn.Module) -> None:
    """Give every parameter a value that takes the memory of one row."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            width = parameter.shape[-1] if parameter.dim() else 1
            row = (
                _sample(width, parameter.dtype)
                if parameter.is_floating_point()
                else torch.zeros(width, dtype=parameter.dtype)
            )
            value = row.expand(parameter.shape) if parameter.dim() else row[0]
            module._parameters[name] = nn.Parameter(value, requires_grad=False)


def _plain_ids(model: PreTrainedModel) -> list[int]:
    """A few token ids that no key of the config names, such as those of pictures."""
    special: set[int] = set()

    def gather(values: Mapping[Any, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                gather(value)
            elif str(key).endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list) else [value])

    gather(model.config.to_dict())
    return [number for number in range(len(special) + _TOKENS) if number not in special][:_TOKENS]
