"""What every quantization method is."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from .hessian import Hessian


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


class Method(Protocol):
    """One algorithm. `version` goes up whenever the same input would give other bytes.

    A method with options is a pydantic dataclass, its fields the options.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def needs_calibration(self) -> bool: ...

    def problems(self, scheme: Scheme) -> list[str]:
        """Why the method cannot produce this scheme; [] if it can."""

    def quantize(
        self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, hessian: Hessian | None = None
    ) -> tuple[QTensor, Diagnostics]:
        """weight [out, in], bfloat16, float16 or float32, finite -> its codes and what they cost.

        Args:
            hessian: of the layer's inputs, for a method that needs calibration.

        Raises:
            ValueError: the values do not fit, such as a scale beyond float16's range.
        """
