import json

import pytest

from bitpress.kernels.scheme import Scheme

NAMES = [
    *(f"int{bits}-{tail}" for bits in (2, 3, 4, 8) for tail in ("g32", "g128-asym", "channel", "channel-asym")),
    "int8-dynamic",
    "nf4",
    "nf4-dq",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_name_round_trips(name: str) -> None:
    scheme = Scheme.parse(name)
    assert scheme.name == name
    assert Scheme.parse(json.loads(json.dumps(scheme.to_dict()))["name"]) == scheme


@pytest.mark.parametrize(
    "name", ["", "int4", "INT4-g128", "int4-g", "int4-g-128", "int4-g128-sym", "nf4-g64", "int8-dynamic "]
)
def test_unknown_name_lists_the_forms(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not a scheme; use int\{2,3,4,8\}-g"):
        Scheme.parse(name)


@pytest.mark.parametrize(
    ("name", "word"), [("int5-g128", "bits must be one of 2, 3, 4, 8"), ("int4-g0", "group_size 0")]
)
def test_impossible_values_are_named(name: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Scheme.parse(name)


def test_middle_and_largest_code() -> None:
    assert [(s.middle, s.max_code) for s in map(Scheme.parse, ("int2-g32", "int3-g32", "int4-g32", "int8-g32"))] == [
        (2, 3), (4, 7), (8, 15), (128, 255),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("int4-g128", (7, 256), None),
        ("int4-channel", (7, 131), None),
        ("nf4", (7, 131), None),
        ("int4-g128", (7, 192), "in_features 192 is not divisible by group_size 128; use 64 or 32"),
        ("int4-g128", (7, 131), "in_features 131 is not divisible by group_size 128; use int4-channel"),
        ("int4-g128", (7,), "has 1 dimensions [7], expected 2"),
        ("nf4", (0, 64), "is empty: shape [0, 64]"),
    ],
)
def test_problems(name: str, shape: tuple[int, ...], problem: str | None) -> None:
    assert Scheme.parse(name).problems(shape) == ([] if problem is None else [problem])


def test_groups() -> None:
    assert Scheme.parse("int4-g32").groups(96) == 3
    assert Scheme.parse("int4-channel").groups(96) == 1
