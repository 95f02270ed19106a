"""What a type of quantized key-value cache says about itself."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

Codes = Mapping[str, Tensor]


class CacheType(Protocol):
    """How the keys and values of a decoder's attention are kept for later tokens.

    Keys are rounded as they are read by attention, after they were rotated; values as they are. `states` stands for
    either: [batch, heads, tokens, dim], where heads are those of keys and values.

    rank: the place among the types, lower first. forms: how names look, for messages. examples: common names.
    dynamic: scales are computed from the states as they come, and nothing is stored with the model; the others are
    StaticCacheType.
    """

    rank: ClassVar[int]
    forms: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]
    dynamic: ClassVar[bool]

    @property
    def name(self) -> str:
        """The name that `parse` reads."""

    @classmethod
    def parse(cls, name: str) -> "Self | None":
        """The type of this name; None if it is not of this form.

        Raises:
            ValueError: the form is right, and a value is impossible.
        """

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Self | None":
        """The type that compressed-tensors' `kv_cache_scheme` describes; None if it is not this one."""

    def description(self) -> dict[str, Any]:
        """As compressed-tensors' `kv_cache_scheme` describes it."""

    def problems(self, dim: int) -> list[str]:
        """Why heads of `dim` features cannot be coded; [] if they can."""

    def encode(self, states: Tensor, scale: Tensor | None) -> Codes:
        """What is kept of states: tensors [batch, heads, tokens, …], so that tokens can be added.

        Args:
            scale: as StaticCacheType's `scale` made it; None where the type is dynamic.
        """

    def decode(self, codes: Codes, scale: Tensor | None) -> Tensor:
        """The states that these codes stand for, float32 [batch, heads, tokens, dim]."""


class StaticCacheType(CacheType, Protocol):
    """A type whose scales are calibrated, and stored with the model."""

    def layout(self, heads: int) -> tuple[tuple[int, ...], tuple[torch.dtype, ...]]:
        """The shape of a layer's scale of its keys, and that of its values, and the dtypes that they may have."""

    def check(self, scale: Tensor) -> None:
        """Refuse values that are out of range; shape and dtype are right already.

        Raises:
            ValueError: says which value, and its range.
        """

    def scale(self, peaks: Tensor) -> Tensor:
        """What is stored of a layer's keys, or its values.

        Args:
            peaks: the largest magnitude of each head, float32 [heads].
        """


def scale_of(peaks: Tensor, largest: float) -> Tensor:
    """Scales by which the peaks become the largest code; 1 where all is 0, or nearly so."""
    scales = peaks.to(torch.float32) / largest
    return torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.ones_like(scales))


def check_scale(scale: Tensor) -> None:
    """Raise ValueError unless all scales are positive numbers."""
    wide = scale.to(torch.float32)
    if bad := wide[~((wide > 0) & wide.isfinite())].tolist():
        raise ValueError(f"holds {bad[0]}, expected positive numbers")


def matches(description: Mapping[str, Any], own: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether a kv_cache_scheme says what `own` says; what it leaves out has a default."""
    return all({**defaults, **description}.get(key) == value for key, value in own.items())


DEFAULTS: Mapping[str, Any] = {"type": "int", "symmetric": True, "dynamic": False}  # of a kv_cache_scheme
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
