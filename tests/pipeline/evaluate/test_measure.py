"""What is measured in the fresh process, called here in this one: interrupted and gone on, and where two do not fit."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from bitpress.eval.measure import scores, stored_predictions
from bitpress.pipeline.api import evaluate, quantize
from bitpress.pipeline.config.schema import Eval
from bitpress.pipeline.errors import ConfigError, NumericsError
from bitpress.pipeline.evaluate import measure
from bitpress.pipeline.evaluate import resume as windows

TEXT = "All that is gold does not glitter, not all those who wander are lost; 7 * 6 = 42. " * 30


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measure") / "artifact"
    quantize(tiny_llama, "int4-g32", folder)
    return folder


@pytest.fixture
def ask(tiny_llama: Path, artifact: Path, tmp_path: Path) -> Any:
    """ask(baseline=…, folder=…, setting=…): what the process answers."""
    (tmp_path / "text.txt").write_text(TEXT)

    def call(baseline: bool = True, resume: bool = True, folder: Path = artifact, **settings: Any) -> dict[str, Any]:
        chosen = {"text": str(tmp_path / "text.txt"), "context": 32, "windows": 9, "speed": None, **settings}
        kept = measure.Resume(str(tmp_path / "kept"), {"a": 1}, str(tmp_path / "kept-predictions"), {"b": 2})
        request = {
            "artifact": str(folder),
            "baseline": str(tiny_llama) if baseline else None,
            "eval": Eval.model_validate(chosen).model_dump(),
            "device": "cpu",
            "folder": str(tmp_path),
            "resume": vars(kept) if resume else None,
        }
        answer = measure.measure_task(json.loads(json.dumps(request)))
        return json.loads(json.dumps(answer, allow_nan=False))

    return call


@pytest.fixture
def each_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_SECONDS", -1.0)


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no memory for a second model."""
    full = psutil.virtual_memory()._replace(available=1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: full)


def dying(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, after: int) -> None:
    """The function is stopped at its call after so many."""
    original, calls = getattr(module, name), [0]

    def call(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize(("baseline", "function"), [(True, "_compare"), (False, "_score")])
@pytest.mark.parametrize("after", [2, 3, 8])
def test_an_interrupted_evaluation_goes_on_and_ends_in_the_same_last_bit(
    ask: Any, monkeypatch: pytest.MonkeyPatch, baseline: bool, function: str, after: int
) -> None:
    whole = ask(baseline, resume=False)["quality"]
    with monkeypatch.context() as patch:
        dying(patch, scores, function, after)
        with pytest.raises(KeyboardInterrupt):
            ask(baseline)
    seen: list[int] = []
    original = getattr(scores, function)
    monkeypatch.setattr(scores, function, lambda *a: seen.append(0) or original(*a))
    answer = ask(baseline)
    # of a model by itself, the window that shows the peak of memory is scored too, both times; beside a baseline, the
    # one that shows what rounded inputs cost
    besides = (1 if answer["kernels"]["rounded_inputs"] else 0) if baseline else 2
    assert len(seen) == 9 - after + besides
    assert json.dumps(answer["quality"]) == json.dumps(whole)


@pytest.mark.parametrize(("kernel", "share"), [("auto", 0.02), ("auto-int16", 1e-3), ("auto-int8", 0.1)])
def test_what_rounded_inputs_cost_is_measured_against_the_same_model(ask: Any, kernel: str, share: float) -> None:
    """What the default adds to what 4-bit weights lose is small, with 16 bits next to nothing; 8 bits are seen."""
    answer = ask(kernel=kernel)
    cost = answer["kernels"]["rounded_inputs"]
    if not any(name.startswith("native") for name in answer["kernels"]["selected"]):
        assert cost is None
        return
    assert cost["layers"] == sum(answer["kernels"]["selected"].values())
    assert abs(cost["kl_mean"]) < share * answer["quality"]["kl_mean"]
    assert kernel != "auto-int8" or cost["kl_mean"] > 1e-3 * answer["quality"]["kl_mean"]


@pytest.mark.usefixtures("crowded", "each_committed")
def test_two_that_do_not_fit_are_compared_by_stored_predictions(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_predictions, "TOP", 16)  # of a vocabulary of 256: so that there is a tail
    loaded: list[str] = []
    original = measure.load_model
    monkeypatch.setattr(measure, "load_model", lambda c, *a: loaded.append(c.folder.name) or original(c, *a))
    stored = ask()
    assert loaded == ["artifact", "tiny-llama", "artifact"]
    assert "16 stored and 64 sampled probabilities of each token" in stored["quality"]["path"]
    assert "B beside it" in stored["quality"]["path"]
    assert "B beside it" in stored["output_errors"]["skipped"]
    streamed = ask_streamed(ask, monkeypatch)
    found, expected = stored["quality"], streamed["quality"]
    assert 0 < found["kl_mean_bound"] < 0.05 * expected["kl_mean"]
    assert abs(found["kl_mean"] - expected["kl_mean"]) <= found["kl_mean_bound"] + 1e-6  # float32 sums
    assert abs(found["kl_max"] - expected["kl_max"]) <= found["kl_token_bound"] + 1e-6
    for name in ("perplexity", "baseline_perplexity", "top1_agreement", "rms_dp", "perplexity_ratio_se"):
        assert found[name] == expected[name], name
    assert stored["sample"] == streamed["sample"]


def ask_streamed(ask: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(measure._Measurement, "crowding", lambda self: None)
    found = ask(resume=False)
    assert found["quality"]["path"] == "side by side"
    assert found["quality"]["kl_mean_bound"] == 0
    return found


@pytest.mark.usefixtures("crowded", "each_committed")
def test_predictions_go_on_too_and_serve_the_next_model(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(resume=False)["quality"]
    with monkeypatch.context() as patch:
        dying(patch, stored_predictions, "predict", 4)
        with pytest.raises(KeyboardInterrupt):
            ask()
    original, seen = stored_predictions.predict, []
    monkeypatch.setattr(stored_predictions, "predict", lambda *a: seen.append(a[-1]) or original(*a))
    assert json.dumps(ask()["quality"]["windows"]) == json.dumps(whole["windows"])
    assert seen == [4, 5, 6, 7, 8]
    monkeypatch.setattr(measure._Measurement, "load_baseline", lambda self: pytest.fail("all predictions are there"))
    assert ask()["quality"]["kl_mean"] == whole["kl_mean"]


@pytest.mark.parametrize("protocol", ["gptq", "sliding", "llama.cpp", "word"])
def test_every_protocol_compares(ask: Any, protocol: str) -> None:
    found = ask(protocol=protocol, stride=8, windows=2, output_errors=0)
    assert found["protocol"]["name"].startswith(f"{protocol}-32")
    assert found["protocol"]["unit"] == ("word" if protocol == "word" else "token")
    assert 0 < found["quality"]["kl_mean"] < 1
    assert found["output_errors"] is None


def test_a_model_beside_itself(tiny_llama: Path, tmp_path: Path, in_process: None) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    settings = {"text": str(tmp_path / "text.txt"), "context": 32, "windows": 2, "speed": None}
    found = evaluate(tiny_llama, settings=settings, baseline=tiny_llama)
    assert (found["quality"]["kl_mean"], found["quality"]["kl_max"], found["quality"]["rms_dp"]) == (0, 0, 0)
    assert found["quality"]["perplexity_ratio"] == found["quality"]["top1_agreement"] == 1
    assert found["sample"]["text"] == found["sample"]["baseline_text"]
    assert found["output_errors"]["layers"] == []
    assert {block["cumulative_error"] for block in found["output_errors"]["blocks"]} == {0.0}


def test_both_models_compute_with_the_baseline_s_dtype(ask: Any, tiny_llama: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, {"scheme": "int4-g32", "dtype": "float16"}, tmp_path / "half")
    assert ask(folder=tmp_path / "half", windows=2, output_errors=0)["dtype"] == "bfloat16"
    assert ask(folder=tmp_path / "half", windows=2, output_errors=0, baseline=False)["dtype"] == "float16"


def test_costs(ask: Any) -> None:
    speed = {"prompt": [4, 8], "generate": 3, "batch": [1, 2], "repeats": 2}
    found = ask(baseline=False, windows=2, speed=speed)
    assert [(line["batch"], line["prompt"]) for line in found["speed"]] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    for line in found["speed"]:
        assert line["bytes_per_second"] > 0
        assert line["bandwidth_share"] == pytest.approx(line["bytes_per_second"] / found["bandwidth"])
        assert line["first_token_seconds"]["median"] > 0
    memory = found["memory"]
    assert memory["kv_cache_bytes_per_token"] > 0
    assert [fit["card_gib"] for fit in memory["fits"]] == [8, 12, 16, 24, 48, 80]
    assert {fit["context"] for fit in memory["fits"]} == {256}  # all that so small a model can hold
    assert memory["peak_rss_bytes"] > 50e6  # Python and torch alone
    assert found["sample"]["baseline_text"] is None


def test_a_prompt_that_the_model_cannot_hold_is_cut(ask: Any) -> None:
    speed = {"prompt": [250, 4096], "generate": 6, "batch": [1], "repeats": 1}
    found = ask(baseline=False, windows=1, speed=speed)
    assert [line["prompt"] + line["generate"] <= 256 for line in found["speed"]] == [True, True]


def test_a_load_that_does_not_fit_is_told_and_not_tried(ask: Any) -> None:
    speed = {"prompt": 4, "generate": 3, "batch": [1, 10**12], "repeats": 1}
    fits, too_large = ask(baseline=False, windows=1, speed=speed)["speed"]
    assert "skipped" not in fits
    assert "B are free" in too_large["skipped"]
    assert (too_large["batch"], too_large["prompt"], "decode" in too_large) == (10**12, 4, False)


@pytest.mark.parametrize("baseline", [False, True])
def test_a_model_that_gives_nan_is_an_error_with_its_name(
    ask: Any, artifact: Path, monkeypatch: pytest.MonkeyPatch, baseline: bool
) -> None:
    original = measure.load_model

    def spoiled(checkpoint: Any, *rest: Any) -> Any:
        model = original(checkpoint, *rest)
        if checkpoint.folder == artifact:
            model.lm_head.weight.data[3] = float("nan")
        return model

    monkeypatch.setattr(measure, "load_model", spoiled)
    with pytest.raises(NumericsError, match="artifact: the model's logits are NaN"):
        ask(baseline, windows=2)


def test_tasks_without_lm_eval_are_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitpress.pipeline.config.schema import Run
    from bitpress.pipeline.runs.run import execute

    monkeypatch.setattr("bitpress.pipeline.system.packages.find_spec", lambda name: None)
    run = Run.model_validate(
        {
            "name": "t",
            "models": [{"id": str(tiny_llama)}],
            "recipes": ["int4-g32"],
            "output": str(tmp_path / "runs"),
            "eval": {"tasks": ["arc_easy"]},
        }
    )
    with pytest.raises(ConfigError, match=r"eval\.tasks: the lm-eval package is not installed; pip install "):
        list(execute(run, "", lambda line: None))
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_that_gives_other_tokens_is_told(
    artifact: Path, tiny_llama: Path, copy_of: Any, ask: Any, tmp_path: Path, in_process: None
) -> None:
    assert ask()["warnings"] == []
    other = copy_of(artifact, "other")
    whole = json.loads((other / "tokenizer.json").read_text())
    names = sorted(whole["model"]["vocab"], key=whole["model"]["vocab"].get)
    whole["model"]["vocab"] = {name: number for number, name in enumerate(names[::-1])}
    (other / "tokenizer.json").write_text(json.dumps(whole))
    settings = {"text": str(tmp_path / "text.txt"), "context": 32, "windows": 2, "speed": None, "output_errors": 0}
    found = evaluate(other, None, "cpu", settings, tiny_llama)
    assert found["quality"]["kl_mean"] > 0
    (warning,) = found["warnings"]
    assert "own tokenizer gives other tokens than its baseline's (the first that differs is number 1)" in warning


def test_where_texts_begin_with_bos_so_do_windows(ask: Any, tiny_llama: Path, artifact: Path, monkeypatch: Any) -> None:
    class Beginning:
        bos_token_id, eos_token_id = 7, 255

        def __init__(self, inner: Any):
            self.inner = inner

        def __call__(self, text: str, **settings: Any) -> Any:
            return {"input_ids": [7, *self.inner(text, add_special_tokens=False)["input_ids"]]}

    plain = ask(baseline=False)["protocol"]
    assert (plain["name"], plain.get("bos")) == ("gptq-32", None)
    original = measure.load_tokenizer
    monkeypatch.setattr(measure, "load_tokenizer", lambda folder: Beginning(original(folder)))
    monkeypatch.setattr(measure, "sample", lambda *arguments: "")
    monkeypatch.setattr(measure.bos, "TENFOLD", 1.0)  # a random model cares little
    found = ask(baseline=False)
    assert (found["protocol"]["name"], found["protocol"]["bos"]) == ("gptq-32+bos", "each window")
    assert "this model depends on BOS" in found["warnings"][0]
    first = ask(baseline=False, bos="first", resume=False)["protocol"]
    assert (first["name"], first["bos"]) == ("gptq-32", "the first window alone")
