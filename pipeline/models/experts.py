"""How models hold the weights of experts; and checkpoints that hold them in one tensor, seen as a layer for each.

transformers keeps all experts of a block in one parameter, mlp.experts.gate_up_proj [experts, 2 x inner, hidden], say.
Models differ in how each expert lies in it. Here that is data: an ExpertLayout for every such parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..storage.checkpoint import Checkpoint, CheckpointView, TensorInfo

_GATE_UP = ("gate_proj", "up_proj")
_PIECES = {"gate_up_proj": _GATE_UP, "gate_proj": ("gate_proj",), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}

# Modules that do not say how their parameters lie, as those with transformers' `use_experts_implementation` do:
# class -> parameter -> (the layers in it, whether each lies as [in, out]).
_SILENT: Mapping[str, Mapping[str, tuple[tuple[str, ...], bool]]] = {
    "Llama4TextExperts": {"gate_up_proj": (_GATE_UP, True), "down_proj": (("down_proj",), True)},
    "LongcatFlashExperts": {"gate_up_proj": (_GATE_UP, False), "down_proj": (("down_proj",), False)},
    "JetMoeParallelExperts": {"weight": (("",), False)},
    "DbrxExpertGLU": {"w1": (("w1",), False), "v1": (("v1",), False), "w2": (("w2",), True)},
}


@dataclass(frozen=True)
class ExpertLayout:
    """How a parameter holds a linear layer of every expert, or several.

    experts: how many. pieces: an expert's layers in it, by the names that files with one tensor per expert give them,
    such as ("gate_proj", "up_proj"); "" for a layer that has the name of its module.
    transposed: each lies as [in, out], not [out, in]. interleaved: the pieces' outputs alternate; otherwise each piece
    is whole, one after the other. bias: the parameter holds the layers' biases, [experts, out].
    """

    experts: int
    pieces: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False

    def expert_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """One expert's shape in a parameter of this shape; some models put all experts' rows into two dimensions."""
        return shape[1:] if self.bias or len(shape) == 3 else (shape[0] // self.experts, *shape[1:])

    def piece_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """[out, in] of one piece, or [out] of its bias, in a parameter of this shape."""
        one = self.expert_shape(shape)
        one = one[::-1] if self.transposed else one
        return (one[0] // len(self.pieces), *one[1:])

    def split(self, expert: Tensor) -> list[Tensor]:
        """One expert as the parameter holds it -> its pieces [out, in] (biases: [out]), which are views."""
        rows, count = expert.t() if self.transposed else expert, len(self.pieces)
        return [rows[piece::count] for piece in range(count)] if self.interleaved else list(rows.chunk(count))

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The inverse of split."""
        rows = torch.stack(pieces, 1).flatten(0, 1) if self.interleaved else torch.cat(pieces)
        return rows.t() if self.transposed else rows


def expert_layouts(model: nn.Module) -> dict[str, ExpertLayout]:
    """Every parameter of a model that holds layers of experts -> how it holds them."""
    layouts = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        described = all(hasattr(module, each) for each in ("is_transposed", "is_concatenated", "has_bias"))
        silent = _SILENT.get(type(module).__name__, {})
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            if leaf in silent:
                pieces, transposed = silent[leaf]
                count = parameter.shape[0] if parameter.dim() == 3 else _count(module)
                layouts[prefix + leaf] = ExpertLayout(count, pieces, transposed)
            elif described and leaf in _PIECES and parameter.dim() == 3:
                layouts[prefix + leaf] = ExpertLayout(
                    parameter.shape[0], _PIECES[leaf], module.is_transposed, not module.is_concatenated
                )
            elif described and leaf.removesuffix("_bias") in _PIECES and parameter.dim() == 2:
                pieces = _PIECES[leaf.removesuffix("_bias")]
                layouts[prefix + leaf] = ExpertLayout(
                    parameter.shape[0], pieces, False, not module.is_concatenated, bias=True
                )
    single = {path: replace(each, interleaved=False) for path, each in layouts.items() if len(each.pieces) == 1}
    return layouts | single


def _count(module: nn.Module) -> int:
    """How many experts a module has whose parameters do not tell by their shapes."""
    return int(getattr(module, "moe_num_experts"))  # noqa: B009  (mypy takes a module's attributes for tensors)


@dataclass(frozen=True)
class ExpertSlice:
    """One layer of one expert, or its bias, in a checkpoint's tensor that holds all experts.

    source: that tensor's name. layout: of that tensor, as the files hold it. expert, piece: which layer of it.
    """

    source: str
    layout: ExpertLayout
    expert: int
    piece: int


class SplitCheckpoint(CheckpointView):
    """A checkpoint whose tensors of many experts are seen as one tensor [out, in] for each layer of each expert.

    One expert is in memory at a time.
    """

    def __init__(self, checkpoint: Checkpoint, slices: Mapping[str, ExpertSlice]):
        """View a checkpoint.

        Args:
            slices: name -> the layer that it stands for. Their sources are seen no more; the rest is seen as it is.
        """
        super().__init__(checkpoint)
        self._slices = slices
        self._last: tuple[tuple[str, int], Tensor] | None = None  # the expert that was read last: pieces share it
        parts: dict[str, list[TensorInfo]] = {}
        for name, part in slices.items():
            whole = checkpoint.tensors[part.source]
            size = whole.nbytes // part.layout.experts // len(part.layout.pieces)
            shape = part.layout.piece_shape(whole.shape)
            parts.setdefault(part.source, []).append(replace(whole, name=name, shape=shape, nbytes=size))
        self.tensors = {
            info.name: info for whole in checkpoint.tensors.values() for info in parts.get(whole.name, [whole])
        }

    def part(self, name: str) -> Tensor | None:
        part = self._slices.get(name)
        if part is None:
            return None
        last = self._last
        if last is None or last[0] != (part.source, part.expert):
            shape = self.whole.tensors[part.source].shape
            rows = shape[0] // part.layout.experts
            (expert,) = self.whole.read_rows(part.source, [rows], first=rows * part.expert)
            last = self._last = (part.source, part.expert), expert.view(part.layout.expert_shape(shape))
        return part.layout.split(last[1])[part.piece].contiguous()
