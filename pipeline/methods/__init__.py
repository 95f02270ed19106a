"""Quantization algorithms: one file each, registered here by name."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme


@dataclass(frozen=True)
class Diagnostics:
    """What quantizing one weight did to it.

    relative_error: ||W - W'|| / ||W||, Frobenius norms; 0 for a weight of zeros.
    """

    relative_error: float


class Method(Protocol):
    """One algorithm. `version` goes up whenever the same input would give other bytes."""

    name: str
    version: int
    needs_calibration: bool

    def problems(self, scheme: Scheme) -> list[str]:
        """Why the method cannot produce this scheme; [] if it can."""

    def quantize(self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[QTensor, Diagnostics]:
        """weight [out, in], bfloat16, float16 or float32, finite -> its codes and what they cost.

        Raises:
            ValueError: the values do not fit, such as a scale beyond float16's range.
        """


def registry() -> dict[str, Method]:
    """Methods by name; the first that can produce a scheme is its default."""
    from .absmax import Absmax
    from .nf4 import NF4

    return {method.name: method for method in (Absmax(), NF4())}


def default_method(scheme: Scheme) -> Method:
    return next(method for method in registry().values() if not method.problems(scheme))
