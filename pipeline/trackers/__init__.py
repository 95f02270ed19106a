"""Experiment trackers that the figures of a run are sent to: one file each, which registers itself by PLUGINS."""

from collections.abc import Sequence

from bitpress.kernels.discovery import discover

from ..errors import ConfigError, nearest
from .base import Tracker


def registry() -> dict[str, Tracker]:
    """Name -> tracker, in the order of their ranks."""
    return {tracker.name: tracker for tracker in discover(__name__)}


def trackers(names: Sequence[str]) -> list[Tracker]:
    """The trackers of these names.

    Raises:
        ConfigError: there is none of a name, or its package is not installed.
    """
    known = registry()
    for name in names:
        if name not in known:
            hint = nearest(name, known) or f"; use one of {', '.join(known)}"
            raise ConfigError(f"track: {name!r} is unknown{hint}")
        if reason := known[name].unsupported():
            raise ConfigError(f"track: {reason}")
    return [known[name] for name in names]
