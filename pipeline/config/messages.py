"""What pydantic finds wrong with a config -> sentences, each with its line, its path and the nearest name."""

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from ..errors import nearest

Problem = tuple[tuple[int | str, ...], str]  # the path to a key, and a sentence


class Several(ValueError):
    """Problems, each with the path from where this is raised to what is wrong."""

    def __init__(self, problems: list[Problem]):
        super().__init__("; ".join(message for _, message in problems))
        self.problems = problems


def _fields(root: type[BaseModel], path: tuple[int | str, ...]) -> Iterator[str]:
    """The keys that may stand at a path."""
    kind: Any = root
    for part in path:
        if isinstance(part, int):
            continue
        field = kind.model_fields.get(part) if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        kind = next((m for m in _models(field.annotation) if m), None) if field else None
    if kind is not None:
        yield from kind.model_fields


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)


def _line(data: Any, path: tuple[int | str, ...]) -> int | None:
    """The line of the deepest part of a path that stands in the file; None for what --set brought."""
    line = None
    for part in path:
        if (isinstance(data, CommentedMap) and part in data) or (
            isinstance(data, CommentedSeq) and isinstance(part, int) and part < len(data)
        ):
            position = data.lc.data.get(part) if data.lc.data else None
        else:
            return line
        line = position[0] + 1 if position else line
        data = data[part]
    return line


_UNION_TAGS = {"str", "Dataset", "TrainingSet", "int", "none"}


def _other_branch(item: Any) -> bool:
    """Whether a complaint is about what a value is not meant to be, where it may be a string or a mapping."""
    if not any(part in ("str", "Dataset", "TrainingSet") for part in item["loc"]):
        return False
    return item["type"] == ("string_type" if isinstance(item["input"], dict) else "model_type")


def _located(data: CommentedMap, path: tuple[int | str, ...], message: str) -> tuple[int, str]:
    line, dotted = _line(data, path), ".".join(map(str, path))
    return line or 0, f"line {line}: {dotted}: {message}" if line else f"{dotted}: {message}"


def explained(
    error: ValidationError | None,
    data: CommentedMap,
    root: type[BaseModel],
    base: tuple[str, ...] = (),
    more: Sequence[Problem] = (),
) -> list[str]:
    """Sentences in the order of the file.

    Args:
        data: what was validated, with the lines of where it stands; empty where it came from no file.
        root: the model of a whole file. base: where in that `data` would stand.
        more: what else is wrong, as far as pydantic cannot know.
    """
    problems = [_located(data, path, message) for path, message in more]
    for item in error.errors() if error else []:
        if _other_branch(item):
            continue
        path = tuple(part for part in item["loc"] if part not in _UNION_TAGS or part in data)
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, Several):
            problems += [_located(data, path + inner, said) for inner, said in cause.problems]
            continue
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key" + nearest(str(path[-1]), _fields(root, base + path[:-1]))
        elif item["type"] == "missing":
            message = "is missing"
        elif item["type"] == "model_type":
            message = f"expected keys and values ({', '.join(_fields(root, base + path))}), got {item['input']!r}"
        elif not isinstance(item["input"], dict | list) and repr(item["input"]) not in message:
            message = f"{message}, got {item['input']!r}"
        problems.append(_located(data, path, message))
    return [text for _, text in sorted(problems)]
