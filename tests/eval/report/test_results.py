"""Figures as rows: what a spreadsheet reads is what was measured."""

import csv
import io
import json

from bitpress.eval.report import results

RUN = {
    "name": "demo",
    "model": {"id": "org/model", "revision": "abc", "parameters": 100},
    "scheme": "int4-g128",
    "recipe": {"name": "=HYPERLINK(1)", "layers": {}},
    "size": {"file_bytes": 2_000_000, "bits_per_weight": {"decoder": 4.25}},
    "quality": {"perplexity": 9.125, "kl_mean": 0.0123456},
    "gates": {"judged": [{"gate": "top1", "passed": False}, {"gate": "kl_mean", "passed": True}]},
    "speed": [
        {"batch": 8, "prompt": 512, "decode": {"median": 90.0}, "prefill": {"median": 900.0}},
        {"batch": 1, "prompt": 512, "decode": {"median": 30.0}, "prefill": {"median": 600.0}},
    ],
    "tasks": [{"task": "arc_easy", "metric": "acc", "value": 0.5}],
    "machine": {"threads": 2},
}
BASELINE = {"name": "demo", "model": RUN["model"], "scheme": "none", "size": {"file_bytes": 6_000_000}}


def test_rows():
    first, second = results.rows([RUN, BASELINE])
    assert (first["recipe"], first["file_bytes"], first["perplexity"]) == ("baseline", 6_000_000, None)
    assert second["kl_mean"] == 0.0123456
    assert second["gates"] == "missed: top1"
    assert second["decode_tokens_per_second"] == 30.0
    assert second["prefill_tokens_per_second_batch_8_prompt_512"] == 900.0
    assert second["arc_easy/acc"] == 0.5
    assert first.keys() == second.keys()


def test_csv_is_read_back_and_holds_no_formula():
    table = results.rows([RUN, BASELINE])
    read = list(csv.DictReader(io.StringIO(results.as_csv(table))))
    assert read[1]["recipe"] == "'=HYPERLINK(1)"
    assert float(read[1]["kl_mean"]) == 0.0123456
    assert read[0]["perplexity"] == ""
    assert json.loads(results.as_json(table)) == table
    assert results.as_csv([]) == "\n"


def test_markdown():
    lines = results.as_markdown(results.rows([RUN, BASELINE])).splitlines()
    assert (
        lines[0]
        == "| model | recipe | file_bytes | bits_per_weight | perplexity | kl_mean | decode_tokens_per_second |"
    )
    assert lines[3].startswith("| org/model | =HYPERLINK(1) | 2,000,000 | 4.25 | 9.125 | 0.012346 |")


def test_figures_and_settings():
    figures, settings = results.figures(results.rows([RUN])[0])
    assert figures["kl_mean"] == 0.0123456
    assert settings["parameters"] == "100"
    assert settings["threads"] == "2"
    assert "perplexity_se" not in {**figures, **settings}
