"""Quantization algorithms, one file each; every file says in `PLUGINS` which methods it adds."""

from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import ValidationError

from bitpress.kernels.discovery import discover
from bitpress.kernels.scheme import Scheme

from ..errors import nearest
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


def options_of(method: Method) -> dict[str, Any]:
    """The options of a method and their values; {} for a method that has none."""
    return {field.name: getattr(method, field.name) for field in fields(method)} if is_dataclass(method) else {}


def with_options(method: Method, options: dict[str, Any]) -> Method:
    """The method with these options in place of its defaults; the method itself where there are none.

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
            return type(method)(**options) if options else method
    except ValidationError as error:
        problems = [f"{item['loc'][0]}: {item['msg']}, got {item['input']!r}" for item in error.errors()]
    raise ValueError("\n".join(problems))
