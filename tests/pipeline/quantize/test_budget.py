"""Schemes are chosen so that the artifact meets a size at the least divergence."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitpress.eval.report.tables import budget_tables
from bitpress.pipeline.api import load
from bitpress.pipeline.config.budget import Budget
from bitpress.pipeline.data.calibration import Calibration, hold_out
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.quantize import budget
from bitpress.pipeline.quantize.budget import Front, Search
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.quantize.sequential import REFERENCE_LOGITS, CalibratedBlocks
from bitpress.pipeline.quantize.statistics import SHARED
from bitpress.pipeline.storage.checkpoint import Checkpoint, read_json
from bitpress.pipeline.storage.files import sha256_file
from bitpress.pipeline.storage.fingerprint import MANIFEST

CHOICES = ["int2-g32", "int4-g32", "int8-g32"]


@pytest.fixture
def budgeted(learn, tmp_path, tiny_llama) -> Any:
    """budgeted("4 bits"): the folder of the artifact; all share what is kept beside it."""

    def make(text: str, **changes: Any) -> Path:
        out = tmp_path / Budget.parse(text).name
        settings = {"method": "auto", "scheme": "auto", "budget": text, "choices": CHOICES, **changes}
        learn(tiny_llama, out, shared=tmp_path / "kept", **settings)
        return out

    return make


class TestFront:
    def test_is_the_best_of_all_combinations(self):
        rng = np.random.default_rng(0)
        sizes, losses = rng.integers(1, 30, (5, 4)), rng.random((5, 4))
        front = Front.of(sizes.tolist(), losses.tolist())
        every = list(itertools.product(range(4), repeat=5))
        for limit in range(int(sizes.min(1).sum()), int(sizes.max(1).sum()) + 1):
            point = int(np.searchsorted(front.nbytes, limit, side="right")) - 1
            fitting = [own for own in every if sum(sizes[n, c] for n, c in enumerate(own)) <= limit]
            assert front.kl[point] == pytest.approx(min(sum(losses[n, c] for n, c in enumerate(o)) for o in fitting))
            own = front.choice(point)
            assert sum(sizes[n, c] for n, c in enumerate(own)) == front.nbytes[point] <= limit
            assert sum(losses[n, c] for n, c in enumerate(own)) == pytest.approx(front.kl[point])

    def test_too_many_points_are_thinned(self, monkeypatch):
        rng = np.random.default_rng(1)
        sizes, losses = rng.integers(1, 1 << 40, (8, 4)).tolist(), rng.random((8, 4)).tolist()
        exact = Front.of(sizes, losses)
        monkeypatch.setattr(budget, "_MOST_POINTS", 64)
        front = Front.of(sizes, losses)
        assert len(front.nbytes) <= 64
        point = len(front.nbytes) // 2
        own = front.choice(point)
        assert sum(sizes[n][c] for n, c in enumerate(own)) == front.nbytes[point]
        best = exact.kl[int(np.searchsorted(exact.nbytes, front.nbytes[point], side="right")) - 1]
        assert best <= front.kl[point] < 1.3 * best


def test_an_artifact_of_bits(budgeted):
    out = budgeted("4 bits")
    manifest = read_json(out / MANIFEST)
    chosen, layers = manifest["budget"], manifest["coverage"]["layers"]
    nbytes, weights = sum(each["bytes"] for each in layers), sum(np.prod(each["shape"]) for each in layers)
    assert 8 * nbytes / weights == pytest.approx(chosen["bits"])
    assert 3 < chosen["bits"] <= 4
    assert len({layer["scheme"] for layer in layers}) > 1
    schemes = {layer["name"]: layer["scheme"] for layer in layers}
    for block in (0, 1):
        for fused in (("q", "k", "v"), ("gate", "up")):
            own = [f for f in schemes if f".{block}." in f and f.rpartition(".")[2].removesuffix("_proj") in fused]
            assert len({schemes[name] for name in own}) == 1
    assert chosen["predicted_kl"] == pytest.approx(sum(unit["kl"] for unit in chosen["units"]))
    assert chosen["solutions_kl"] == pytest.approx(chosen["predicted_kl"], rel=0.5)
    curve = chosen["curve"]
    assert [p["bits"] for p in curve] == sorted(p["bits"] for p in curve)
    assert [p["predicted_kl"] for p in curve] == sorted((p["predicted_kl"] for p in curve), reverse=True)
    assert [each["choice"] for each in chosen["uniform"]] == CHOICES
    model, _ = load(out)
    assert model(input_ids=torch.arange(3, 40)[None]).logits.isfinite().all()


def test_an_artifact_of_bytes(budgeted, tiny_llama):
    whole = sum(path.stat().st_size for path in tiny_llama.iterdir() if path.is_file())
    text = f"{(whole + 70_000) / 1000:.1f} kB"
    out = budgeted(text)
    assert sum(path.stat().st_size for path in out.iterdir()) <= Budget.parse(text).nbytes
    with pytest.raises(ConfigError, match=r"cannot be met: the smallest choices take 3.*raise the budget"):
        budgeted("10 kB")


def test_another_budget_costs_its_packing_alone_or_one_more_solution(budgeted, monkeypatch):
    budgeted("4 bits")
    for kind, name in ((CalibratedBlocks, "solve_block"), (Search, "_weigh")):
        monkeypatch.setattr(kind, name, lambda *a: pytest.fail("it was done before"))
    assert read_json(budgeted("5 bits") / MANIFEST)["budget"]["bits"] <= 5
    monkeypatch.setattr(CalibratedBlocks, "_collect", lambda *a: pytest.fail("all was solved before"))
    chosen = read_json(budgeted("4.5 bits", sequential=False) / MANIFEST)["budget"]
    assert chosen["measured_kl"] == pytest.approx(chosen["solutions_kl"], rel=1e-6)


def test_what_was_chosen_is_solved_as_a_recipe_of_the_same_schemes(budgeted, learn, tiny_llama, tmp_path):
    """Block after block, on what the quantized ones before put out; it learns from no window that estimates costs."""
    manifest = read_json((out := budgeted("4 bits")) / MANIFEST)
    schemes = {layer["name"]: layer["scheme"] for layer in manifest["coverage"]["layers"]}
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    settings = {"method": "gptq", "scheme": CHOICES[0], "layers": schemes, "format": manifest["recipe"]["format"]}
    learn(tiny_llama, tmp_path / "rules", calibration=Calibration("a text", hold_out(ids, 1)[0], 0), **settings)
    names = [path.name for path in out.glob("*.safetensors")]
    assert names
    assert all(sha256_file(out / name) == sha256_file(tmp_path / "rules" / name) for name in names)
    assert manifest["budget"]["measured_kl"] != manifest["budget"]["solutions_kl"]


def test_costs_are_estimated_on_what_no_solution_was_fitted_to(learn, tiny_llama, tmp_path):
    ids = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(1))
    settings = {"method": "auto", "scheme": "auto", "budget": "4 bits", "choices": CHOICES}
    solutions, costs = [], []
    for number, text in enumerate((ids, torch.cat((ids[:7], ids[7:].flip(1))))):
        calibration = Calibration("a text", text, 0)
        learn(tiny_llama, tmp_path / f"{number}", shared=tmp_path / "kept", calibration=calibration, **settings)
        (folder,) = {path.parent for path in (tmp_path / "kept").glob("*/00000.safetensors")} - {*solutions}
        solutions.append(folder)
        costs.append([unit["costs"] for unit in read_json(tmp_path / f"{number}" / MANIFEST)["budget"]["units"]])
    first, second = ([sha256_file(path) for path in sorted(own.glob("*.safetensors"))] for own in solutions)
    assert first == second
    assert costs[0] != costs[1]


def test_one_scheme_for_all_is_taken_where_it_measures_better(budgeted, monkeypatch):
    measure = Search.measure

    def worse(search, chosen):
        return measure(search, chosen) + (chosen not in search.uniform.values())

    monkeypatch.setattr(Search, "measure", worse)
    chosen = read_json(budgeted("6 bits") / MANIFEST)["budget"]
    uniform = chosen["uniform"][1]
    assert {unit["choice"] for unit in chosen["units"]} == {uniform["choice"]} == {"int4-g32"}
    assert chosen["nbytes"] == uniform["nbytes"] < chosen["curve"][-1]["nbytes"]
    (_, _, curve, _), _ = budget_tables("", chosen)
    said = f"int4-g32 everywhere, chosen within 6bits, measures {uniform['solutions_kl']:.5f}"
    assert said in [row[-1] for row in curve]


def test_rules_leave_no_choice(budgeted):
    rules = {"*.down_proj": "int8-g32", "*.0.self_attn.o_proj": "none", "*.embed_tokens.*": "int8-channel"}
    out = budgeted("5 bits", layers=rules)
    schemes = {each["name"]: each["scheme"] for each in read_json(out / MANIFEST)["coverage"]["layers"]}
    assert schemes["model.layers.1.mlp.down_proj"] == "int8-g32"
    assert schemes["model.embed_tokens"] == "int8-channel"  # for which the choices' own format has no place
    assert "model.layers.0.self_attn.o_proj" not in schemes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": "4.25"}, "expected bits per weight"),
        ({"budget": "0 bits"}, "0 holds nothing"),
        ({"budget": "4 bits", "scheme": "int4-g128"}, "take scheme out"),
        ({"budget": "4 bits", "choices": ["none"]}, "nothing to choose"),
        ({"budget": "4 bits", "choices": ["int5-g32"]}, "int5"),
        ({"scheme": "int4-g128", "choices": ["int4-g32"]}, "for a budget to choose from"),
    ],
)
def test_refusals(settings, said):
    with pytest.raises(ConfigError, match=said):
        Recipe.make(settings)


@pytest.mark.parametrize(
    ("text", "name", "nbytes"),
    [("4.25 bits", "4.25bits", None), ("4.1 GB", "4.1GB", 4_100_000_000), ("3gib", "3GiB", 3 << 30)],
)
def test_texts(text, name, nbytes):
    assert (Budget.parse(text).name, Budget.parse(text).nbytes) == (name, nbytes)
    assert Recipe.make(f"gptq/{name}").budget == Budget.parse(text)


@pytest.mark.parametrize(
    "changes", [{}, {"transform": "awq", "method": "tune", "options": {"steps": 2}}, {"distill": 2}]
)
def test_goes_on_where_it_was_killed(learn, tmp_path, tiny_llama, killed_at, changes):
    settings = {"method": "auto", "scheme": "auto", "budget": "4 bits", "choices": CHOICES, **changes}
    learn(tiny_llama, tmp_path / "whole", **settings)
    expected = (tmp_path / "whole" / MANIFEST).read_bytes()
    for kill in (4, 12):  # while it searches, and while it packs
        with killed_at(kill):
            learn(tiny_llama, tmp_path / f"killed{kill}", **settings)
        learn(tiny_llama, tmp_path / f"killed{kill}", **settings)
        assert (tmp_path / f"killed{kill}" / MANIFEST).read_bytes() == expected


def test_a_transform_comes_before_all_solutions(learn, outliers, tmp_path):
    out, settings = tmp_path / "out", {"scheme": "auto", "budget": "4 bits", "choices": CHOICES, "transform": "awq"}
    learn(outliers, out, **settings)
    manifest = read_json(out / MANIFEST)
    scaled = [line for line in manifest["transform"] if line["after"] < line["before"]]
    assert scaled
    assert manifest["recipe"]["transform"] == "awq"
    kept = [line["name"] for line in manifest["coverage"]["kept"] if line["name"].endswith("layernorm.weight")]
    after_norms = any(name.endswith(("q_proj", "gate_proj")) for line in scaled for name in line["layers"])
    changed = any(not torch.equal(Checkpoint(out).read(name), Checkpoint(outliers).read(name)) for name in kept)
    assert changed == after_norms  # which layers gain by a scale, the machine's rounding has a say in
    ids = Checkpoint.single(tmp_path / "out.partial" / REFERENCE_LOGITS).read("ids")[None]
    q, p = (load(folder, dtype="float32")[0](input_ids=ids).logits.log_softmax(-1) for folder in (out, outliers))
    assert (p.exp() * (p - q)).sum(-1).mean().item() < 3 * manifest["budget"]["measured_kl"]


@pytest.mark.parametrize("sequential", [True, False])
def test_static_inputs_are_among_the_choices(budgeted, sequential):
    """What their rounding costs takes part in the choice; what was calibrated of them is kept with the solutions."""
    out = budgeted("7 bits", choices=["int4-channel", "int8-static"], sequential=sequential)
    manifest = read_json(out / MANIFEST)
    assert {layer["scheme"] for layer in manifest["coverage"]["layers"]} == {"int4-channel", "int8-static"}
    assert any(name.endswith("input_scale") for name in Checkpoint(out).tensors)
    assert load(out)[0](input_ids=torch.arange(3, 40)[None]).logits.isfinite().all()


def test_blocks_are_learned_within_a_budget(budgeted):
    manifest = read_json(budgeted("4 bits", method="tune", options={"steps": 2}) / MANIFEST)
    assert [line["block"] for line in manifest["coverage"]["tuned"]] == [0, 1]
    assert len({layer["scheme"] for layer in manifest["coverage"]["layers"]}) > 1


def test_clean(budgeted, tmp_path):
    (tmp_path / SHARED).mkdir()
    assert budget.clean(tmp_path) == [tmp_path / SHARED]
    assert budget.clean(tmp_path) == []


def test_tables(budgeted):
    chosen = read_json(budgeted("4 bits") / MANIFEST)["budget"]
    (_, _, curve, note), (_, _, units, _) = budget_tables("", chosen, 0.5)
    assert [row[1] for row in units] == [unit["choice"] for unit in chosen["units"]]
    assert sum(row[-1] == "chosen within 4bits" for row in curve) == 1
    assert "0.50000 on the text" in note


def test_tables_of_a_record_from_before_solutions_had_a_figure(budgeted):
    chosen = read_json(budgeted("4 bits") / MANIFEST)["budget"]
    figures = ("nbytes", "solutions_kl")
    uniform = [{key: own for key, own in each.items() if key not in figures} for each in chosen["uniform"]]
    before = {key: own for key, own in chosen.items() if key != "solutions_kl"} | {"uniform": uniform}
    (_, _, curve, note), _ = budget_tables("", before, 0.5)
    assert sum(row[-1] == "chosen within 4bits" for row in curve) == 1
    assert "as they were probed" not in note
    assert f"measures {chosen['measured_kl']:.5f} on them, and 0.50000 on the text" in note
