"""The versions of everything that can change a result."""

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("bitpress", "torch", "transformers", "safetensors", "accelerate", "bitsandbytes", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed; and Python's."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
