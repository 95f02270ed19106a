"""What every quantization method is, and what it may ask of the layers that it quantizes.

The shortest method, in a file of its own in this folder:

    class Truncate(Method):
        name, rank, version = "truncate", 50, 1

        def problems(self, scheme):
            fits = scheme.weight.description() == WeightDescription("int", 8, "channel")
            return [] if fits else [f"truncate produces int8-channel, not {scheme.name}"]

        def quantize(self, weight, scheme, scale_dtype, statistics=()):
            scales = weight.float().abs().amax(1, keepdim=True).div(127).to(scale_dtype)
            elements = weight.float().div(scales.float()).trunc().clamp(-128, 127).to(torch.int8)
            tensors = scheme.weight.from_elements(weight.shape, elements, scales, None)
            qtensor = QTensor.of(scheme, tuple(weight.shape), tensors)
            lost = (weight.float() - qtensor.dequantize()).norm() / weight.float().norm()
            return qtensor, Diagnostics(lost.item())

    PLUGINS = (Truncate(),)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme


@dataclass(frozen=True)
class Diagnostics:
    """What quantizing one weight did to it.

    relative_error: ||W - W'|| / ||W||, Frobenius norms; 0 for a weight of zeros.
    output_error: ||(W - W') X|| / ||W X|| over the calibration tokens X.
    tokens: how many of those the layer saw. damping: what its Hessian needed.
    fallback: why the method could not be used and the weight was rounded by absmax instead.
    note: what else there is to say.
    """

    relative_error: float
    output_error: float | None = None
    tokens: int | None = None
    damping: float | None = None
    fallback: str | None = None
    note: str | None = None


class Statistic(Protocol):
    """What a method wants to know about a layer's inputs, gathered batch by batch. `Hessian` is the first.

    tokens: how many inputs were counted. dropped: how many were left out because they were not finite.
    multiplies_inputs: True if its only matrix products are those of inputs by inputs. Where the inputs are bfloat16,
        these products may then be taken by a processor's bfloat16 units, which lose nothing.
    by_gradient: True if each input is to be multiplied by how much an error of the layer's output for that token moves
        what the block puts out. Layers that read one input then have statistics of their own.
    """

    multiplies_inputs: bool
    by_gradient: bool
    tokens: int
    dropped: int

    def __init__(self, in_features: int, device: torch.device) -> None: ...

    @staticmethod
    def nbytes(in_features: int) -> int:
        """What it takes in memory, about: so many are gathered at a time as a limit allows."""
        ...

    def add(self, inputs: Tensor) -> None:
        """Count inputs [..., in_features], floating. Rows with NaN or infinite values are left out."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that was counted, for recipes that share it on the disk; asked for before the statistic is used."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what another statistic of as many inputs counted, to the bit; this one has counted nothing yet."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers of a block that read the very same input.

    layers: their names in the files, without ".weight". Layers that are not quantized are among them.
    norm: the name of the normalization whose output that input is; None if the input comes from somewhere else.
    """

    layers: tuple[str, ...]
    norm: str | None


@dataclass(frozen=True, eq=False)
class Folding:
    """Where the scale of a group's inputs can be moved to, so that the block computes what it computed.

    group: the layers that read these inputs. rows: int64 [in], which row of `tensors` makes each input channel; inputs
    that one row makes, as of query heads that share a value head, must have the same scale.
    tensors: names of a norm's weight and bias, or of those of the linear layer before (v before o, up before down).
    """

    group: LayerGroup
    tensors: tuple[str, ...]
    rows: Tensor


class BlockView(Protocol):
    """A decoder block as `Method.transform` and a recipe's transforms see and change it."""

    @property
    def groups(self) -> list[LayerGroup]:
        """The groups with a layer that this method quantizes, in the order in which the block calls them."""

    @property
    def names(self) -> list[str]:
        """The names in the files of all tensors of the block."""

    def tensor(self, name: str) -> Tensor:
        """A tensor of the block by its name in the files, or as it was last set.

        A layer's weight is [out, in], also where the files store it transposed.
        """

    def set(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor of the block.

        A tensor that is not quantized is rounded to the dtype that it has in the files.

        Raises:
            ValueError: the block has no such tensor, or it has another shape.
            NumericsError: NaN or infinite values.
        """

    def scheme(self, layer: str) -> Scheme | None:
        """The scheme that a layer will be quantized to; None for one that is kept."""

    @property
    def foldings(self) -> list["Folding | None"]:
        """For each group, where the scale of its inputs can be moved to; None where that is nowhere.

        Each is proved on the block: its outputs are the same, to the bit.
        """

    def fold(self, folding: Folding, scale: Tensor) -> None:
        """Divide a group's inputs by `scale` [in], powers of two, and multiply the columns of its weights by it."""

    def error(self, products: Mapping[str, Callable[[Tensor], Tensor]]) -> float:
        """How far the block's outputs would be off, on one batch of calibration tokens, if layers computed otherwise.

        The squared error of each token's outputs as a fraction of their squared norm, the mean over tokens; and the
        same fraction of all tokens together. The first counts every token. The second counts those with massive
        activations, which are few and which all other tokens attend to.

        Args:
            products: layer -> what it makes of its inputs, float32 [..., in], before its bias is added: [..., out].
        """

    def inputs(self) -> Iterator[Tensor]:
        """The block's inputs for the calibration tokens, [windows, context, hidden] batch by batch."""

    def outputs(self, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
        """The block's outputs for inputs that come as `inputs()` gives them, by the weights as they are now."""

    def collect(self, statistic: type[Statistic]) -> list[Any]:
        """The statistic of each group's input over all calibration tokens, in the order of `groups`."""

    def as_quantized(self, layer: str, scale: Tensor) -> Tensor | None:
        """What a layer's method would make of its weight times `scale`, for inputs that are divided by it.

        None where the method does not tell, see Method.divided.

        Args:
            layer: of a group that has a folding and was not folded yet. scale: float32 [in], powers of two.
        Returns:
            float32 [out, in].
        """


@dataclass(frozen=True)
class Tuned:
    """What learning did to a block's layers.

    layers: their names in the files. curve: (gradient steps done, error on held-out tokens), from before the first step
    on; see TrainableBlock.error for what the error is.
    """

    layers: tuple[str, ...]
    curve: tuple[tuple[int, float], ...]


class TrainableBlock(Protocol):
    """A decoder block whose quantized layers `Method.learn` may learn, and the calibration tokens to learn from.

    batches: how many batches of tokens there are to learn from; the held-out ones are others.
    """

    @property
    def batches(self) -> int: ...

    def weight(self, layer: str) -> Tensor:
        """A layer's unquantized weight [out, in]."""

    def error(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """How far the block's outputs for a batch are off with these weights, [out, in] each, in these layers.

        The squared error of each token's output against the unquantized block's for the same input, as a fraction of
        that output's squared norm; the mean over tokens. So a few tokens with huge outputs, which the next norm makes
        as small as all others, do not hide the rest. A scalar that can be differentiated by the weights.
        """

    def held_out_error(self, layers: Mapping[str, QTensor]) -> float:
        """The same over all held-out batches, with layers as they are stored."""

    def on_step(self, done: int, total: int) -> None:
        """Shows how far learning has come, in gradient steps."""


class Method(Protocol):
    """One algorithm. A method with options is a pydantic dataclass, its fields the options.

    rank: methods with a lower one come first; the first that can produce a scheme is the scheme's default.
    version: goes up whenever the same input would give other bytes.
    packages: names of the packages, beside bitpress's own requirements, that it takes and whose versions its bytes
        depend on.
    statistics: what it wants to know about each layer's inputs. () for a method that needs only the weight.
    true_sequential: within a block, the statistics of a layer are gathered after the layers before it were quantized.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    version: ClassVar[int]
    packages: ClassVar[tuple[str, ...]] = ()
    true_sequential: bool = False

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        return ()

    @property
    def needs_calibration(self) -> bool:
        """True if the method must see what the model does with calibration text."""
        return bool(self.statistics) or self.transforms

    @property
    def transforms(self) -> bool:
        """True if the method changes a block before its layers are quantized."""
        return type(self).transform is not Method.transform

    def problems(self, scheme: Scheme) -> list[str]:
        """Why the method cannot produce this scheme; [] if it can."""
        ...

    def transform(self, block: BlockView) -> None:
        """Change tensors of a block before its layers are quantized: to smooth, to rotate, to scale. Does nothing here.

        The changed block must compute what it computed before, but for rounding. That is the method's own care: a
        group's `norm` may have other readers that are no layers, such as a residual connection, and some norms
        multiply by 1 + weight. `BlockView.outputs` before and after shows whether the change was right.
        """
        return

    @property
    def learns(self) -> bool:
        """True if the method learns from a whole block after its layers are quantized."""
        return type(self).learn is not Method.learn

    def learning_passes(self, batches: int) -> float:
        """What `learn` takes, as so many forward passes over all calibration tokens; for plans of time.

        Args:
            batches: into which the tokens are divided.
        """
        return 0.0

    def learn(self, block: TrainableBlock, layers: Mapping[str, QTensor]) -> tuple[dict[str, QTensor], Tuned]:
        """Layers of a block that this method quantized, improved by what the block as a whole puts out.

        Returns the same layers, with the same schemes, and how the error fell. Layers are left as they are here.
        """
        return dict(layers), Tuned((), ())

    def divided(self, statistics: tuple[Any, ...], scale: Tensor) -> tuple[Any, ...] | None:
        """What its statistics would be if the inputs were divided by `scale`, float32 [in], powers of two.

        None where that does not follow from them. Transforms that scale weights are then judged by rounding to nearest
        in place of this method.
        """
        return None

    def quantize(
        self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, statistics: tuple[Any, ...] = ()
    ) -> tuple[QTensor, Diagnostics]:
        """The weight's codes, and what they cost.

        Args:
            weight: [out, in], bfloat16, float16 or float32, finite.
            scale_dtype: of the scales as the format stores them.
            statistics: of the layer's inputs, one for each class in `self.statistics`, in that order.

        Raises:
            ValueError: the values do not fit, such as a scale beyond float16's range.
        """
        ...
