"""What every on-disk format is."""

from typing import Any, Protocol

import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.integer import Integer


class Format(Protocol):
    """How one layer's QTensor lies in safetensors, and what config.json says of it.

    name: as configs call it. marker: the suffix of the tensor that every quantized layer has and no other has.
    suffixes: of all tensors that a layer may have, `marker` among them (the bias is not the format's).
    quant_method, tags: what config.json calls it, `tags` under "checkpoint_format" or "format".
    holds_order: whether it can say in what order the inputs were quantized (see QTensor.order).
    """

    @property
    def name(self) -> str: ...
    @property
    def quant_method(self) -> str: ...
    @property
    def tags(self) -> tuple[str, ...]: ...
    @property
    def marker(self) -> str: ...
    @property
    def suffixes(self) -> tuple[str, ...]: ...
    @property
    def holds_order(self) -> bool: ...

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        """Why a weight [out, in] of this scheme cannot be stored so; [] if it can."""

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """What scales are stored in, for a checkpoint of `dtype`; codes are computed from scales so rounded."""

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """suffix -> tensor."""

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        """The inverse of write.

        Raises:
            ValueError, KeyError: the tensors are not a layer of this scheme.
        """

    def quantization_config(self, scheme: Scheme, kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
        """For config.json; `kept` names the linear layers that are not quantized."""

    def scheme(self, config: dict[str, Any]) -> Scheme:
        """From a quantization_config.

        Raises:
            ValueError: it describes something that bitpress does not read.
        """


def integer_scheme(bits: Any, group_size: Any, symmetric: Any) -> Scheme:
    """A weight-only integer scheme from a config's values, which may be anything.

    Raises:
        ValueError: they are not of their types, or no scheme.
    """
    require(type(bits) is int, f"bits is {bits!r}, expected a whole number")
    require(group_size is None or type(group_size) is int, f"group_size is {group_size!r}, expected a whole number")
    require(isinstance(symmetric, bool), f"symmetric is {symmetric!r}, expected true or false")
    return Scheme(Integer(bits, group_size, symmetric))


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds: the check of untrusted tensors."""
    if not condition:
        raise ValueError(message)
