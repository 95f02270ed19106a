"""The report: right numbers, hostile names that stay text, the same bytes every time."""

import copy
import re

import pytest

from bitpress.eval.report import report
from bitpress.eval.report.why_slower import why_slower

PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def speed(batch, prefill, decode):
    def around(value):
        return {"median": value, "min": 0.98 * value, "max": 1.02 * value}

    lengths = {"prompt": 512, "generate": 128, "repeats": 3}
    return {"batch": batch, **lengths, "prefill": around(prefill), "decode": around(decode)}


def metrics(scheme="none", model="builtin:demo", blocks=2, **changes):
    """A run with round numbers: 1/3 the size, +2.5% perplexity, 1.5x decode and 0.8x prefill at batch 1."""
    quantized = scheme != "none"
    layers = [
        {"name": f"model.layers.{b}.{p}", "block": b, "shape": [256, 256], "relative_error": 0.05 + 0.01 * b}
        for b in range(blocks)
        for p in PROJECTIONS
    ]
    norms = [f"model.layers.{b}.{n}_layernorm.weight" for b in range(blocks) for n in ("input", "post")]
    kept = [{"name": name, "bytes": 512, "reason": "not a linear layer"} for name in norms]
    kept.append({"name": "model.embed_tokens.weight", "bytes": 1_000_000, "reason": "outside the decoder blocks"})
    run = {
        "format_version": 1,
        "name": "demo",
        "model": {"id": model, "revision": None, "architecture": "LlamaForCausalLM", "parameters": 2_880_000},
        "scheme": scheme,
        "method": "absmax" if quantized else None,
        "format": "gptq" if quantized else None,
        "protocol": {"name": "gptq", "text": "builtin:text", "text_sha256": "ab" * 32, "tokens": 153_300},
        "quality": {
            "perplexity": 41.0 if quantized else 40.0,
            "baseline_perplexity": 40.0,
            "kl_mean": 0.0052 if quantized else None,
            "top1_agreement": 0.957 if quantized else None,
        },
        "size": {
            "file_bytes": 2_000_000 if quantized else 6_000_000,
            "bits_per_weight": {
                "quantized": 4.125 if quantized else None,
                "decoder": 4.2 if quantized else 16.0,
                "all": 6.4 if quantized else 16.0,
            },
        },
        "memory": {"resident_bytes": 2_100_000, "peak_rss_bytes": 600_000_000, "peak_cuda_bytes": None},
        "speed": [speed(1, 800.0, 300.0), speed(8, 900.0, 303.0)]
        if quantized
        else [speed(1, 1000.0, 200.0), speed(8, 900.0, 300.0)],
        "coverage": {"decoder_bytes": 4_718_592, "share": 0.99976, "layers": layers, "kept": kept}
        if quantized
        else {"decoder_bytes": 4_718_592, "share": 0.0, "layers": [], "kept": []},
        "reload": {"tokens": 64, "max_difference": 0.0, "tolerance": 1e-5} if quantized else None,
        "kernels": {"selected": {"torch-int4": 8}, "rejected": {"bnb-nf4": f"{scheme} is not nf4"}}
        if quantized
        else {},
        "sample": {"prompt": "Return the", "text": f"Return the {scheme} value."},
        "machine": {
            "cpu": "a cpu",
            "cores": 2,
            "memory_bytes": 25_000_000_000,
            "device": "cpu",
            "threads": 2,
        },
        "versions": {"bitpress": "0.1.0", "torch": "2.13.0"},
        "config": {"name": "demo"},
        "command": "bitpress run configs/demo.yaml",
        "seconds": {"quantize": 3.1},
    }
    return {**copy.deepcopy(run), **changes}


def table(runs):
    """The summary as {scheme: {column: cell}}."""
    header, rows = report.summary_rows(runs)
    assert all(len(row) == len(header) for row in rows)
    return {row[header.index("run")]: dict(zip(header, row, strict=True)) for row in rows}


def test_rows_against_hand_computed_ratios():
    rows = table([metrics("int4-g128"), metrics()])
    assert list(rows) == ["baseline", "int4-g128"]
    run = rows["int4-g128"]
    assert run["method/format"] == "absmax/gptq"
    assert run["file size"] == "2.00 MB (0.33x)"
    assert run["bits/weight quantized/blocks/all"] == "4.12 / 4.20 / 6.40"
    assert run["perplexity"] == "41.00 (+2.5%)"
    assert (run["mean KL"], run["top-1"]) == ("0.0052", "95.7%")
    assert (run["resident"], run["peak RSS"]) == ("2.10 MB", "600 MB")
    assert run["prefill tok/s batch 1"] == "800 (0.80x)"
    assert run["decode tok/s batch 1"] == "300 (1.50x)"
    assert run["decode tok/s batch 8"] == "303 (1.01x)"
    base = rows["baseline"]
    assert (base["file size"], base["perplexity"], base["decode tok/s batch 1"]) == (
        "6.00 MB",
        "40.00",
        "200",
    )
    assert base["mean KL"] == base["method/format"] == "–"
    assert "peak CUDA" not in base
    assert "model" not in base


def test_missing_values_are_a_dash_and_never_zero():
    quality = {"perplexity": None, "baseline_perplexity": 40.0, "kl_mean": None}
    bare = {"scheme": "nf4", "model": {"id": "builtin:demo"}, "quality": quality}
    rows = table([metrics(), bare])
    cells = [cell for column, cell in rows["nf4"].items() if column != "run"]
    assert set(cells) == {"–", "– / – / –"}
    for render in (report.html, report.markdown):
        assert "How sure" in render([metrics(), bare])


def test_peak_cuda_appears_where_measured():
    memory = {"resident_bytes": 1, "peak_rss_bytes": 2, "peak_cuda_bytes": 1_240_000_000}
    rows = table([metrics(), metrics("nf4", memory=memory)])
    assert (rows["nf4"]["peak CUDA"], rows["baseline"]["peak CUDA"]) == ("1.24 GB", "–")


def test_verdict_says_what_was_gained_and_lost():
    ((run, sentence),) = report.verdicts([metrics(), metrics("int4-g128")])
    assert run == "int4-g128"
    assert sentence == (
        "mean KL 0.0052, 0.33x the size, perplexity 40.00 → 41.00 (+2.5%), same next token 95.7% of the time, "
        "decode 1.50x faster, slower than the baseline: prefill batch 1 (0.80x)"
    )
    slow = metrics("nf4", speed=[speed(1, 1000.0, 160.0)])
    assert "0.80x the decode speed: slower than the baseline" in report.verdicts([metrics(), slow])[0][1]
    same = metrics("nf4", speed=[speed(1, 1000.0, 202.0)])
    assert "decode 1.01x (no clear difference)" in report.verdicts([metrics(), same])[0][1]


def test_speeds_of_two_machines_are_not_compared():
    other = metrics("nf4", machine={"cpu": "another", "cores": 64, "device": "cpu", "threads": 64})
    assert table([metrics(), other])["nf4"]["decode tok/s batch 1"] == "300"
    assert "different machines" in report.html([metrics(), other])


def test_without_a_baseline():
    run = table([metrics("int4-g128")])["int4-g128"]
    assert (run["file size"], run["decode tok/s batch 1"]) == ("2.00 MB", "300")
    assert run["perplexity"] == "41.00 (+2.5%)"  # measured in the run's own process
    for render in (report.html, report.markdown):
        assert "No baseline run" in render([metrics("int4-g128")])


def test_the_baseline_alone():
    assert report.verdicts([metrics()]) == [("baseline", "the unquantized baseline, for comparison only")]
    for render in (report.html, report.markdown):
        assert "What was quantized" not in render([metrics()])


def test_several_models_each_against_its_own_baseline(parse):
    big = metrics(model="z/big")
    big["size"]["file_bytes"] = 8_000_000
    runs = [metrics("nf4", model="z/big"), metrics("nf4"), big, metrics()]
    header, rows = report.summary_rows(runs)
    assert header[:2] == ["model", "run"]
    assert [row[:2] + row[3:4] for row in rows] == [
        ["builtin:demo", "baseline", "6.00 MB"],
        ["builtin:demo", "nf4", "2.00 MB (0.33x)"],
        ["z/big", "baseline", "8.00 MB"],
        ["z/big", "nf4", "2.00 MB (0.25x)"],
    ]
    page = report.html(runs)
    assert "what else was measured: z/big" in page
    ids = parse(page).ids
    assert ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)


def test_one_scheme_twice_is_told_apart():
    runs = [metrics("int4-g128"), metrics("int4-g128", method="gptq"), metrics()]
    assert list(table(runs)) == ["baseline", "int4-g128 absmax demo", "int4-g128 gptq demo"]


def mixed(name="careful", **changes):
    """A run by a recipe with rules: 8-bit down projections, rounded to nearest, and 4 bits by GPTQ elsewhere."""
    rules = {"*.down_proj": "absmax/int8-g128", "model.layers.0.*": "none"}
    run = metrics("mixed", recipe={"name": name, "layers": rules}, method="absmax, gptq", **changes)
    for layer in run["coverage"]["layers"]:
        down = layer["name"].endswith("down_proj")
        layer |= {"scheme": "int8-g128", "method": "absmax"} if down else {"scheme": "int4-g128", "method": "gptq"}
        layer["bytes"] = 66_560 if down else 34_816
    run["kernels"]["rounded_inputs"] = {"layers": 8, "windows": 6, "kl_mean": 0.00022, "kl_mean_se": 5.3e-6}
    return run


@pytest.fixture(scope="module")
def hostile(spoil, evil):
    """Two runs with hostile text wherever a run has text."""
    runs = [spoil(metrics()), spoil(mixed())]
    runs[0]["scheme"] = "none"
    for run in runs:
        kernels = {"selected": {evil: 8}, "rejected": {evil: evil}}
        run["kernels"] = {**run["kernels"], **kernels}
        run["versions"] = {evil: evil}
        run["sample"] = {"prompt": "</pre>", "text": "</pre>\n```\n````\n# boom\n<script>alert(1)</script>"}
    return runs


def test_hostile_names_stay_text_in_html(hostile, evil, parse):
    page = report.html(hostile, [(evil, evil, evil)])
    clean = parse(report.html([metrics(), mixed()], [("model", "recipe", "why")]))
    parsed = parse(page)
    assert set(parsed.tags) <= set(clean.tags)
    assert parsed.tags.count("script") == 1
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_hostile_names_stay_text_in_markdown(hostile, evil):
    text = report.markdown(hostile, [(evil, evil, evil)])
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", text)
    assert "<script" not in outside
    assert [line for line in outside.splitlines() if line.startswith("# ")] == [text.splitlines()[0]]
    assert not re.search(r"(?<!\\)`", outside)
    columns = {len(re.findall(r"(?<!\\)\|", row)) for row in outside.splitlines() if row.startswith("|")}
    clean = report.markdown([metrics(), mixed()]).splitlines()
    assert columns == {row.count("|") for row in clean if row.startswith("|")}


def test_hostile_names_stay_text_in_a_terminal(hostile):
    assert not any("\x1b" in cell for row in report.summary_rows(hostile)[1] for cell in row)


def test_html_needs_nothing_from_outside(parse):
    page = report.html([metrics(), metrics("nf4")])
    parsed = parse(page)
    assert parsed.tags.count("script") == 1  # its own, which the policy names by hash
    assert "link" not in parsed.tags
    assert "img" not in parsed.tags
    links = [value for name, value in parsed.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in links)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert page.count("<svg") == 4
    assert page.index('class="large"') < page.index("Summary")  # KL against bits per weight


def test_svg_follows_the_page_in_dark_mode():
    page = report.html([metrics(), metrics("nf4")])
    assert "currentColor" in page
    assert "#010203" not in page
    assert "<text" in page


def test_a_deep_model_gets_a_heat_map():
    page = report.html([metrics("nf4", blocks=32)])
    assert "QuadMesh" in page
    assert "data:image" not in page


def measured(blocks=3):
    """A run with all that is measured beside the summary's figures."""
    run = metrics("int4-g128", blocks=blocks)
    run["protocol"]["name"] = "sliding-512/64"
    run["quality"] |= {"perplexity_se": 0.5, "perplexity_ratio": 1.025, "perplexity_ratio_se": 0.0021}
    run["quality"] |= {"kl_mean_se": 0.0003, "kl_median": 0.002, "kl_p99": 0.04, "kl_max": 0.7, "rms_dp": 0.0143}
    run["quality"] |= {"path": "256 stored", "kl_mean_bound": 2e-5, "top1_agreement_se": 0.002, "rms_dp_se": 0.0004}
    run["gates"] = {"passed": False, "overridden": False, "judged": [
        {"gate": "kl_mean", "limit": 0.001, "found": 0.0052, "passed": False, "said": "mean KL is 0.0052, but"}
    ]}  # fmt: skip
    run["tasks"] = [{"task": "arc_easy", "metric": "acc", "value": 0.5, "standard_error": 0.05, "samples": 100}]
    run["memory"] |= {"loading_peak_bytes": 9_000_000, "kv_cache_bytes_per_token": 3072, "activation_peak_bytes": None}
    run["memory"]["fits"] = [{"card_gib": 8, "context": 0}, {"card_gib": 24, "context": 4096}]
    for line in run["speed"]:
        line |= {"first_token_seconds": {"median": 0.064, "min": 0.06, "max": 0.07}, "joules_per_token": None}
        line |= {"bytes_per_second": 3e9, "bandwidth_share": 0.2}
    layers = run["coverage"]["layers"]
    run["output_errors"] = {
        "tokens": 512,
        "layers": [
            {"name": x["name"], "block": x["block"], "output_error": 0.04, "worst_channels": []} for x in layers
        ],
        "blocks": [{"block": b, "output_error": 0.02, "cumulative_error": 0.02 * (b + 1)} for b in range(blocks)],
    }
    return run


def plain(text):
    """Markdown without its escapes."""
    return text.replace("\\", "")


def test_what_was_measured_beside_the_summary_is_told():
    for render in (report.html, report.markdown):
        page = plain(render([metrics(), measured()])).replace("\u00a0", " ")
        for words in (
            "41.00 (± 0.50)", "1.0250 (± 0.0021)", "0.0052 (± 0.0003)", "1.43% (± 0.04%)", "within 2e-05",
            "misses its gate kl_mean", "MISSED", "at most 0.001", "arc_easy", "0.5 (± 0.05)", "9.00 MB",
            "3.07 kB", "4,096", "64 ms", "3.00 GB/s", "20%", "prefill: a prompt is limited by arithmetic",
        ):  # fmt: skip
            assert words in page, words


def test_a_quantized_cache_stands_beside_what_it_would_be():
    run = measured()
    windows = [{"tokens": 511, "bytes_per_token": 1000.0}]
    run["memory"] |= {"kv_cache_bytes_per_token": 1536, "kv_cache_windows": windows}
    run["memory"]["kv_cache"] = {"type": "fp8", "kv_cache_bytes_per_token": 3072}
    page = plain(report.markdown([metrics(), run])).replace("\u00a0", " ")
    assert "1.54 kB + 1.00 kB of the last 511 (fp8; 3.07 kB unquantized)" in page
    rows = [line for line in page.splitlines() if line.startswith("| int4-g128 | fp8 |")]
    assert [cell.strip() for cell in rows[0].split("|")[4:7]] == ["6.80 MB", "50.8 MB", "202 MB"]
    assert "| int4-g128 | unquantized | 3.07 kB | 12.6 MB | 101 MB | 403 MB |" in page


def test_tasks_are_compared_with_the_baselines_in_pairs():
    """Of 100 documents the baseline has 60, the other lost two of them: error sqrt((2 - 4 / 100) / 99 / 100)."""
    line = {
        "task": "arc_easy",
        "metric": "acc",
        "filter": "none",
        "value": 0.6,
        "standard_error": 0.049,
        "samples": 100,
    }
    base, run = metrics(), metrics("nf4")
    base["tasks"] = [{**line, "scores": [1.0] * 60 + [0.0] * 40}]
    run["tasks"] = [{**line, "value": 0.58, "scores": [1.0] * 58 + [0.0] * 42}]
    assert "| nf4 | arc_easy | acc | 0.58 (± 0.049) | -0.020 (± 0.014) | 100 |" in plain(report.markdown([base, run]))
    run["tasks"][0]["scores"].pop()  # other documents
    assert "| nf4 | arc_easy | acc | 0.58 (± 0.049) | – | 100 |" in plain(report.markdown([base, run]))


def test_the_layers_that_are_furthest_off_are_named_or_why_not():
    run = measured()
    run["output_errors"]["layers"][5] |= {
        "output_error": 0.25, "worst_channels": [{"channel": 17, "share": 0.433, "error": 1.5}]
    }  # fmt: skip
    run["output_errors"]["layers"][1]["output_error"] = None
    text = plain(report.markdown([metrics(), run]))
    rows = [line for line in text.splitlines() if line.startswith("| int4-g128 | model.layers")]
    assert len(rows) == 3
    assert rows[0] == "| int4-g128 | model.layers.1.self_attn.v_proj | 25.00% | 17 (43%) |"
    run["output_errors"] = {"skipped": "the baseline needs about 16.0 GB beside it, 3.0 GB are free"}
    for render in (report.html, report.markdown):
        assert "not measured: the baseline needs about 16.0 GB beside it" in render([metrics(), run])
    assert "Where it hurts" not in report.markdown([metrics()])


def test_how_the_error_of_a_tuned_block_fell():
    run = measured()
    run["coverage"]["tuned"] = [{"block": 1, "layers": [], "curve": [[0, 0.02], [5, 0.015], [10, 0.016]]}]
    text = plain(report.markdown([metrics(), run]))
    assert "| int4-g128 | 1 | 10 | 0.02 → 0.015 | 5 | 1.000 0.750 0.800 |" in text
    assert "What was learned" in report.html([metrics(), run])
    assert "What was learned" not in report.markdown([metrics()])


def test_how_a_transform_distillation_and_inputs_left_alone_went():
    run = measured()
    run["distill"] = {"kept_at": 5, "curve": [[0, 0.02], [5, 0.015], [10, 0.016]], "losses": [[5, 0.03], [10, 0.025]]}
    group = {"layers": ["a", "b"], "before": 0.02, "after": 0.01, "note": "alpha 0.5"}
    run["transform"] = {"name": "smooth", "groups": [group]}
    run["inputs"] = [
        {"layers": [name], "error": error, "kept": error > 0.4} for name, error in zip("abcde", (0.5, *[0.1] * 4))
    ]
    text = plain(report.markdown([metrics(), run]))
    assert "| int4-g128 | 0 | 0.02 | – |" in text
    assert "| int4-g128 | 5 | 0.015 | 0.03 | kept |" in text
    assert "| int4-g128 | smooth | a, b | alpha 0.5 | 0.02 → 0.01 |" in text
    assert "| int4-g128 | a | left alone | 0.5 |" in text
    assert text.count("| rounded | 0.1 |") == 3


def test_errors_of_outputs_are_a_map_and_by_depth_lines():
    page = report.html([metrics(), measured()])
    assert "QuadMesh" in page
    assert "with what it inherits" in page
    assert page.count("<svg") == 5
    assert report.html([metrics(), measured(1)]).count("<svg") == 4  # one block has no depth
    several = report.html([metrics(), measured(), {**measured(), "scheme": "int2-g64"}])
    assert several.count("<svg") == 5  # a panel for each run, on one scale
    assert several.count("one scale for all runs") == 2
    assert "data:image" not in page


@pytest.mark.parametrize(
    ("phase", "kernels", "share", "said"),
    [
        ("prefill", {"selected": {"torch-int4": 8}}, 0.5, "a prompt is limited by arithmetic"),
        ("decode", {"selected": {"reference": 3, "torch-int4": 5}}, 0.5, "3 of 8 layers run on the reference kernel"),
        ("decode", {"selected": {"torch-int8": 8}, "quantized_inputs": 8}, 0.5, "activations are quantized before"),
        ("decode", {"selected": {"any": 8}, "rounded_inputs": {"layers": 8}}, 0.5, "activations are quantized before"),
        ("decode", {"selected": {"torch-int4": 8}}, 0.1, "it uses 10% of the memory's bandwidth"),
        ("decode", {"selected": {"torch-int4": 8}}, 3.0, "the weights lie in the processor's cache"),
        ("decode", {"selected": {"torch-int4": 8}}, None, None),
    ],
)
def test_why_it_is_slower(phase, kernels, share, said):
    reasons = why_slower({"kernels": kernels}, {"bandwidth_share": share}, phase)
    assert reasons is None if said is None else said in reasons


def test_arithmetic_limits_only_kernels_that_unpack_weights():
    kernels = {"selected": {"a": 5, "b": 3}, "quantized_inputs": 5, "rounded_inputs": {"layers": 2}}
    assert "limited by arithmetic" in why_slower({"kernels": kernels}, {}, "prefill")
    kernels["rounded_inputs"]["layers"] = 3
    assert "limited by arithmetic" not in why_slower({"kernels": kernels}, {}, "prefill")


def test_two_renderings_are_the_same_bytes_in_any_order():
    runs = [metrics(), metrics("nf4"), metrics("int4-g128")]
    before = copy.deepcopy(runs)
    assert report.html(runs) == report.html(runs) == report.html(runs[::-1])
    assert report.markdown(runs) == report.markdown(runs[::-1])
    assert runs == before


def test_a_run_goes_by_its_recipe_and_each_of_its_schemes_has_a_row():
    """2 blocks of 4 layers, 256 x 256 each: 8 * 66,560 / 65,536 bits in the down projections, 4.25 elsewhere."""
    runs = [metrics(), metrics("int4-g128", recipe={"name": "absmax-int4-g128", "layers": {}}), mixed()]
    assert set(table(runs)) == {"baseline", "absmax-int4-g128", "careful"}
    assert table(runs)["careful"]["method/format"] == "absmax, gptq/gptq"
    text = plain(report.markdown(runs))
    assert "| careful | gptq/int4-g128 | gptq | 6 | 393,216 | 209 kB | 4.25 |" in text
    assert "| careful | absmax/int8-g128 | gptq | 2 | 131,072 | 133 kB | 8.12 |" in text
    assert "| absmax-int4-g128 | absmax/int4-g128 | gptq | 8 | 524,288 | – | – |" in text  # old runs tell no bytes
    assert "- *.down_proj: absmax/int8-g128" in text
    for words in ("careful", "How it was made", "Rules for single layers", "model.layers.0.*"):
        assert words in report.html(runs)


def test_one_recipe_twice_is_told_apart_by_the_names_of_the_runs():
    assert list(table([mixed(), mixed(seconds={}, quality={}) | {"name": "later"}, metrics()])) == [
        "baseline",
        "careful demo",
        "careful later",
    ]


def test_a_recipe_that_is_no_recipe_is_passed_over():
    for recipe in ("careful", {"name": 7, "layers": ["*"]}, {"name": ""}, None):
        run = metrics("int4-g128", recipe=recipe)
        assert list(table([run])) == ["int4-g128"]
        assert "Rules" not in report.html([run])


def test_what_the_kernel_adds_to_the_kl_is_a_figure_of_its_own():
    runs = [metrics(), mixed(), metrics("int8-dynamic")]
    rows = table(runs)
    assert (rows["careful"]["mean KL"], rows["careful"]["KL added by the kernel"]) == ("0.0052", "0.00022")
    assert rows["int8-dynamic"]["KL added by the kernel"] == rows["baseline"]["KL added by the kernel"] == "–"
    for render in (report.html, report.markdown):
        page = plain(render(runs)).replace("\u00a0", " ")
        assert "they belong to the file, and this figure belongs to the kernel" in page
        assert "0.000220 (± 0.000005)" in page
        assert "inputs rounded in 8 layers" in page
        assert "added by the kernel" not in render([metrics(), metrics("nf4")])
    assert "**Of the kernel**: " in report.card(runs, CARD)


CARD = dict.fromkeys(("missed", "snippets", "unsupported", "figures", "provenance", "files"), ()) | dict.fromkeys(
    ("name", "what", "command", "config", "licence"), ""
)


def test_the_card_of_a_mixed_run_tells_its_schemes_and_rules():
    text = plain(report.card([metrics(), mixed()], CARD))
    assert "| careful | gptq/int4-g128 | gptq | 6 |" in text
    assert "- *.down_proj: absmax/int8-g128" in text
    assert "method/scheme" not in report.card([metrics(), metrics("nf4")], CARD)


def test_jobs_that_did_not_finish_are_listed_with_the_reason():
    refused = [("builtin:demo", "int4-g96", "256 is no multiple of 96"), ("org/other", "nf4", "out of memory")]
    for render in (report.html, report.markdown):
        for runs in ([metrics(), metrics("nf4")], []):
            page = plain(render(runs, refused))
            assert "Not finished" in page
            for model, recipe, why in refused:
                assert page.count(f"{model} · {recipe}") == page.count(why) == 1
        assert "Not finished" not in render([metrics()])


def test_a_models_identity_is_among_the_hashes_and_not_in_the_head_of_the_page():
    run = metrics()
    run["model"]["identity"] = "0123456789abcdef"
    for render in (report.html, report.markdown):
        assert render([run]).count("0123456789abcdef") == 1
        assert render([run]).index("0123456789abcdef") > render([run]).index("How to repeat it")


def test_the_head_is_no_block_of_the_plot_by_depth():
    run = metrics("int4-g128")
    run["coverage"]["layers"].append({"name": "lm_head", "block": None, "shape": [9, 9], "relative_error": 0.1})
    assert "by depth" in report.html([run])


def test_the_list_of_what_was_kept_stays_short():
    text = report.markdown([metrics("nf4", blocks=64)])
    rows = [line for line in text.splitlines() if "layernorm" in line or "embed_" in line.replace("\\", "")]
    assert rows == [
        r"| model.embed\_tokens.weight | 1 | 1.00 MB | outside the decoder blocks |",
        r"| model.layers.\*.input\_layernorm.weight | 64 | 32.8 kB | not a linear layer |",
        r"| model.layers.\*.post\_layernorm.weight | 64 | 32.8 kB | not a linear layer |",
    ]
    assert report.html([metrics("nf4", blocks=64)]).count("layernorm") == 2


def test_coverage_and_a_failed_reload_are_said_plainly():
    text = report.markdown([metrics("nf4", reload={"tokens": 64, "max_difference": 0.5, "tolerance": 1e-5})])
    assert "over 99.9% of 4.72 MB" in text
    assert "**FAILED**, largest difference 0.5, allowed 1e-05, 64 tokens" in text


@pytest.mark.parametrize("perplexity", [float("inf"), float("nan"), 250_000.0])
def test_a_ruined_model_still_gets_its_report(perplexity):
    quality = {"perplexity": perplexity, "baseline_perplexity": 40.0, "kl_mean": float("inf")}
    runs = [metrics(), metrics("int2", quality=quality)]
    assert "<svg" in report.html(runs)
    assert report.markdown(runs)
