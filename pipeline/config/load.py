"""YAML and --set -> a checked Run."""

from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from ..errors import ConfigError, listing
from .messages import Problem, explained
from .schema import Calibrate, Eval, RecipeDefaults, RecipeSettings, Run
from .shipped import shipped

Section = TypeVar("Section", bound=BaseModel)
CheckRecipe = Callable[[RecipeSettings], list[Problem]]


def load_config(path: Path, overrides: list[str] | None = None, check_recipe: CheckRecipe | None = None) -> Run:
    """Read and check a config file.

    Args:
        path: a file, or the name of a shipped config such as "demo".
        overrides: "key.path=value", the value in YAML; lists by number, as in models.0.id=org/name.
        check_recipe: what is wrong with a recipe's settings, as far as methods and formats know.
    Raises:
        ConfigError: everything that is wrong with the file and the overrides, at once.
    """
    if not path.exists() and str(path) in shipped():
        path = shipped()[str(path)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: {reason}; shipped configs are {', '.join(shipped())}") from error
    data, problems = _parse(text)
    if data is None:
        raise ConfigError(f"{path} cannot be used:\n{listing(problems)}")
    for override in overrides or []:
        problems += _override(data, override)
    try:
        plain = _plain(data)
        fault: ValidationError | None = None
        try:
            run = Run.model_validate(plain)
        except ValidationError as error:
            fault = error
        more = _recipe_problems(plain, fault, check_recipe) if check_recipe else []
        problems += explained(fault, data, Run, more=more)
    except RecursionError:
        problems.append("nested too deeply, or an alias that holds itself")
    if problems:
        raise ConfigError(f"{path} cannot be used:\n{listing(problems)}")
    return run


def _recipe_problems(data: Any, fault: ValidationError | None, check: CheckRecipe) -> list[Problem]:
    """What `check` finds wrong with the recipes, as far as their keys are well-formed, so that all is told at once.

    Args:
        data: the file's plain values. fault: what pydantic finds wrong with them.
    """
    broken = {error["loc"][:length] for error in (fault.errors() if fault else []) for length in (2, 3)}

    def sound(values: Any, *path: int | str) -> dict[str, Any]:
        known = values if isinstance(values, dict) else {}
        return {key: value for key, value in known.items() if (*path, key) not in broken}

    if not isinstance(data, dict) or not isinstance(data.get("recipes"), list):
        return []
    defaults = RecipeDefaults.model_validate(sound(data.get("defaults"), "defaults"))
    problems: list[Problem] = []
    for number, recipe in enumerate(data["recipes"]):
        values = recipe if isinstance(recipe, str) else sound(recipe, "recipes", number)
        if values and (isinstance(values, str) or {"scheme", "budget"} & values.keys()):
            settings = RecipeSettings.model_validate(values).with_defaults(defaults)
            for path, sentence in check(settings):
                inherited = bool(path) and settings.inherits(str(path[0])) and path[0] in data["defaults"]
                problems.append((("defaults", *path) if inherited else ("recipes", number, *path), sentence))
    return list(dict.fromkeys(problems))


def load_eval(settings: dict[str, Any]) -> Eval:
    """An eval section given as plain values.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    return _section(Eval, settings, ("eval",))


def load_calibration(settings: str | dict[str, Any]) -> Calibrate:
    """A recipe's calibration section given as plain values, or as its text alone.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    values = settings if isinstance(settings, dict) else {"text": settings}
    return _section(Calibrate, values, ("defaults", "calibration"))


def calibration_of(settings: RecipeSettings) -> Calibrate:
    """A recipe's calibration section, or the usual one where it has none."""
    return settings.calibration or load_calibration({})


def _section(kind: type[Section], settings: Any, path: tuple[str, ...]) -> Section:
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        problems = explained(error, CommentedMap(), Run, path)
        raise ConfigError(f"these settings cannot be used:\n{listing(problems)}") from error


def load_recipe(settings: str | Mapping[str, Any] | RecipeSettings) -> RecipeSettings:
    """A recipe given as text, such as "gptq/int4-g128", or as plain values.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    return _section(RecipeSettings, settings, ("recipes",))


def load_typed_recipe(text: str) -> RecipeSettings:
    """A recipe as it is typed: in a word, "gptq/int4-g128", or with its keys, "{scheme: int4-g128, distill: 100}".

    Raises:
        ConfigError: everything that is wrong with it.
    """
    if not text.lstrip().startswith("{"):
        return load_recipe(text)
    try:
        return load_recipe(YAML(typ="safe").load(text))
    except YAMLError as error:
        raise ConfigError(f"{text}: expected keys of a recipe in YAML, such as {{scheme: int4-g128}}") from error


def load_options(assignments: list[str]) -> dict[str, Any]:
    """Options typed as "key=value", the values in YAML, such as "damping=1e-3".

    Raises:
        ConfigError: one is no such thing.
    """
    options = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        try:
            options[key] = YAML(typ="safe").load(value)
        except YAMLError as error:
            raise ConfigError(f"{assignment}: the value is not YAML") from error
        if not equals or not key:
            raise ConfigError(f"{assignment}: expected key=value, such as damping=1e-3")
    return options


def load_layers(assignments: list[str]) -> dict[str, str]:
    """Rules typed as "pattern=[method/]scheme", such as "*.down_proj=int8-g128".

    Raises:
        ConfigError: one is no such thing.
    """
    layers = {}
    for assignment in assignments:
        pattern, equals, spec = assignment.partition("=")
        if not equals or not pattern or not spec:
            raise ConfigError(f"--layer {assignment}: expected pattern=scheme, such as '*.down_proj=int8-g128'")
        layers[pattern] = spec
    return layers


def _parse(text: str) -> tuple[CommentedMap | None, list[str]]:
    problems: list[str] = []
    parser = YAML(typ="rt")
    try:
        try:
            data = parser.load(StringIO(text))
        except DuplicateKeyError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            problems.append(f"line {line}: {str(error.problem).split(' with value')[0]}")
            parser = YAML(typ="rt")
            parser.allow_duplicate_keys = True
            data = parser.load(StringIO(text))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        return None, [*problems, f"{where}not YAML: {getattr(error, 'problem', None) or error}"]
    except RecursionError:
        return None, [*problems, "nested too deeply"]
    if not isinstance(data, CommentedMap):
        return None, ["line 1: expected keys and values, such as 'name: demo'"]
    return data, problems


def _plain(value: Any) -> Any:
    """ruamel's annotated values as plain ones, which strict pydantic wants."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _override(data: CommentedMap, override: str) -> list[str]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        return [f"--set {override}: expected key=value, such as eval.windows=10"]
    node: Any = data
    *path, last = key.split(".")
    try:
        for part in path:
            if isinstance(node, CommentedMap) and part not in node:
                node[part] = CommentedMap()
            node = node[int(part)] if isinstance(node, CommentedSeq) else node[part]
        node[int(last) if isinstance(node, CommentedSeq) else last] = YAML(typ="safe").load(value)
    except (ValueError, IndexError, TypeError, KeyError, YAMLError):
        return [f"--set {override}: there is no {key} to set"]
    return []
