"""The configs that come with bitpress."""

from importlib.util import find_spec
from pathlib import Path


def shipped() -> dict[str, Path]:
    """The configs that come with bitpress, by name."""
    spec = find_spec("bitpress.configs")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return {path.stem: path for folder in folders for path in sorted(Path(folder).glob("*.yaml"))}
