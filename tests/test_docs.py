"""README and docs/: the reference is what the program says, and the examples can be read."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.main import get_command

from bitpress.pipeline import api
from bitpress.pipeline.cli.app import app
from bitpress.pipeline.config import schema
from bitpress.pipeline.config.budget import Budget
from bitpress.pipeline.config.load import load_recipe
from bitpress.pipeline.formats import registry as formats
from bitpress.pipeline.quantize.spec import LayerSpec

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SECTIONS = {
    "The file": schema.Run,
    "models": schema.Model,
    "recipes, and defaults of all of them": schema.RecipeSettings,
    "calibration": schema.Calibrate,
    "a data set": schema.Dataset,
    "eval": schema.Eval,
    "eval.speed": schema.Speed,
    "cpu": schema.Cpu,
    "gates": schema.Gates,
    "publish": schema.Publish,
}


def commands() -> dict[str, set[str]]:
    """Command -> its options, as `--help` shows them."""
    found: dict[str, set[str]] = {}
    left = [("bitpress", get_command(app))]
    while left:
        name, command = left.pop()
        if children := getattr(command, "commands", None):
            left += [(f"{name} {child}", children[child]) for child in children]
        else:
            found[name] = {option for param in command.params for option in param.opts if option.startswith("-")}
    return found


COMMANDS = commands()


def section(page: str, title: str) -> str:
    """The text under a heading ### of a page of docs/."""
    text = (DOCS / page).read_text(encoding="utf-8").partition(f"### {title}\n")[2]
    return re.split(r"^##", text, maxsplit=1, flags=re.MULTILINE)[0]


def examples() -> Iterator[tuple[str, str]]:
    """Page and text of each indented block of README and docs/."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"(?:^|\n)\n((?: {4}.*\n(?:\n(?= {4}))?)+)", text):
            yield page.relative_to(ROOT).as_posix(), textwrap.dedent(block)


EXAMPLES = list(examples())


def test_readme_is_two_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r": (\S+\.md)$", menu, re.MULTILINE)) == [
        page.relative_to(DOCS).as_posix() for page in PAGES[1:]
    ]


@pytest.mark.parametrize("title", SECTIONS)
def test_keys_and_defaults_are_those_of_the_schema(title: str):
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section("reference/config.md", title), re.MULTILINE))
    fields = SECTIONS[title].model_fields
    assert list(rows) == list(fields)
    for name, field in fields.items():
        default = field.default
        if field.is_required():
            assert rows[name] == "required", name
        elif isinstance(default, str | int | float):
            shown = str(default).lower() if isinstance(default, bool) else str(default)
            assert rows[name] == f"`{shown}`", name


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_those_of_the_command_line(command: str):
    shown = re.findall(r"^\| ((?:`-[^`]+`(?:, )?)+) \|", section("reference/cli.md", command), re.MULTILINE)
    assert {option for cell in shown for option in re.findall(r"`(-[^`]+)`", cell)} == COMMANDS[command]


def test_examples_are_found():
    assert len(EXAMPLES) > 20


def typed_commands() -> Iterator[tuple[str, str, bool]]:
    """Page, each command line of bitpress in it, and whether it is whole: in the text there are excerpts."""
    for page, text in EXAMPLES:
        for line in text.splitlines():
            if line.startswith("bitpress "):
                yield page, line.partition(" #")[0], True
    for page in PAGES:
        for typed in re.findall(r"`(bitpress [^`]*)`", page.read_text(encoding="utf-8")):
            yield page.relative_to(ROOT).as_posix(), typed.replace("\\|", "|"), False


@pytest.mark.parametrize(("page", "typed", "whole"), sorted(set(typed_commands())))
def test_commands_are_commands(page: str, typed: str, whole: bool):
    """The command line itself reads them: commands, options, types. Brackets mean what may be left out."""
    words = shlex.split(re.sub(r" \| --?[\w-]+", "", re.sub(r"[\[\]…]", " ", typed)))[1:]
    if words in (["--version"], ["--help"], ["--install-completion"]):
        return
    group = get_command(app)
    context = group.make_context("bitpress", [], resilient_parsing=True)
    command = group
    while words and (inner := getattr(command, "commands", {}).get(words[0])):
        command, words = inner, words[1:]
    assert command is not group, f"{page}: {typed}: there is no such command"
    values = command.make_context(typed, list(words), parent=context, resilient_parsing=not whole).params
    recipes = values.get("recipe") or []
    for recipe in recipes if isinstance(recipes, list) else [recipes]:
        assert load_recipe(recipe).spec, f"{page}: {typed}"
    for rule in values.get("layer") or []:
        assert LayerSpec.parse(rule.partition("=")[2]) or rule.endswith("=none"), f"{page}: {typed}"
    if isinstance(budget := values.get("budget"), str):
        assert Budget.parse(budget), f"{page}: {typed}"
    assert values.get("format") in (None, "auto", *formats()), f"{page}: {typed}"


@pytest.mark.parametrize(
    ("page", "text"), [example for example in EXAMPLES if re.search("^recipes:", example[1], re.MULTILINE)]
)
def test_configs_are_configs(page: str, text: str):
    config = YAML(typ="safe").load(text)
    models = config.pop("models", [{"id": "builtin:demo"}])
    assert schema.Run(**{"name": "example", "models": models, **config}).recipes, page


def test_the_worked_example_of_affine_quantization():
    """What docs/concepts.md shows follows from its formulas."""
    page = (DOCS / "concepts.md").read_text(encoding="utf-8")
    rows = [
        [float(cell) for cell in row.strip("| ").split("|")]
        for row in re.findall(r"^\| +-?\d+\.\d+ \|.*$", page, re.MULTILINE)
    ]
    first, second = [row for row in rows if len(row) == 6], [row for row in rows if len(row) == 4]
    assert (len(first), len(second)) == (6, 4)
    for group, weight, code in ((first, 0, 3), (second, 0, 2)):
        weights = [row[weight] for row in group]
        low, high = min(*weights, 0.0), max(*weights, 0.0)
        scale = (high - low) / 15
        zero = round(-low / scale)
        for row in group:
            q = min(max(round(row[weight] / scale) + zero, 0), 15)
            assert row[code] == q
            assert row[code + 1] == pytest.approx(scale * (q - zero), abs=5e-5)


RECOMMENDED = r"`((?:\w+\+)?(?:gptq/)?(?:int\d-g\d+|nvfp4|mxfp4|fp8-dynamic|nf4|nf4-dq|int8|int8-dynamic))`"


@pytest.mark.parametrize(
    "recipe", sorted(set(re.findall(RECOMMENDED, (DOCS / "recipes.md").read_text(encoding="utf-8"))))
)
def test_recipes_that_are_recommended_exist(recipe: str):
    assert load_recipe(recipe).spec


WITH_PYTHON = sorted({page for page, text in EXAMPLES if re.search("^(import|from) ", text, re.MULTILINE)})


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs(page: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A page's blocks in order, on a tiny model and without calibration text; but for what measures and publishes."""
    monkeypatch.chdir(tmp_path)
    replaced = {
        "Qwen/Qwen2.5-0.5B": str(tiny_llama),
        "gptq/int4-g128": "int4-g32",
        "int8-g128": "int8-g32",
        "import bitpress\n": "import bitpress.pipeline as bitpress\n",
        "from bitpress import": "from bitpress.pipeline import",
        'device_map="auto"': 'device_map="cpu"',
    }
    blocks = [text for where, text in EXAMPLES if where == page and re.search("^(import|from) ", text, re.MULTILINE)]
    if not any("quantize(" in text for text in blocks):
        api.quantize(tiny_llama, "int4-g32", "qwen-int4")
    names: dict[str, object] = {}
    for text in blocks:
        for old, new in replaced.items():
            text = text.replace(old, new)
        kept = [line for line in text.splitlines() if not re.match(r"bitpress\.(evaluate|publish)\(", line)]
        exec(compile("\n".join(kept), page, "exec"), names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"
