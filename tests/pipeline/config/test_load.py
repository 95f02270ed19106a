"""A config is refused with everything that is wrong with it, where it stands, and what was probably meant."""

import contextlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitpress.pipeline.config.load import load_calibration, load_eval, load_options, shipped
from bitpress.pipeline.config.load import load_config as load_config_file
from bitpress.pipeline.config.schema import Dataset, Run, TrainingSet
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.quantize.recipe import Recipe, problems

load_config = partial(load_config_file, check_recipe=problems)
CONFIGS = Path(__file__).resolve().parents[3] / "configs"
GOOD = """\
name: trial
models:
  - id: org/name
recipes: [int4-g128]
defaults:
  layers: {"*.down_proj": none}
eval:
  context: 512
  speed: {prompt: 16, generate: 4, batch: [1]}
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path, overrides: list[str] | None = None) -> list[str]:
    """The lines of the refusal, without its heading."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    heading, *lines = str(caught.value).splitlines()
    assert heading == f"{path} cannot be used:"
    return [line.strip() for line in lines]


def test_good_one(tmp_path: Path):
    run = load_config(write(tmp_path, GOOD))
    assert (run.name, run.models[0].id, run.recipes[0].scheme) == ("trial", "org/name", "int4-g128")
    assert run.recipes[0].layers == {"*.down_proj": "none"}
    assert (run.recipes[0].label, run.eval.context, run.eval.kernel) == ("int4-g128-mixed", 512, "auto")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path):
    assert load_config(path).models
    assert path.read_text().startswith("# bitpress run "), "a config opens with the command that runs it"


def test_shipped_by_name():
    assert shipped()["demo"].samefile(CONFIGS / "demo.yaml")
    assert load_config(Path("demo")).name == "demo"


CASES = [
    # what stands there, what stands there instead, the line's number, what is said
    ("models:", "model:", 2, "model: unknown key; did you mean models?"),
    ("- id:", "- idd:", 3, "models.0.idd: unknown key; did you mean id?"),
    ("defaults:", "default:", 5, "default: unknown key; did you mean defaults?"),
    ("context:", "contxt:", 8, "eval.contxt: unknown key; did you mean context?"),
    ("generate:", "genrate:", 9, "eval.speed.genrate: unknown key; did you mean generate?"),
    ("name: trial", "name: trial\nzzz: 1", 2, "zzz: unknown key"),
    ("name: trial", "name: 7", 1, "name: Input should be a valid string, got 7"),
    ("name: trial", "name: ../x", 1, "name: String should match pattern"),
    ("name: trial", "name:", 1, "name: Input should be a valid string, got None"),
    ("- id: org/name", "- id: ''", 3, "models.0.id: String should have at least 1 character, got ''"),
    ("- id: org/name", "- org/name", 3, "models.0: expected keys and values (id, revision), got 'org/name'"),
    ("context: 512", "context: true", 8, "eval.context: Input should be a valid integer, got True"),
    ("context: 512", "context: '512'", 8, "eval.context: Input should be a valid integer, got '512'"),
    ("context: 512", "context: 5.5", 8, "eval.context: Input should be a valid integer, got 5.5"),
    ("context: 512", "context: 1", 8, "eval.context: Input should be greater than or equal to 2, got 1"),
    ("context: 512", "windows: 0", 8, "eval.windows: Input should be greater than or equal to 1, got 0"),
    ("context: 512", "dtype: fp32", 8, "eval.dtype: Input should be 'auto', 'float32'"),
    ("context: 512", "speed: fast", 8, "eval.speed: expected keys and values (prompt, generate, batch, repeats)"),
    ("batch: [1]", "batch: []", 9, "eval.speed.batch: List should have at least 1 item"),
    ("batch: [1]", "batch: [0]", 9, "eval.speed.batch: batch sizes must be at least 1"),
    ("batch: [1]", "batch: [true]", 9, "eval.speed.batch.0: Input should be a valid integer, got True"),
    ("batch: [1]", "repeats: 1001", 9, "eval.speed.repeats: Input should be less than or equal to 1000"),
    ("[int4-g128]", "[]", 4, "recipes: List should have at least 1 item"),
    ("[int4-g128]", "int4-g128", 4, "recipes: Input should be a valid list, got 'int4-g128'"),
    ("[int4-g128]", "[int4-g128, int4g128]", 4, "recipes.1.scheme: 'int4g128' is not a scheme; use int{2,3,4,8}"),
    ("[int4-g128]", "[int4g128]", 4, "did you mean int4-g128?"),
    ("[int4-g128]", "[int5-g128]", 4, "bits must be one of 2, 3, 4, 8"),
    ("[int4-g128]", "[int4-g0]", 4, "recipes.0.scheme: group_size 0 is not a positive number"),
    ("[int4-g128]", "[nf5]", 4, "did you mean nf4?"),
    ("[int4-g128]", "[nf4, nf4]", 4, "recipes: several recipes are called nf4-mixed; give each a name"),
    ("layers:", "method: absmx\n  layers:", 6, "defaults.method: method 'absmx' is unknown; did you mean absmax?"),
    ("layers:", "method: zzz\n  layers:", 6, "defaults.method: method 'zzz' is unknown; use auto or one of absmax, "),
    ("layers:", "format: gptqq\n  layers:", 6, "defaults.format: format 'gptqq' is unknown; did you mean gptq?"),
    ("layers:", "format: true\n  layers:", 6, "defaults.format: Input should be a valid string, got True"),
    ("context:", "kernel: referense\n  context:", 8, "eval.kernel: unknown kernel; did you mean reference?"),
    ('{"*.down_proj": none}', '"*.down_proj"', 6, "defaults.layers: Input should be a valid dictionary"),
    ("context:", "text: {datset: a}\n  context:", 8, "eval.text.datset: unknown key; did you mean dataset?"),
    ("context:", "text: 5\n  context:", 8, "eval.text: Input should be a valid string, got 5"),
    ("name: trial", "name: trial\ndevice: gpu", 2, "device: Input should be 'auto', 'cpu' or 'cuda', got 'gpu'"),
    ("name: trial", "name: trial\nname: again", 2, 'found duplicate key "name"'),
    ("context: 512", "context: 512\n  context: 64", 9, 'found duplicate key "context"'),
]


@pytest.mark.parametrize(("old", "new", "line", "said"), CASES, ids=[case[1].replace("\n", " ") for case in CASES])
def test_one_fault(tmp_path: Path, old: str, new: str, line: int, said: str):
    assert GOOD.count(old) == 1
    lines = refused(write(tmp_path, GOOD.replace(old, new)))
    assert any(text.startswith(f"line {line}: ") and said in text for text in lines), lines


def test_missing_keys(tmp_path: Path):
    assert refused(write(tmp_path, "name: x\n")) == ["models: is missing", "recipes: is missing"]


def test_everything_at_once_in_the_order_of_the_file(tmp_path: Path):
    text = """\
name: trial
models:
  - {id: 3, revison: main}
recipes: [int4-g12b, nf5]
defaults: {method: absmx, format: gtpq}
eval:
  kernel: referense
  context: yes please
  windows: true
  windows: 3
speeed: 1
"""
    lines = refused(write(tmp_path, text), ["eval.promt=x", "bogus", "models.7.id=a"])
    starts = [
        "line 10: found duplicate key",
        "--set bogus: expected key=value",
        "--set models.7.id=a: there is no models.7.id to set",
        "line 3: models.0.id: Input should be a valid string, got 3",
        "line 3: models.0.revison: unknown key; did you mean revision?",
        "line 5: defaults.format: format 'gtpq' is unknown; did you mean gptq?",
        "line 5: defaults.method: method 'absmx' is unknown; did you mean absmax?",
        "line 6: eval.promt: unknown key; did you mean prompt?",
        "line 7: eval.kernel: unknown kernel; did you mean reference?",
        "line 8: eval.context: Input should be a valid integer, got 'yes please'",
        "line 9: eval.windows: Input should be a valid integer, got True",
        "line 11: speeed: unknown key",
    ]
    assert len(lines) == len(starts), lines
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start), (line, start)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("eval.windows=10", ("eval", "windows"), 10),
        ("eval.windows=null", ("eval", "windows"), None),
        ("name=other", ("name",), "other"),
        ("recipes=[nf4, none]", ("recipes", 0, "scheme"), "nf4"),
        ("models.0.revision=main", ("models", 0, "revision"), "main"),
        ("models.0.id=a/b=c", ("models", 0, "id"), "a/b=c"),
        ("eval.speed=null", ("eval", "speed"), None),
        ("eval.speed.repeats=7", ("eval", "speed", "repeats"), 7),
        ("defaults.max_fallback_layers=3", ("recipes", 0, "max_fallback_layers"), 3),
        ("output=elsewhere", ("output",), "elsewhere"),
        ("eval.text.dataset=wikitext", ("eval", "text"), Dataset(dataset="wikitext")),
    ],
)
def test_set(tmp_path: Path, override: str, path: tuple[Any, ...], value: Any):
    found: Any = load_config(write(tmp_path, GOOD), [override])
    for part in path:
        found = found[part] if isinstance(part, int) else getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("eval.windows", "--set eval.windows: expected key=value, such as eval.windows=10"),
        ("=3", "--set =3: expected key=value"),
        ("eval.windws=10", "eval.windws: unknown key; did you mean windows?"),
        ("evil.windows=10", "evil: unknown key; did you mean eval?"),
        ("eval.windows=ten", "eval.windows: Input should be a valid integer, got 'ten'"),
        ("eval.windows=[", "there is no eval.windows to set"),
        ("models.3.id=x", "there is no models.3.id to set"),
        ("models.x.id=x", "there is no models.x.id to set"),
        ("name.first=x", "there is no name.first to set"),
        ("defaults.method=gptqq", "defaults.method: method 'gptqq' is unknown"),
    ],
)
def test_set_refused(tmp_path: Path, override: str, said: str):
    lines = refused(write(tmp_path, GOOD), [override])
    assert any(said in line for line in lines), lines


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: expected keys and values"),
        ("# nothing\n", "line 1: expected keys and values"),
        ("- a\n- b\n", "line 1: expected keys and values"),
        ("just words", "line 1: expected keys and values"),
        ("name: [1, 2\nmodels: x", "line 2: not YAML"),
        ("name: x\n\tmodels: y", "line 2: not YAML"),
        ("name: x\n---\nname: y\n", "not YAML"),
        ("name: *nobody\n", "line 1: not YAML: found undefined alias"),
        ("name: \0", "not YAML"),
        ("[" * 1000, "nested too deeply"),
    ],
    ids=["empty", "comment", "list", "words", "bracket", "tab", "two", "alias", "nul", "deep"],
)
def test_not_a_config(tmp_path: Path, text: str, said: str):
    assert any(said in line for line in refused(write(tmp_path, text)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: write(folder, b"name: \xff\xfe\n"), "not UTF-8 text"),
        (lambda folder: folder / "missing.yaml", "No such file"),
        (lambda folder: folder, "Is a directory"),
    ],
    ids=["not UTF-8", "missing", "folder"],
)
def test_unreadable(tmp_path: Path, make: Any, reason: str):
    with pytest.raises(ConfigError, match=rf"{reason}.*; shipped configs are .*demo"):
        load_config(make(tmp_path))


def test_aliases_are_fine(tmp_path: Path):
    text = GOOD.replace("context: 512", "context: &n 512\n  windows: *n")
    run = load_config(write(tmp_path, text))
    assert (run.eval.context, run.eval.windows) == (512, 512)


def test_tags_make_no_objects(tmp_path: Path):
    canary = tmp_path / "canary"
    text = GOOD.replace("trial", f'!!python/object/apply:pathlib.Path.touch ["{canary}"]')
    assert refused(write(tmp_path, text))
    assert not canary.exists()


@given(st.text(max_size=80) | st.binary(max_size=80))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_config_or_refused(tmp_path: Path, text: str | bytes):
    data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    path = write(tmp_path, GOOD.encode() + b"output: " + data)
    with contextlib.suppress(ConfigError):
        assert isinstance(load_config(path), Run)


def test_eval_settings_by_themselves():
    assert load_eval({"windows": 3}).windows == 3
    with pytest.raises(ConfigError, match=re.escape("windws: unknown key; did you mean windows?")):
        load_eval({"windws": 3})


class TestRecipes:
    """Recipes, their defaults, and what goes with them; the method `student` has two options."""

    def with_section(self, folder: Path, section: str, recipes: str = "[int4-g128]") -> Path:
        old = 'defaults:\n  layers: {"*.down_proj": none}'
        assert old in GOOD
        return write(folder, GOOD.replace(old, f"defaults:\n{section}").replace("[int4-g128]", recipes))

    def test_defaults(self, tmp_path: Path):
        [found] = load_config(write(tmp_path, GOOD)).recipes
        assert (found.options, found.calibration, found.max_fallback_layers) == ({}, None, 0)
        text = TrainingSet(dataset="Salesforce/wikitext", config="wikitext-2-raw-v1", split="train")
        chosen = load_calibration({})
        assert (chosen.text, chosen.windows, chosen.context, chosen.seed) == (text, 128, 2048, 0)

    @pytest.mark.usefixtures("student")
    def test_good_one(self, tmp_path: Path):
        section = """\
  method: student
  options: {damping: 1e-3, order: activation}
  max_fallback_layers: 2
  calibration: {text: {dataset: org/chat, column: messages}, windows: 64, context: 512, seed: null}"""
        [found] = load_config(self.with_section(tmp_path, section)).recipes
        assert (found.options, found.max_fallback_layers) == ({"damping": 1e-3, "order": "activation"}, 2)
        assert found.calibration is not None
        assert found.calibration.text == TrainingSet(dataset="org/chat", split="train", column="messages")
        assert (found.calibration.windows, found.calibration.context, found.calibration.seed) == (64, 512, None)

    def test_methods_side_by_side_and_a_mixture(self, tmp_path: Path):
        recipes = """
  - absmax/int4-g128
  - gptq/int4-g128
  - name: careful
    method: gptq
    scheme: int4-g128
    layers: {"*.down_proj": int8-g128, "model.layers.0.*": none, "lm_head": absmax/int8-channel}
    options: {passes: 0}"""
        run = load_config(self.with_section(tmp_path, "  calibration: a.txt", recipes))
        assert [recipe.label for recipe in run.recipes] == ["absmax-int4-g128", "gptq-int4-g128", "careful"]
        assert {recipe.calibration.text for recipe in run.recipes if recipe.calibration} == {"a.txt"}
        rules = Recipe.make(run.recipes[2]).rules
        specs = {name: rules.spec(name) for name in ("model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj")}
        assert [spec.name if spec else None for spec in specs.values()] == ["gptq/int8-g128", None]
        assert [spec.name for spec in rules.specs()] == ["gptq/int4-g128", "gptq/int8-g128", "absmax/int8-channel"]
        assert rules.default.method.passes == 0

    @pytest.mark.usefixtures("student")
    @pytest.mark.parametrize(
        ("section", "line", "said"),
        [
            ("  calibration: {windws: 1}", 6, "defaults.calibration.windws: unknown key; did you mean windows?"),
            (
                "  calibration:\n    windows: 0",
                7,
                "defaults.calibration.windows: Input should be greater than or equal",
            ),
            ("  calibration: {context: 1}", 6, "defaults.calibration.context: Input should be greater than or equal"),
            ("  calibration: {seed: -1}", 6, "defaults.calibration.seed: Input should be greater than or equal to 0"),
            ("  calibration: {seed: x}", 6, "defaults.calibration.seed: Input should be a valid integer, got 'x'"),
            ("  calibration: {text: 5}", 6, "defaults.calibration.text: Input should be a valid string, got 5"),
            ("  calibration: {text: {dataset: a, colum: b}}", 6, "text.colum: unknown key; did you mean column?"),
            ("  calibration: 5", 6, "defaults.calibration: expected keys and values (text, windows, context, seed)"),
            (
                "  max_fallback_layers: -1",
                6,
                "defaults.max_fallback_layers: Input should be greater than or equal to 0",
            ),
            ("  max_fallback_layer: 1", 6, "unknown key; did you mean max_fallback_layers?"),
            ("  options: {damping: 1}", 6, "defaults.options: these are options of one method, and method is auto"),
            ("  options: 5", 6, "defaults.options: Input should be a valid dictionary, got 5"),
            (
                "  method: student\n  options:\n    order: plain\n    dampin: 1",
                9,
                "defaults.options.dampin: student has no option 'dampin'; did you mean damping?",
            ),
            (
                "  method: student\n  options:\n    damping: 0",
                8,
                "defaults.options.damping: Input should be greater than 0, got 0",
            ),
            ("  method: absmax\n  options: {a: 1}", 7, "options.a: absmax has no option 'a'; it has none"),
            ("  layers: {'*.o_proj': int5-g2}", 6, "defaults.layers.*.o_proj: int5 is not a scheme: bits must be one"),
            ("  layers: {'*.o_proj': studnt/nf4}", 6, "method 'studnt' is unknown; did you mean student?"),
            ("  layers: {'*.o_proj': student/nf4}", 6, "student rounds to nearest, which nf4 does not define"),
            ("  layers: {'*.o_proj': 4}", 6, "defaults.layers.*.o_proj: Input should be a valid string, got 4"),
        ],
    )
    def test_one_fault(self, tmp_path: Path, section: str, line: int, said: str):
        lines = refused(self.with_section(tmp_path, section))
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"line {line}: "), lines
        assert said in lines[0], lines

    @pytest.mark.usefixtures("student")
    def test_with_all_the_others(self, tmp_path: Path):
        section = """\
  method: student
  options: {damping: -1, ordr: plain}
  max_fallback_layers: x
  calibration: {windows: 0}"""
        path = self.with_section(tmp_path, section, "[int4-g128, {scheme: nf5, method: auto}]")
        starts = [
            "line 4: recipes.1.scheme: 'nf5' is not a scheme",
            "line 7: defaults.options.damping: Input should be greater than 0, got -1",
            "line 7: defaults.options.ordr: student has no option 'ordr'; did you mean order?",
            "line 8: defaults.max_fallback_layers: Input should be a valid integer, got 'x'",
            "line 9: defaults.calibration.windows: Input should be greater than or equal to 1, got 0",
        ]
        lines = refused(path)
        assert len(lines) == len(starts), lines
        assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines

    @pytest.mark.usefixtures("student")
    def test_a_method_that_cannot_make_a_scheme(self, tmp_path: Path):
        path = self.with_section(tmp_path, "  method: student", "[int4-g128, none, nf4]")
        [line] = refused(path, ["eval.windows=3"])
        assert line.startswith("line 6: defaults.method: student rounds to nearest, which nf4 does not define"), line

    def test_a_format_that_cannot_hold_a_scheme(self, tmp_path: Path):
        [line] = refused(self.with_section(tmp_path, "  format: gptq", "[int4-g128, nf4]"))
        assert line.startswith("line 6: defaults.format: gptq holds weight-only integers, not nf4"), line

    def test_calibration_of_the_defaults_is_for_those_who_need_it(self, tmp_path: Path):
        assert load_config(self.with_section(tmp_path, "  calibration: {text: a.txt}"))
        recipe = "[{scheme: int4-g128, calibration: {text: a.txt}}]"
        [line] = refused(self.with_section(tmp_path, "  fit_groups: true", recipe))
        assert line.startswith("line 4: recipes.0.calibration: no method of the recipe is calibrated"), line

    @pytest.mark.parametrize(
        ("recipe", "name"),
        [("int4-g128", "int4-g128"), ("gptq/int4-g128", "gptq-int4-g128"), ("{scheme: nf4, name: x}", "x")],
    )
    def test_names(self, tmp_path: Path, recipe: str, name: str):
        text = GOOD.replace('defaults:\n  layers: {"*.down_proj": none}\n', "").replace("[int4-g128]", f"[{recipe}]")
        assert load_config(write(tmp_path, text)).recipes[0].label == name

    def test_by_itself(self):
        assert load_calibration("a.txt").text == "a.txt"
        assert load_calibration({"seed": None}).seed is None
        with pytest.raises(ConfigError, match=re.escape("windws: unknown key; did you mean windows?")):
            load_calibration({"windws": 3})

    def test_options(self):
        found = load_options(["damping=1e-3", "order=plain", "on=true", "name=a=b", "none="])
        assert found == {"damping": 1e-3, "order": "plain", "on": True, "name": "a=b", "none": None}
        for wrong in ("damping", "=1", ""):
            with pytest.raises(ConfigError, match=re.escape(f"{wrong}: expected key=value, such as damping=1e-3")):
                load_options([wrong])
        with pytest.raises(ConfigError, match=re.escape("a=[: the value is not YAML")):
            load_options(["a=["])


@pytest.mark.parametrize("text", ["models: &a [*a]", "models: &a {id: *a}", "name: &a [*a]"])
def test_an_alias_that_holds_itself_is_refused(tmp_path: Path, text: str):
    assert refused(write(tmp_path, text))
