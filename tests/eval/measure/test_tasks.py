"""Tasks through lm-eval: how its results are read, and, where it is installed, a task of our own by its code."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitpress.eval.measure import tasks

RESULTS = {
    "results": {
        "arc_easy": {
            "alias": "arc_easy",
            "acc,none": 0.5,
            "acc_stderr,none": 0.05,
            "acc_norm,none": 0.25,
            "acc_norm_stderr,none": "N/A",
        }
    },
    "n-samples": {"arc_easy": {"original": 2376, "effective": 100}},
    "versions": {"arc_easy": 1.0},
    "samples": {
        "arc_easy": [
            {"doc_id": 1, "filter": "none", "acc": 0.0, "acc_norm": (1.0, 2)},
            {"doc_id": 0, "filter": "none", "acc": 1.0, "acc_norm": (0.0, 2)},
            {"doc_id": 0, "filter": "strict", "acc": 0.0, "acc_norm": (0.0, 2)},
        ]
    },
}


@pytest.fixture
def stand_in(monkeypatch):
    """lm-eval replaced: stand_in(results or an error); returns what it was asked."""
    asked = {}

    def install(answer):
        def simple_evaluate(model, **settings):
            asked.update(settings, model=model)
            if isinstance(answer, Exception):
                raise answer
            return answer

        adapter = SimpleNamespace(HFLM=lambda **settings: settings)
        monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
        monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", adapter)
        return asked

    return install


def test_each_metric_is_a_line_with_its_error(stand_in):
    asked = stand_in(RESULTS)
    common = {"task": "arc_easy", "filter": "none", "samples": 100, "version": 1.0}
    assert tasks.run_tasks("model", "tokenizer", ["arc_easy"], 100) == [
        {**common, "metric": "acc", "value": 0.5, "standard_error": 0.05, "scores": [1.0, 0.0]},
        {**common, "metric": "acc_norm", "value": 0.25, "standard_error": None, "scores": None},
    ]
    assert (asked["tasks"], asked["limit"]) == (["arc_easy"], 100)
    assert (asked["num_fewshot"], asked["apply_chat_template"]) == (None, False)
    tasks.run_tasks("model", "tokenizer", ["arc_easy"], 100, fewshot=5, chat_template=True)
    assert (asked["num_fewshot"], asked["apply_chat_template"]) == (5, True)
    assert (asked["model"]["pretrained"], asked["model"]["tokenizer"]) == ("model", "tokenizer")


@pytest.mark.parametrize("error", [KeyError("arc_esy"), OSError("offline")])
def test_what_lm_eval_cannot_run_is_said(stand_in, error):
    stand_in(error)
    with pytest.raises(ValueError, match="lm-eval cannot run arc_esy"):
        tasks.run_tasks("model", "tokenizer", ["arc_esy"], None)


def test_a_task_of_our_own_by_lm_evals_code(tiny_llama, tmp_path):
    """Which of two words follows: the share of questions in which the model finds the right one likelier."""
    pytest.importorskip("lm_eval")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = [{"question": f"{n} plus {n} is", "choices": [str(2 * n), "x"], "answer": n % 2} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }

    @torch.inference_mode()
    def likelihood(question, choice):
        prompt, ids = (tokenizer(part)["input_ids"] for part in (question, f" {choice}"))
        log_p = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        return sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))

    guesses = [max((0, 1), key=lambda n, r=r: likelihood(r["question"], r["choices"][n])) for r in rows]
    expected = sum(guess == r["answer"] for guess, r in zip(guesses, rows)) / len(rows)
    [line] = tasks.run_tasks(model, tokenizer, [task], None)
    assert (line["task"], line["metric"], line["samples"]) == ("sums", "acc", 12)
    assert line["value"] == pytest.approx(expected)
    assert line["scores"] == [float(guess == r["answer"]) for guess, r in zip(guesses, rows)]
    # the error of a share, with n - 1
    assert line["standard_error"] == pytest.approx((expected * (1 - expected) / 11) ** 0.5)
