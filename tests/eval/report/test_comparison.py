"""Runs side by side: the front, what chance explains, the choice, and pages that hold the same and trust nothing."""

import json
import math
import random
import re

import pytest

from bitpress.eval.report import comparison_page
from bitpress.eval.report import words as wording
from bitpress.eval.report.comparison import Incomparable, between, compare, front
from bitpress.eval.report.recommend import Budget

GB = 1e9
WINDOWS, TOKENS = 16, 100


def run(scheme="none", gb=16.0, kl=None, decode=50.0, **changes):
    """A run of 16 windows of 100 tokens; `kl` is the mean of every window, or that of each."""
    each = [kl] * WINDOWS if isinstance(kl, float) else kl
    metrics = {
        "format_version": 2,
        "name": "test",
        "model": {"id": "org/model", "revision": None},
        "scheme": scheme,
        "method": None if scheme == "none" else "absmax",
        "format": None if scheme == "none" else "gptq",
        "protocol": {"name": "gptq-2048", "text": "wiki", "text_sha256": "ab", "context": 2048, "dtype": "bfloat16"},
        "quality": {"perplexity": 10.0, "kl_mean": each and sum(each) / len(each), "top1_agreement": each and 0.95},
        "gates": None,
        "size": {"file_bytes": int(gb * GB), "bits_per_weight": {"decoder": 4.25}},
        "memory": {"resident_bytes": int(gb * GB), "kv_cache_bytes_per_token": 1e5, "prompt": 9},
        "speed": [{"batch": 1, "prompt": 512, "generate": 128} | {
            phase: {"median": decode, "min": 0.99 * decode, "max": 1.01 * decode} for phase in ("prefill", "decode")
        }],
        "machine": {"cpu": "a cpu", "cores": 2, "device": "cpu", "threads": 2},
        "versions": {"bitpress": "0.1.0"},
        "command": "bitpress run",
    }  # fmt: skip
    counts = [TOKENS] * len(each or range(WINDOWS))
    metrics["quality"]["windows"] = {"tokens": counts, "nll": [230.0] * len(counts)}
    if each:
        metrics["quality"]["windows"]["kl"] = [value * TOKENS for value in each]
    return {**metrics, **changes}


def noisy(mean, spread, seed=0):
    """The KL of each window: what the text does to every run alike, and a mean."""
    chance = random.Random(seed)
    return [mean * (1 + spread * chance.uniform(-1, 1)) for _ in range(WINDOWS)]


def four(**changes):
    """A baseline and four quantized runs, of which int4-g32 beats nf4 in everything."""
    return [
        run(**changes),
        run("int8-dynamic", 8.0, 0.001, 90.0, **changes),
        run("int4-g32", 5.0, 0.01, 110.0, **changes),
        run("int4-g128", 4.5, 0.03, 120.0, **changes),
        run("nf4", 5.5, 0.02, 80.0, **changes),
    ]


def chosen(sections):
    return {choice.budget: choice.run for choice in sections[0].choices}


def test_front_of_points():
    points = {"a": (1, 5), "b": (2, 3), "c": (3, 3), "d": (4, 1), "e": (1, 6), "twin": (4, 1)}
    assert front(points) == ["a", "b", "d", "twin"]
    assert front({}) == []


def test_fronts_of_size_and_speed():
    (section,) = compare(four())
    assert {r.run: r.fronts for r in section.runs} == {
        "baseline": ["size", "speed"],
        "int8-dynamic": ["size", "speed"],
        "int4-g32": ["size", "speed"],
        "nf4": [],
        "int4-g128": ["size", "speed"],
    }


def test_choice_by_cards_counts_the_cache_and_a_reserve():
    """With 4096 tokens of 0.1 MB: 16.4, 8.4, 5.4 and 4.9 GB needed; a 6 GB card leaves 5.37 GB, a 4 GB one 3.22."""
    sections = compare(four())
    assert chosen(sections) == {
        "4 GB card": None, "6 GB card": "int4-g128", "8 GB card": "int4-g32", "12 GB to 16 GB cards": "int8-dynamic",
        "24 GB to 80 GB cards": "baseline",
    }  # fmt: skip
    why = {choice.budget: choice.why for choice in sections[0].choices}
    assert why["4 GB card"] == "the smallest, int4-g128, needs 4.91 GB"
    assert why["8 GB card"] == (
        "it has the least KL of what fits, 0.01 (± 0), in 5.41 GB; int8-dynamic would be closer, but needs 8.41 GB; "
        "for speed, int4-g128 decodes 1.09x as fast at a KL of 0.03"
    )
    assert why["24 GB to 80 GB cards"].startswith("it fits unquantized (16.4 GB), and nothing is lost")
    assert "int8-dynamic decodes 1.80x as fast at a KL of 0.001" in why["24 GB to 80 GB cards"]


def test_choice_by_budgets_and_context():
    budgets = [Budget("9GB", 9 * GB), Budget("5GB", 5 * GB)]
    assert chosen(compare(four(), budgets, context=0)) == {"5GB": "int4-g32", "9GB": "int8-dynamic"}
    assert chosen(compare(four(), budgets)) == {"5GB": "int4-g128", "9GB": "int8-dynamic"}


def test_a_model_that_fits_anywhere_is_chosen_by_steps():
    runs = [run(gb=0.006), run("int8-dynamic", 0.003, 0.001), run("nf4", 0.002, 0.01), run("int4-g32", 0.0025, 0.02)]
    assert chosen(compare(runs, context=0)) == {
        "2.00 MB or more": "nf4", "3.00 MB or more": "int8-dynamic", "6.00 MB or more": "baseline",
    }  # fmt: skip
    runs.append(run("int8-channel", 0.003001, 0.0005))  # a reader sees 3.00 MB, too
    assert chosen(compare(runs, context=0))["3.00 MB or more"] == "int8-channel"


def test_what_misses_its_gates_is_not_chosen():
    missed = {"passed": False, "overridden": False, "judged": [{"gate": "top1", "passed": False}]}
    runs = [run(), run("int8-dynamic", 8.0, 0.001, gates=missed), run("nf4", 7.0, 0.01)]
    budget = [Budget("10GB", 10 * GB)]
    assert chosen(compare(runs, budget)) == {"10GB": "nf4"}
    assert "misses top1" in comparison_page.markdown(compare(runs))
    runs[1]["gates"] = {**missed, "overridden": True}
    assert chosen(compare(runs, budget)) == {"10GB": "int8-dynamic"}


def test_a_paired_difference_against_a_hand_computed_one():
    """Differences of 1, 2, 3 and 6 millinats: mean 3, standard error sqrt(sum of squares 14 / 3 / 4)."""
    base = noisy(0.05, 0.9)[:4]
    worse = [value + more / 1000 for value, more in zip(base, (1, 2, 3, 6), strict=True)]
    (section,) = compare([run("nf4", 5.0, base), run("int4-g32", 5.0, worse)])
    pair = between(section.differences, "int4-g32", "nf4")
    assert pair.difference == pytest.approx(0.003)
    assert pair.standard_error == pytest.approx(0.001 * math.sqrt(14 / 3 / 4))
    assert pair.differ
    assert between(section.differences, "nf4", "int4-g32").difference == pytest.approx(-0.003)


def test_the_pairing_finds_what_the_spread_of_the_text_hides():
    base = noisy(0.05, 0.9)
    (section,) = compare([run("nf4", 5.0, base), run("int4-g32", 5.0, [1.02 * value for value in base])])
    (pair,) = section.differences
    assert pair.differ
    assert pair.difference < max(r.kl_mean_se for r in section.runs)


def test_runs_that_do_not_differ_are_told_and_the_smaller_is_chosen():
    wavering = [0.0501 + (-1) ** window / 1000 for window in range(WINDOWS)]
    sections = compare([run(), run("int4-g32", 5.0, 0.05), run("nf4", 4.5, wavering)], [Budget("8GB", 8 * GB)])
    (pair,) = sections[0].differences
    assert (pair.run, pair.differ) == ("nf4", False)
    assert pair.difference == pytest.approx(0.0001)
    assert chosen(sections) == {"8GB": "nf4"}
    for page in (comparison_page.html(sections), comparison_page.markdown(sections)):
        assert "its KL does not differ from that of int4-g32, the least of what fits" in page
        assert "nf4 and int4-g32 do not differ by more than 2 standard errors" in page
        assert "≈ +" in page


def test_only_windows_that_all_read_are_compared():
    long = [0.01] * 12 + [9.0] * 4
    (section,) = compare([run("nf4", 5.0, long), run("int4-g32", 5.0, [0.02] * 12)])
    assert section.windows == 12
    assert {r.run: r.kl_mean for r in section.runs} == pytest.approx({"nf4": 0.01, "int4-g32": 0.02})
    assert "12 common" in section.notes[-1]


def test_of_one_window_nothing_is_known():
    (section,) = compare([run("nf4", 5.0, [0.01]), run("int4-g32", 5.0, [0.02])])
    assert section.differences[0].differ is None
    assert "is not known" in comparison_page.markdown([section])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("name", "word", "protocol"),
        ("text_sha256", "cd" * 32, "hash"),
        ("context", 512, "context"),
        ("dtype", "float32", "dtype"),
    ],
)
def test_protocols_and_texts_are_not_mixed(key, value, said):
    other = run("nf4", 5.0, 0.01)
    other["protocol"] = {**other["protocol"], key: value}
    with pytest.raises(Incomparable, match=f"{said}.*do not compare"):
        compare([run("int4-g32", 5.0, 0.02), other])


def test_windows_of_other_tokens_are_refused():
    other = run("nf4", 5.0, 0.01)
    other["quality"]["windows"]["tokens"][3] = 99
    with pytest.raises(Incomparable, match="different windows"):
        compare([run("int4-g32", 5.0, 0.02), other])


def test_speeds_of_two_machines_are_left_out():
    other = run("nf4", 5.0, 0.01, machine={"cpu": "another", "cores": 64, "device": "cuda", "threads": 1})
    (section,) = compare([run("int4-g32", 5.0, 0.02), other])
    assert all(r.decode is None and r.fronts != ["speed"] for r in section.runs)
    assert any("different machines" in note for note in section.notes)
    assert comparison_page.html([section]).count("<svg") == 1


def test_each_model_has_its_section_one_baseline_and_names_of_its_own(parse):
    small = {"model": {"id": "org/small"}}
    runs = [*four(), run(), run("nf4", 5.6, 0.02), run(gb=1.0, **small), run("nf4", 0.5, 0.1, **small)]
    sections = compare(runs)
    assert [section.model for section in sections] == ["org/model", "org/small"]
    names = [r.run for r in sections[0].runs]
    assert len(names) == len(set(names)) == 6
    assert names.count("baseline") == 1
    page = comparison_page.html(sections)
    ids = parse(page).ids
    assert len(ids) == len(set(ids)) > 0


def test_baselines_alone_and_runs_without_one_make_a_page():
    assert "0 quantized runs" in comparison_page.html(compare([run()]))
    assert "No baseline" in comparison_page.markdown(compare(four()[1:]))
    bare = {"scheme": "nf4", "model": {"id": "org/model"}, "protocol": run()["protocol"]}
    assert "nf4" in comparison_page.html(compare([run(), bare]))


def test_markdown_html_and_json_agree():
    sections = compare(four())
    (model,) = json.loads(json.dumps(comparison_page.plain(sections), allow_nan=False))["models"]
    text = comparison_page.markdown(sections).replace("\\", "")
    page = comparison_page.html(sections)
    for choice in model["choices"]:
        assert f"| {choice['budget']} | **{choice['run'] or 'nothing'}** | {choice['why']} |" in text
        assert f"{choice['budget']}: <b>{choice['run'] or 'nothing'}</b>, because {choice['why']}." in page
    for line in model["runs"]:
        (row,) = [row for row in text.splitlines() if row.startswith(f"| {line['run']} |") and row.count("|") > 8]
        assert f"| {line['kl_mean']:.4g}" in row
        assert f"{line['file_bytes'] / GB:.3g}" in row
        assert f"{', '.join(line['fronts']) or '–'} |" in row
    assert len(model["differences"]) == 6


def test_the_same_bytes_in_any_order():
    runs = four()
    assert comparison_page.html(compare(runs)) == comparison_page.html(compare(runs[::-1]))
    assert comparison_page.plain(compare(runs)) == comparison_page.plain(compare(runs[::-1]))


def test_hostile_names_stay_text(spoil, evil, parse):
    runs = [spoil(each) for each in four()]
    runs[0]["scheme"] = "none"
    for each in runs:
        each["versions"] = {evil: evil}
        each["gates"] = {"judged": [{"gate": evil, "passed": False}]}
    page = comparison_page.html(compare(runs))
    parsed = parse(page)
    assert set(parsed.tags) <= set(parse(comparison_page.html(compare(four()))).tags)
    assert parsed.tags.count("script") == 1
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    text = comparison_page.markdown(compare(runs))
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", text)
    assert "<script" not in outside
    assert [line for line in outside.splitlines() if line.startswith("# ")] == [text.splitlines()[0]]
    for page_or_text in (page, text):
        assert "\x1b" not in page_or_text
        assert "\u202e" not in page_or_text


def test_html_needs_nothing_from_outside(parse):
    page = comparison_page.html(compare(four()))
    parsed = parse(page)
    assert not {"link", "img", "iframe", "base"} & set(parsed.tags)
    assert all(value.startswith("#") for name, value in parsed.attributes if name in ("src", "href", "xlink:href"))
    for outside in ("http://", "https://", "@import", "data:", "url(http"):
        assert outside not in page
    assert page.count("<svg") == 2
    assert "currentColor" in page


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (0.0043512, 5.2e-5, "0.00435 (± 0.00005)"),
        (0.0013247, 1.83e-5, "0.001325 (± 0.000018)"),
        (0.15312, 0.003, "0.153 (± 0.003)"),
        (12.3456, 21.0, "12 (± 21)"),
        (0.0043512, 0.0, "0.0044 (± 0)"),
        (0.0043512, None, "0.0044"),
        (None, None, "–"),
    ],
)
def test_a_divergence_has_the_digits_that_its_error_leaves_it(value, error, said):
    assert wording.divergence(value, error) == said


def test_a_speed_that_is_hardly_higher_is_not_worth_a_word():
    runs = [run(), run("int8-dynamic", 8.0, 0.001, 100.0), run("nf4", 5.0, 0.01, 104.0)]
    (choice,) = compare(runs, [Budget("10GB", 10 * GB)])[0].choices
    assert (choice.run, "for speed" in choice.why) == ("int8-dynamic", False)


def test_external_checkpoints_go_by_their_names():
    sections = compare([*four(), run("nf4", 5.5, 0.02, checkpoint={"id": "org/theirs", "revision": None})])
    assert "nf4 org/theirs" in [candidate.run for candidate in sections[0].runs]
    for page in (comparison_page.html(sections), comparison_page.markdown(sections)):
        assert "External checkpoints, which no run of bitpress wrote, measured in the same way: nf4 org/theirs" in page
    assert "External checkpoints" not in comparison_page.html(compare(four()))


def test_the_kernels_own_kl_stands_beside_that_of_the_file():
    cost = {"layers": 28, "windows": 6, "kl_mean": 0.00022, "kl_mean_se": 5.3e-6}
    runs = [run(), run("nf4", 5.0, 0.01), run("int4-g32", 5.0, 0.02, kernels={"rounded_inputs": cost})]
    sections = compare(runs)
    (model,) = comparison_page.plain(sections)["models"]
    assert {r["run"]: r["kernel_kl_mean"] for r in model["runs"]} == {
        "baseline": None,
        "nf4": None,
        "int4-g32": 0.00022,
    }
    assert {r["run"]: r["kl_mean"] for r in model["runs"]}["int4-g32"] == pytest.approx(0.02)
    for page in (comparison_page.html(sections), comparison_page.markdown(sections)):
        assert "they belong to the file, and this figure belongs to the kernel" in page
        assert "KL added by the kernel" in page
        assert "KL added by the kernel" not in comparison_page.html(compare(runs[:2]))
    assert "| 0.02 (± 0) | 0.000220 (± 0.000005) |" in comparison_page.markdown(sections)


def test_runs_go_by_their_recipes():
    careful = run("mixed", 5.0, 0.01, recipe={"name": "careful", "layers": {"lm_head": "int8-channel"}})
    (section,) = compare([run(), careful, run("nf4", 5.0, 0.02)])
    assert [r.run for r in section.runs] == ["baseline", "careful", "nf4"]
    assert "How it was made" in comparison_page.markdown([section])


def test_what_it_takes_to_repeat_it_is_there():
    hashes = {"artifact.sha256": "ab" * 32, "text.sha256": "cd" * 32, "device": "cpu"}
    runs = [run(), run("nf4", 5.0, 0.01, fingerprint=hashes, config={"name": "mine"}, command="bitpress run mine.yaml")]
    for page in (comparison_page.html(compare(runs)), comparison_page.markdown(compare(runs)).replace("\\", "")):
        for words in ("ab" * 32, "cd" * 32, "artifact.sha256", "mine.yaml", "name", "0.1.0", "a cpu"):
            assert words in page, words
