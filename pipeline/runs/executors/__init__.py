"""How the jobs of a run are carried out: one file for each executor."""

from bitpress.kernels.discovery import discover

from ...errors import ConfigError, nearest
from .base import Executor


def registry() -> dict[str, Executor]:
    """Name -> executor, in the order of their ranks."""
    return {executor.name: executor for executor in discover(__name__)}


def executor(name: str) -> Executor:
    """The executor of this name.

    Raises:
        ConfigError: there is none.
    """
    executors = registry()
    if name not in executors:
        hint = nearest(name, executors) or f"; use one of {', '.join(executors)}"
        raise ConfigError(f"executor {name!r} is unknown{hint}")
    return executors[name]
