"""How the jobs of a run are carried out: one file for each executor."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import ValidationError

from bitpress.kernels.discovery import discover

from ...errors import ConfigError, nearest
from .base import Executor


def registry() -> dict[str, Executor]:
    """Name -> executor, in the order of their ranks."""
    return {executor.name: executor for executor in discover(__name__)}


def executor(name: str, options: Mapping[str, Any] | None = None) -> Executor:
    """The executor of this name, with these options in place of its defaults.

    Raises:
        ConfigError: there is none, or everything that is wrong with the options.
    """
    executors = registry()
    if name not in executors:
        hint = nearest(name, executors) or f"; use one of {', '.join(executors)}"
        raise ConfigError(f"executor {name!r} is unknown{hint}")
    chosen = executors[name]
    if not options:
        return chosen
    known: list[str] = [field.name for field in fields(chosen)] if is_dataclass(chosen) else []
    problems = [
        f"executor_options.{key}: {name} has no such option"
        + (nearest(key, known) or (f"; it has {', '.join(known)}" if known else "; it has none"))
        for key in options
        if key not in known
    ]
    try:
        if not problems:
            return type(chosen)(**options)
    except ValidationError as error:
        problems = [f"executor_options.{e['loc'][0]}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
    raise ConfigError("; ".join(problems))
