"""Plug-ins of a folder: what the modules of one of our packages list as `PLUGINS`."""

import importlib
import pkgutil
from functools import cache
from typing import Any


@cache
def discover(package: str) -> tuple[Any, ...]:
    """The plug-ins of every module of a package of ours, sorted by their `rank`, then by their name."""
    folder = importlib.import_module(package)
    modules = [importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(folder.__path__)]
    plugins = [plugin for module in modules for plugin in getattr(module, "PLUGINS", ())]
    return tuple(sorted(plugins, key=lambda plugin: (plugin.rank, plugin.name)))
