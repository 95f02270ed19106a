"""Quantization algorithms: one file each, registered here by name."""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..errors import nearest
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


def registry() -> dict[str, Method]:
    """Methods by name; the first that can produce a scheme is its default."""
    from .absmax import Absmax
    from .gptq import GPTQ
    from .nf4 import NF4

    return {method.name: method for method in (Absmax(), NF4(), GPTQ())}


def default_method(scheme: Scheme) -> Method:
    return next(method for method in registry().values() if not method.problems(scheme))


def options_of(method: Method) -> dict[str, Any]:
    """The options of a method and their values; {} for a method that has none."""
    return {field.name: getattr(method, field.name) for field in fields(method)} if is_dataclass(method) else {}


def with_options(method: Method, options: dict[str, Any]) -> Method:
    """The method with these options in place of its defaults.

    Raises:
        ValueError: everything that is wrong with them, one sentence per line.
    """
    known = options_of(method)
    problems = [
        f"{method.name} has no option {name!r}"
        + (nearest(name, known) or (f"; it has {', '.join(known)}" if known else "; it has none"))
        for name in options
        if name not in known
    ]
    try:
        if not problems:
            return type(method)(**options)
    except ValidationError as error:
        problems = [f"{item['loc'][0]}: {item['msg']}, got {item['input']!r}" for item in error.errors()]
    raise ValueError("\n".join(problems))
