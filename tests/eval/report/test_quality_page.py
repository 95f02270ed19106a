"""The page of quality against size: fronts, ratios at equal bytes, and the same figures in all three forms."""

import math

import pytest

from bitpress.eval.report.quality_page import Row, at_equal_bytes, html, markdown, plain, program_front, table

ABOUT = {
    "model": {"id": "org/<b>model</b>", "revision": None},
    "calibration": {"text": "wiki", "windows": 4},
    "protocol": {"name": "gptq", "context": 16},
    "machine": {"cpu": "a | b"},
    "command": "bitpress bench quality org/model",
}


def row(program: str, recipe: str, bits: float, kl: float) -> Row:
    return Row(program, recipe, {program: "1.0"}, int(bits * 1000), bits, kl, kl / 10, seconds={"quantize": 1.0})


ROWS = [
    row("bitpress", "int2", 2.0, 0.16),
    row("bitpress", "int4", 4.0, 0.01),
    row("bitpress", "worse", 4.5, 0.02),
    row("peer", "three", 3.0, 0.08),
    row("peer", "five", 5.0, 0.005),
    row("peer", "one", 1.0, 1.0),
    Row("peer", "eight", problem="no | luck"),
]


def test_a_front_leaves_out_what_is_beaten():
    assert [one.recipe for one in program_front(ROWS, "bitpress")] == ["int2", "int4"]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("three", 0.08 / math.sqrt(0.16 * 0.01)),  # halfway in bits: the geometric mean
        ("five", 0.005 / 0.01),  # above the largest, the largest counts
        ("one", None),  # nothing of ours is as small
    ],
)
def test_the_ratio_is_to_the_front_at_the_same_bits(recipe: str, expected: float | None):
    one = next(each for each in ROWS if each.recipe == recipe)
    assert at_equal_bytes(ROWS, one) == (expected and pytest.approx(expected))


def test_ours_have_no_ratio():
    assert at_equal_bytes(ROWS, ROWS[2]) is None


def test_the_table_is_in_the_order_of_bits():
    header, cells = table(ROWS)
    assert [line[0] for line in cells] == ["one", "int2", "three", "int4", "worse", "five"]
    assert cells[2][header.index("KL to bitpress")] == "2.00x"
    assert {len(line) for line in cells} == {len(header)}


def test_all_forms_have_the_figures_and_what_failed():
    page, text, data = html(ABOUT, ROWS), markdown(ABOUT, ROWS), plain(ABOUT, ROWS)
    for form in (page, text):
        assert "its KL is 0.50x to 2.00x that of bitpress" in form
        assert "it is ahead with five" in form
    assert "org/&lt;b&gt;model" in page
    assert "<svg" in page
    assert "no \\| luck" in text
    assert [one["kl_to_bitpress"] is None for one in data["rows"]] == [True, True, True, False, False, True, True]


def test_the_plot_names_every_row_in_whole():
    crowd = [row("bitpress", f"awq-{bits}bits-embeddings8", bits, 0.1 / bits) for bits in (2.6, 3.125, 4.125, 5.5)]
    crowd += [row(f"peer{index}", "int4-g128", 5.2, 0.02 + 0.003 * index) for index in range(3)]
    page = html(ABOUT, crowd)
    assert [page.count(f">{part}<") for part in ("embeddings8", "awq-2.6bits-", "awq-3.125bits-")] == [4, 1, 1]
    assert page.count(">int4-g128</text>") == 3


def test_a_page_without_any_figure():
    assert "<svg" not in html(ABOUT, [ROWS[-1]])
    assert html(ABOUT, ROWS) == html(ABOUT, ROWS)
