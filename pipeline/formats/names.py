r"""Names of layers, and the patterns of names that quantization configs hold.

Readers of these formats match by `re.match`. A config may come from anywhere, and some patterns take a regular
expression engine for ever. So patterns are matched here by a small matcher of its own, whose time is bounded by
(length of the name) x (length of the pattern). It knows what configs use: literal text, escaped characters, `.`, `\d`,
`\w`, sets such as [0-9], each of them alone or with +, * or ?, and groups of alternatives such as (q_proj|k_proj).
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Generic, TypeVar

Value = TypeVar("Value")

_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")
_MOST_PATTERNS = 4096  # each is tried on every layer
_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")
_ONE = r"\\[dw]|\\[^\w\s]|\.|\[[^\[\]\\]+\]|[\w\-/ ]"  # one character of the name: a class, an escaped one, any, a set
_LITERAL = re.compile(r"(?:\\([^\w\s])|([\w\-/ ]))")
_ITEM = re.compile(rf"(?P<one>{_ONE})(?P<times>[+*?]?)|\((?:\?:)?(?P<group>[^()]*)\)|(?P<end>\$)")


def fused_unit(layer: str) -> str:
    """The name of what vLLM and SGLang make of this layer and its neighbours, which must have one scheme.

    q, k and v become "….qkv_proj", gate and up "….gate_up_proj", all experts of a block "….experts"; another layer is
    its own unit.
    """
    if expert := _EXPERT.fullmatch(layer):
        return expert[1]
    parent, dot, leaf = layer.rpartition(".")
    return f"{parent}{dot}{_FUSED.get(leaf, leaf)}"


@dataclass(frozen=True)
class NamePattern:
    """A pattern that matches from the beginning of a name, as `re.match` does.

    items: a literal text; or a set of characters with the least and the most times it may come (None: any number); or
        alternatives, each a literal text; or the end of the name.
    """

    text: str
    items: tuple[str | tuple[re.Pattern[str], int, bool] | frozenset[str] | None, ...]

    @property
    def literal(self) -> str | None:
        """The only name that matches; None where there are several."""
        return self.items[0] if len(self.items) == 2 and isinstance(self.items[0], str) and not self.items[1] else None

    def match(self, name: str) -> bool:
        places = {0}  # where in the name the rest of the pattern may begin
        for item in self.items:
            if item is None:
                places = places & {len(name)}
            elif isinstance(item, str):
                places = {place + len(item) for place in places if name.startswith(item, place)}
            elif isinstance(item, frozenset):
                places = {place + len(text) for place in places for text in item if name.startswith(text, place)}
            else:
                places = _repeated(name, places, *item)
            if not places:
                return False
        return True


def _repeated(name: str, places: set[int], characters: re.Pattern[str], least: int, more: bool) -> set[int]:
    """Where a set of characters that comes so many times may end; each character of the name is looked at once."""
    after = set() if least else set(places)
    reached = set(places)
    for place in range(min(places), len(name)):
        if place in reached and characters.match(name, place):
            after.add(place + 1)
            if more:
                reached.add(place + 1)
    return after


@cache
def name_pattern(text: str) -> NamePattern:
    """The pattern of a text in the syntax of Python's `re`.

    Raises:
        ValueError: it uses what is not matched here (see above).
    """
    items: list[str | tuple[re.Pattern[str], int, bool] | frozenset[str] | None] = []
    place = 1 if text.startswith("^") else 0
    while place < len(text):
        item = _ITEM.match(text, place)
        if item is None:
            raise ValueError(f"the pattern {text[:80]!r} is not of the kinds that are read")
        place = item.end()
        if item["end"]:
            items.append(None)
        elif item["one"]:
            character = _LITERAL.fullmatch(item["one"])
            if character and not item["times"]:
                letter = character[1] or character[2]
                last = items[-1] if items else None
                if isinstance(last, str):
                    items[-1] = last + letter
                else:
                    items.append(letter)
                continue
            try:
                characters = re.compile(item["one"])
            except re.error as error:
                raise ValueError(f"the pattern {text[:80]!r} is no regular expression: {error}") from error
            items.append((characters, 0 if item["times"] in ("*", "?") else 1, item["times"] in ("+", "*")))
        else:
            words = [_LITERAL.sub(lambda m: m[1] or m[2], word) for word in item["group"].split("|")]
            plain = all(_LITERAL.sub("", word) == "" for word in item["group"].split("|"))
            if not plain or text[place : place + 1] in ("+", "*", "?", "{"):
                raise ValueError(f"the pattern {text[:80]!r} is not of the kinds that are read: groups hold plain text")
            items.append(frozenset(words))
    return NamePattern(text, tuple(items))


def exactly(name: str) -> str:
    """The pattern that only this name matches."""
    return f"^{_escaped(name)}$"


def _escaped(text: str) -> str:
    return re.sub(r"[^\w\-/ ]", r"\\\g<0>", text)


@dataclass
class NameRules(Generic[Value]):
    """Values of layers by their names: of an exact name, else of the first pattern that matches, else `otherwise`."""

    otherwise: Value | None = None
    names: dict[str, Value] = field(default_factory=dict)
    patterns: list[tuple[NamePattern, Value]] = field(default_factory=list)

    def add_name(self, name: str, value: Value) -> None:
        """Give a name its value; where it has one, that stays."""
        self.names.setdefault(name, value)

    def add_pattern(self, text: str, value: Value) -> None:
        """A pattern in the syntax of `re`, after those that were added before.

        Raises:
            ValueError: it is not of the kinds that are matched here, or one too many.
        """
        pattern = name_pattern(text)
        if pattern.literal is not None and not self.patterns:
            self.add_name(pattern.literal, value)
        elif len(self.patterns) >= _MOST_PATTERNS:
            raise ValueError(f"more than {_MOST_PATTERNS} patterns of names")
        else:
            self.patterns.append((pattern, value))

    def add(self, entry: str, value: Value) -> None:
        """A name, or a pattern after "re:". Raises ValueError as add_pattern does."""
        if entry.startswith("re:"):
            self.add_pattern(entry[3:], value)
        else:
            self.add_name(entry, value)

    def get(self, name: str) -> Value | None:
        if name in self.names:
            return self.names[name]
        return next((value for pattern, value in self.patterns if pattern.match(name)), self.otherwise)


def patterns_of(names: Collection[str], others: Iterable[str]) -> list[str]:
    r"""Few patterns, ^…$, that match all of these names and none of the others.

    Names that differ in their numbers only share a pattern: ^model\.layers\.(0|3)\.mlp\.down_proj$, with \d+ where no
    other name stands against it.
    """
    templates: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for name in dict.fromkeys(names):
        templates[tuple(_NUMBER.split(name)[::2])].append(tuple(_NUMBER.findall(name)))
    against = {tuple(_NUMBER.split(name)[::2]) for name in others}
    patterns = []
    for texts, rows in templates.items():
        choices = _choices(rows) if texts in against else [(r"\d+",) * (len(texts) - 1)]
        for choice in choices:
            numbers = (rf"\.{number}" for number in choice)
            patterns.append(
                f"^{_escaped(texts[0])}{''.join(n + _escaped(text) for n, text in zip(numbers, texts[1:]))}$"
            )
    return patterns


def _choices(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows of numbers as few rows of alternatives: first numbers that have the same rests after them stand together."""
    if not rows or not rows[0]:
        return [()] if rows else []
    rests: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for first, *rest in rows:
        rests[first].append(tuple(rest))
    alike: dict[frozenset[tuple[str, ...]], list[str]] = defaultdict(list)
    for first, after in rests.items():
        alike[frozenset(after)].append(first)
    return [
        (firsts[0] if len(firsts) == 1 else f"({'|'.join(firsts)})", *choice)
        for firsts in alike.values()
        for choice in _choices(rests[firsts[0]])
    ]
