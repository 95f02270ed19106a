"""Options that several commands have, and what they make of a recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script to read.")]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of the Hub.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Windows = Annotated[int | None, typer.Option(help="How many windows of it; 128 by default.")]
Context = Annotated[int | None, typer.Option(help="Tokens per window; 2048 by default.")]
Seed = Annotated[str | None, typer.Option(help="Draws the windows; 0 by default, null for the text's first ones.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
KernelName = Annotated[str, typer.Option("--kernel", help="auto, or one of `bitpress list`.")]
BudgetText = Annotated[
    str | None,
    typer.Option("--budget", help="In place of a recipe: 4.25bits per weight, or 4.1GB of the whole artifact."),
]
Choices = Annotated[
    list[str] | None, typer.Option("--choice", help="A scheme for a budget to choose from, or none; may be repeated.")
]
Keep = Annotated[
    Path | None, typer.Option("--keep", help="A folder that keeps a budget's statistics and solutions, for others.")
]
DEFAULT_RECIPE = "int4-g128"


def recipe_keys(recipe: str | None, budget: str | None, choices: list[str] | None) -> dict[str, Any]:
    """The keys of a recipe that is typed, see load_typed_recipe, or of a budget and choices.

    Raises:
        ConfigError: the recipe is none, or it and the budget both say what becomes of a layer.
    """
    from ..config.load import load_typed_recipe
    from ..errors import ConfigError

    if budget is None:
        parts = load_typed_recipe(recipe or DEFAULT_RECIPE).model_dump(exclude_unset=True)
    elif recipe:
        raise ConfigError(f"--recipe {recipe} and --budget {budget}: a budget chooses the schemes; give one of the two")
    else:
        parts = {"budget": budget}
    return parts | ({"choices": choices} if choices else {})


def calibration_keys(text: str | None, windows: int | None, context: int | None, seed: str | None) -> dict[str, Any]:
    """The key of a recipe for its calibration, as far as it is given."""
    from ..config.load import load_options

    keys = {"text": text, "windows": windows, "context": context}
    named = {key: value for key, value in keys.items() if value is not None}
    named |= load_options([f"seed={seed}"] if seed else [])
    return {"calibration": named} if named else {}
