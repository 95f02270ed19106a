"""How the jobs of a run are carried out: one file for each executor."""

from collections.abc import Mapping
from typing import Any

from bitpress.kernels.discovery import discover

from ...config.options import with_options
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
    changed, faults = with_options(chosen, options or {})
    if faults:
        raise ConfigError(
            "; ".join(
                f"executor_options.{fault.option}: "
                + (fault.reason if fault.known else f"{name} has no such option{fault.reason}")
                for fault in faults
            )
        )
    return changed
