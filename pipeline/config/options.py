"""Options of plug-ins, which are dataclasses of pydantic: the fields are the options."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from ..errors import nearest

Plugin = TypeVar("Plugin")


@dataclass(frozen=True)
class OptionFault:
    """What is wrong with an option.

    known: whether the plug-in has it. reason: of a known one why its value is refused; else what to take instead, in
    words that follow a sentence.
    """

    option: str
    known: bool
    reason: str


def options_of(plugin: Any) -> dict[str, Any]:
    """The options of a plug-in and their values; {} for one that has none."""
    return {field.name: getattr(plugin, field.name) for field in fields(plugin)} if is_dataclass(plugin) else {}


def with_options(plugin: Plugin, options: Mapping[str, Any]) -> tuple[Plugin, list[OptionFault]]:
    """The plug-in with these options in place of its defaults, itself where there are none; and all their faults."""
    known = options_of(plugin)
    faults = [
        OptionFault(name, False, nearest(name, known) or (f"; it has {', '.join(known)}" if known else "; it has none"))
        for name in options
        if name not in known
    ]
    if faults or not options:
        return plugin, faults
    try:
        return type(plugin)(**options), []
    except ValidationError as error:
        wrong = error.errors()
    return plugin, [OptionFault(str(e["loc"][0]), True, f"{e['msg']}, got {e['input']!r}") for e in wrong]
