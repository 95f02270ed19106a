"""Finds plug-ins: every module of a folder names its own in `PLUGINS = (…)`, and no list elsewhere has to be edited."""

import functools
import importlib
import pkgutil
from typing import Any


@functools.cache
def discover(package: str) -> tuple[Any, ...]:
    """The plug-ins of all modules of a package, by `rank` (lower first), then by name.

    A module without `PLUGINS` is a helper of the others. Names with an underscore in front are left alone: a compiled
    library that is no Python module lies there too. Nothing outside of the package is looked at.

    Args:
        package: one of bitpress's own packages, such as "bitpress.kernels.weights".
    """
    paths = importlib.import_module(package).__path__
    names = [module.name for module in pkgutil.iter_modules(paths) if not module.name.startswith("_")]
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    plugins = [plugin for module in modules for plugin in getattr(module, "PLUGINS", ())]
    return tuple(sorted(plugins, key=lambda plugin: (plugin.rank, _name(plugin))))


def _name(plugin: Any) -> str:
    """A class stands for all its values, whose names differ: it is sorted by its own name."""
    return plugin.__name__ if isinstance(plugin, type) else plugin.name
