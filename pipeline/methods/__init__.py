"""Quantization algorithms: one file each, registered here by name."""

from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import ValidationError

from bitpress.kernels.scheme import Scheme

from ..errors import nearest
from .base import Method


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
