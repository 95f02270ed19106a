"""Finds plug-ins: every module of a plug-in folder says in `PLUGINS` what it adds."""

import functools
import importlib
import pkgutil
from typing import Any


@functools.cache
def discover(package: str) -> tuple[Any, ...]:
    """The plug-ins of a package of ours, such as "bitpress.pipeline.methods", by rank (lower first), then by name.

    Each module of the package is imported; the plug-ins are what stands in its `PLUGINS`.
    """
    names = [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    plugins = [plugin for module in modules for plugin in getattr(module, "PLUGINS", ())]
    return tuple(sorted(plugins, key=lambda plugin: (plugin.rank, plugin.name)))
