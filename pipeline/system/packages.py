"""Optional packages: whether they are there, and how to get them."""

import re
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec


def unsupported(package: str) -> str | None:
    """Why a package cannot be used, and what to type; None if it is installed.

    Args:
        package: as pip calls it, such as "lm-eval".
    """
    if find_spec(package.replace("-", "_")) is not None:
        return None
    return f"the {package} package is not installed; pip install {_wanted(package)}"


def _wanted(package: str) -> str:
    """What pip is to install: the extra of bitpress that holds the package alone, or else the package itself."""
    try:
        lines = requires("bitpress") or []
    except PackageNotFoundError:  # bitpress itself runs from its sources
        return package
    extras: dict[str, list[str]] = {}
    for line in lines:
        if match := re.fullmatch(r"([\w.-]+).*;.*extra == [\"']([\w-]+)[\"'].*", line):
            extras.setdefault(match[2], []).append(match[1])
    return next((f"'bitpress[{extra}]'" for extra, names in extras.items() if names == [package]), package)
