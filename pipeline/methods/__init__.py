"""Quantization algorithms, one file each; every file says in `PLUGINS` which methods it adds."""

from typing import Any

from bitpress.kernels.discovery import discover
from bitpress.kernels.scheme import Scheme

from ..config import options
from .base import Method


def registry() -> dict[str, Method]:
    """All methods by name, in the order of their ranks."""
    return {method.name: method for method in discover(__name__)}


def default_method(scheme: Scheme) -> Method:
    """The first method, by rank, that can produce a scheme."""
    return next(method for method in registry().values() if not method.problems(scheme))


def uncalibrated_method(scheme: Scheme) -> Method | None:
    """The first method, by rank, that can produce a scheme and needs no calibration; None if there is none."""
    fitting = (method for method in registry().values() if not method.problems(scheme))
    return next((method for method in fitting if not method.needs_calibration), None)


def with_options(method: Method, chosen: dict[str, Any]) -> Method:
    """The method with these options in place of its defaults; the method itself where there are none.

    Raises:
        ValueError: everything that is wrong with them, one sentence per line.
    """
    changed, faults = options.with_options(method, chosen)
    unknown = f"{method.name} has no option"
    if faults:
        sentences = (
            f"{each.option}: {each.reason}" if each.known else f"{unknown} {each.option!r}{each.reason}"
            for each in faults
        )
        raise ValueError("\n".join(sentences))
    return changed
