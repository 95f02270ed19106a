"""The versions of everything that can change a result."""

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("bitpress", "torch", "transformers", "safetensors", "accelerate", "bitsandbytes", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed; and Python's."""
    return dict(_installed())


@functools.cache  # reading them takes 4 ms, and each job asks several times
def _installed() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def releases() -> dict[str, str]:
    """Package -> major and minor version, of those that are installed; and Python's.

    A patch release mends and promises the same results; what a newer release computes may differ.
    """
    return {name: ".".join(text.split(".")[:2]) for name, text in versions().items()}
