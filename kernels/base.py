"""What a kernel is, and the weight in the layout that it multiplies by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .activations.base import Activations
from .qtensor import QTensor
from .scheme import Scheme
from .weights.base import WeightType

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


@dataclass(frozen=True)
class Serves:
    """Schemes that a kernel can multiply by: weights of one type and of these bits, with these activations.

    Args:
        words: what they are called in "serves … only".
        weight: the type. A kernel reads its tensors, so another type with the same description is not served.
        bits: bits of a code; () for all that the type has.
        activations: None stands for inputs that are left alone.
    """

    words: str
    weight: type[WeightType]
    bits: tuple[int, ...] = ()
    activations: type[Activations] | None = None

    def covers(self, scheme: Scheme) -> bool:
        """Whether the scheme is one of these."""
        inputs = None if scheme.activations is None else type(scheme.activations)
        fits = not self.bits or scheme.bits in self.bits
        return type(scheme.weight) is self.weight and fits and inputs is self.activations


class PackedWeight(nn.Module):
    """One QTensor in the layout of one kernel: its tensors are buffers, so they count, and move, with the model."""

    def __init__(self, qtensor: QTensor, **tensors: Tensor):
        super().__init__()
        self.scheme, self.shape = qtensor.scheme, qtensor.shape
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def joined(cls, parts: "Sequence[PackedWeight]", dimensions: dict[str, int]) -> "Self":
        """The output features of all parts, one after the other: of each buffer, along this dimension."""
        whole = cls.__new__(cls)
        nn.Module.__init__(whole)
        whole.scheme, whole.shape = parts[0].scheme, (sum(part.shape[0] for part in parts), parts[0].shape[1])
        for name, dimension in dimensions.items():
            whole.register_buffer(
                name, torch.cat([part.get_buffer(name) for part in parts], dimension), persistent=False
            )
        return whole


class Kernel(Protocol):
    """One way to compute x @ dequantized_weight.T + bias. Kernels derive from this class.

    rank: the place among the kernels, lower (faster) first. serves: the schemes that it can multiply by; what is not
    listed it refuses. input_bits: to how many bits it rounds the inputs of schemes that leave them alone, ordinary ones
    and outliers among them; None: it leaves them alone too. only_calls_library: it is another library's operator, and
    little else.
    last_resort: it serves everything, slowly, and no benchmark times it unless asked to. package: what must be
    installed for it, and is imported when a weight needs it; "" for nothing.
    """

    rank: ClassVar[int]
    name: ClassVar[str]
    serves: ClassVar[tuple[Serves, ...]]
    input_bits: ClassVar[tuple[int, int] | None] = None
    only_calls_library: ClassVar[bool] = False
    last_resort: ClassVar[bool] = False
    package: ClassVar[str] = ""

    def unsupported(self, qtensor: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot serve inputs of this dtype on this device, in a few words; None if it can."""

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> PackedWeight:
        """Repack once, at load. `qtensor` has passed check() and is on its device already."""
        raise NotImplementedError

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """x [..., in_features] floating -> [..., out_features] in x's dtype."""
        raise NotImplementedError

    def packed_form(self) -> str | None:
        """The name of the layout that `pack` makes on this machine; None where packed weights are not kept in files.

        Two kernels, or two versions of one, that name the same layout read each other's packed weights.
        """
        return None

    def restore(self, qtensor: QTensor, tensors: Mapping[str, Tensor]) -> PackedWeight:
        """The packed weight of the buffers that `pack` made once, read from a file that nobody vouches for.

        Whatever they hold, `linear` then reads nothing outside of them: their values may be wrong, as a file's may.

        Args:
            qtensor: the weight's scheme and shape, without content.
        Raises:
            ValueError: they are not those of such a weight.
        """
        raise ValueError(f"{self.name} keeps no packed weights")

    def join(self, parts: Sequence[PackedWeight]) -> PackedWeight | None:
        """One packed weight of several of one scheme and number of input features, their output features one after the
        other; None where these cannot be one."""
        return None

    def exact(self) -> "Kernel | None":
        """A kernel that reads the same packed weight and leaves inputs alone; None if this one does, or there is
        none."""
        return None

    def pending(self, device: torch.device) -> str | None:
        """What its first use on this device does before it can compute, in words: it compiles; None for nothing."""
        return None

    def about(self) -> str | None:
        """What else is worth knowing of it on this machine, such as its instruction set; None if nothing."""
        return None

    def unserved(self, scheme: Scheme) -> str | None:
        """Why `serves` does not have this scheme; None if it has."""
        if any(each.covers(scheme) for each in self.serves):
            return None
        words = [each.words for each in self.serves]
        return f"serves {' and '.join([', '.join(words[:-1]), words[-1]] if len(words) > 1 else words)} only"
