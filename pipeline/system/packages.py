"""Optional packages: whether they are there, and how to get them."""

import re
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

REPOSITORY = "https://github.com/bitpress/bitpress"


def unsupported(package: str) -> str | None:
    """Why a package cannot be used, and what to type; None if it is installed.

    Args:
        package: as pip calls it, such as "lm-eval".
    """
    if find_spec(package.replace("-", "_")) is not None:
        return None
    return f"the {package} package is not installed; {install(package)}"


def install(package: str) -> str:
    """What to type to install a package, in the versions that bitpress is tested with."""
    try:
        lines = requires("bitpress") or []
    except PackageNotFoundError:  # bitpress itself runs from its sources
        lines = []
    for line in lines:
        requirement = line.partition(";")[0].strip()
        if re.fullmatch(rf"{re.escape(package)}[^\w.-].*", requirement):
            return f"pip install '{requirement}'"
    return f"pip install {package}"


def install_bitpress() -> str:
    """What to type to install this version of bitpress, from its repository: the name on the index is not ours."""
    return f"pip install git+{REPOSITORY}@v{version('bitpress')}"
