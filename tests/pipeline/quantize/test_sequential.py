"""Blocks are quantized on what the quantized ones before them put out: what is refused, counted and kept."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bitpress.kernels.scheme import Scheme
from bitpress.pipeline import api
from bitpress.pipeline.config.schema import Run
from bitpress.pipeline.data.calibration import Calibration
from bitpress.pipeline.errors import ConfigError, HubError, NumericsError
from bitpress.pipeline.evaluate import measure, verify, worker
from bitpress.pipeline.formats import registry as formats
from bitpress.pipeline.methods.absmax import Absmax
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.quantize import block_runner, sequential, weights
from bitpress.pipeline.quantize.block_runner import BlockRunner
from bitpress.pipeline.quantize.plan import PlannedTensor
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.quantize.sequential import CalibratedBlocks
from bitpress.pipeline.runs import run as runner
from bitpress.pipeline.storage import files
from bitpress.pipeline.storage.checkpoint import Checkpoint, read_json

Learn = Callable[..., list[str]]
Digests = Callable[[Path], dict[str, str]]
OTHER_TEXT = Calibration("b", torch.arange(32).view(2, 16), 0)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class Broken(Exception):
    """What ends a run before its time."""


@pytest.fixture
def broken(learn: Learn, out: Path) -> Callable[..., Path]:
    """broken(source, units): the work folder of a run that ended when so many shards were made."""

    def job(source: Path, units: int, **changes: Any) -> Path:
        def stop(done: int, total: int) -> None:
            if done == units:
                raise Broken

        with pytest.raises(Broken):
            learn(source, out, stop, **changes)
        assert not out.exists()
        return out.with_name(f"{out.name}.partial")

    return job


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The blocks that are quantized from now on."""
    made: list[str] = []
    original = CalibratedBlocks.quantize_block
    monkeypatch.setattr(CalibratedBlocks, "quantize_block", lambda *a: made.append(a[1].name) or original(*a))
    return made


@pytest.fixture
def hessians(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Layer -> the Hessian that it was given."""
    found: dict[str, Tensor] = {}
    original = weights.quantize_weight

    def spy(planned: PlannedTensor, weight: Tensor, plan: Any, method: Any, statistics: Any = ()) -> Any:
        for hessian in statistics:
            found[planned.module] = hessian.matrix().double()
        return original(planned, weight, plan, method, statistics)

    monkeypatch.setattr(weights, "quantize_weight", spy)
    return found


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def layers(artifact: Path) -> dict[str, dict[str, Any]]:
    return {layer["name"]: layer for layer in read_json(artifact / "bitpress.json")["coverage"]["layers"]}


class TestTakenUpAgain:
    def test_from_the_inputs_on_the_disk(
        self, source: Path, out: Path, tmp_path: Path, broken: Any, learn: Learn, digests: Digests, made: list[str]
    ) -> None:
        work = broken(source, 2)
        assert [path.name for path in (work / "states").iterdir()] == ["00001.safetensors"]
        stray, seen = work / "states" / "00007.safetensors", []
        stray.write_text("left behind")
        made.clear()
        assert learn(source, out, lambda done, total: seen.append(stray.exists())) == []
        assert (seen[0], seen[-1]) == (True, False)
        assert made == ["block 1"]
        learn(source, tmp_path / "unbroken")
        assert digests(out) == digests(tmp_path / "unbroken")
        assert digests(work) == digests(tmp_path / "unbroken.partial")
        assert not (work / "states").exists()

    @pytest.mark.parametrize("change", [Path.unlink, flip], ids=["missing", "damaged"])
    def test_lost_inputs_are_said_and_all_blocks_made_again(
        self, source: Path, out: Path, change: Any, broken: Any, learn: Learn, made: list[str]
    ) -> None:
        change(broken(source, 2) / "states" / "00001.safetensors")
        made.clear()
        said = "00001.safetensors, the inputs of block 1, is not as it was written; all blocks made again"
        assert learn(source, out) == [said]
        assert made == ["block 0", "block 1"]

    @pytest.mark.parametrize(("number", "again"), [(1, ["block 1"]), (2, ["block 0", "block 1"])])
    def test_a_damaged_shard_is_said_and_made_again(
        self, source: Path, out: Path, number: int, again: list[str], broken: Any, learn: Learn, made: list[str]
    ) -> None:
        shard = broken(source, 2) / "artifact.tmp" / f"model-0000{number}-of-00003.safetensors"
        flip(shard)
        made.clear()
        assert learn(source, out) == [f"{shard.name} is not as it was written; made again"]
        assert made == again

    def test_what_a_finished_run_did_not_come_to_delete(self, source: Path, out: Path, learn: Learn) -> None:
        """Killed between publishing the artifact and deleting the states."""
        learn(source, out)
        states = out.with_name("out.partial") / "states"
        states.mkdir()
        assert learn(source, out) == ["finished before, verified"]
        assert not states.exists()

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"seed": 1}, "quantize.calibration.sha256: was"),
            ({"calibration": OTHER_TEXT}, "quantize.calibration.text: was 'a text', is 'b'"),
            ({"calibration": OTHER_TEXT}, "quantize.calibration.windows: was 4, is 2"),
            ({"calibration": Calibration("a text", OTHER_TEXT.ids, 5)}, "quantize.calibration.seed: was 0, is 5"),
            ({"options": {"damping": 0.5}}, "quantize.gptq.damping: was "),
            ({"options": {"true_sequential": True}}, "quantize.gptq.true_sequential: was False, is True"),
            ({"options": {"by_gradient": False}}, "quantize.gptq.by_gradient: was True, is False"),
        ],
    )
    def test_what_changed_is_refused_by_name(
        self, source: Path, out: Path, changes: dict[str, Any], said: str, broken: Any, learn: Learn
    ) -> None:
        broken(source, 1)
        with pytest.raises(ConfigError) as unfinished:
            learn(source, out, **changes)
        assert said in str(unfinished.value)
        learn(source, out)
        with pytest.raises(ConfigError) as finished:
            learn(source, out, **changes)
        assert said in str(finished.value)

    def test_another_device_is_refused_until_the_artifact_is_finished(
        self, source: Path, out: Path, broken: Any, learn: Learn
    ) -> None:
        """Blocks from two devices do not go together; a finished artifact is what it is."""
        broken(source, 1)
        with pytest.raises(ConfigError, match="device: was 'cpu', is 'meta'"):
            learn(source, out, device="meta")
        learn(source, out)
        assert learn(source, out, device="meta") == ["finished before, verified"]

    def test_another_number_of_threads_is_refused_until_the_artifact_is_finished(
        self, source: Path, out: Path, broken: Any, learn: Learn
    ) -> None:
        """The order of sums, and with it a code now and then, depends on it."""
        broken(source, 2)
        try:
            torch.set_num_threads(2)
            with pytest.raises(ConfigError, match="threads: was 1, is 2"):
                learn(source, out)
            torch.set_num_threads(1)
            learn(source, out)
            torch.set_num_threads(2)
            assert learn(source, out) == ["finished before, verified"]
        finally:
            torch.set_num_threads(1)


class TestFallback:
    """Fault 30."""

    @pytest.fixture
    def silent(self, source: Path, edit_tensors: Any) -> Path:
        """A model whose last down_proj is given nothing but zeros."""
        edit_tensors(source / "model.safetensors", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].zero_())
        return source

    def test_fails_by_name_again_and_again(self, silent: Path, out: Path, learn: Learn) -> None:
        for _ in range(2):
            with pytest.raises(NumericsError) as caught:
                learn(silent, out)
            assert caught.value.exit_code == 4
            said = "1 layers fell back to absmax, max_fallback_layers is 0; give more or other calibration text"
            assert said in str(caught.value)
            assert "model.layers.1.mlp.down_proj: its inputs were always 0" in str(caught.value)
            assert not out.exists()

    def test_as_many_as_are_allowed_are_counted(self, silent: Path, out: Path, learn: Learn, made: list[str]) -> None:
        with pytest.raises(NumericsError):
            learn(silent, out)
        made.clear()
        (note,) = learn(silent, out, max_fallback_layers=1)
        assert made == [], "what was finished serves"
        assert note == "1 layers fell back to absmax:\n  model.layers.1.mlp.down_proj: its inputs were always 0"
        found = layers(out)
        assert [name for name, layer in found.items() if "fallback" in layer] == ["model.layers.1.mlp.down_proj"]
        assert sum("damping" in layer for layer in found.values()) == len(found) - 1

    def test_a_finished_artifact_with_more_of_them_is_refused(self, silent: Path, out: Path, learn: Learn) -> None:
        learn(silent, out, max_fallback_layers=1)
        with pytest.raises(NumericsError, match="max_fallback_layers is 0"):
            learn(silent, out)
        assert learn(silent, out, max_fallback_layers=1) == ["finished before, verified"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layer", ["model.layers.1.mlp.up_proj", "model.layers.1.input_layernorm"])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    source: Path, out: Path, layer: str, value: float, learn: Learn, edit_tensors: Any
) -> None:
    """Fault 25."""
    edit_tensors(source / "model.safetensors", lambda tensors: tensors[f"{layer}.weight"].view(-1)[3:5].fill_(value))
    with pytest.raises(NumericsError, match=rf"{layer}\.weight: 2 of \d+ values are NaN or infinite"):
        learn(source, out)
    assert not out.exists()


def test_a_scale_beyond_float16_is_refused_with_the_layers_name(
    source: Path, out: Path, learn: Learn, edit_tensors: Any
) -> None:
    edit_tensors(
        source / "model.safetensors", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(1e6)
    )
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj\.weight: a scale of .* does not fit torch.float"):
        learn(source, out)


def test_experts_that_see_few_tokens_are_rounded_by_absmax_and_named(tiny: Any, out: Path, learn: Learn) -> None:
    """Fewer than twice as many as their inputs, 64 here: none of them sees so many of the 64 tokens of the text."""
    source = tiny("mixtral", num_experts_per_tok=1)
    (note,) = learn(source, out)
    found = layers(out)
    experts = {name: layer for name, layer in found.items() if ".experts." in name}
    assert note.startswith(f"{len(experts)} layers are special:\n  model.layers.0.block_sparse_moe.experts.0.w1")
    assert len(experts) == 2 * 4 * 3
    assert not any("fallback" in layer for layer in found.values())
    assert all(layer["note"].startswith("rounded by absmax: it saw fewer than") for layer in experts.values())
    assert not any("note" in layer for name, layer in found.items() if name not in experts)
    seen = [layer["tokens"] for name, layer in experts.items() if "layers.0" in name and name.endswith("w1")]
    assert sum(seen) == 64
    name = "model.layers.1.block_sparse_moe.experts.2.w3"
    checkpoint, recipe = Checkpoint(source), Recipe.make("gptq/int4-g32")
    expected, _ = Absmax().quantize(checkpoint.read(f"{name}.weight"), recipe.rules.default.scheme, torch.float16)
    artifact = Checkpoint(out)
    for suffix, tensor in formats()["gptq"].write(expected, torch.float32).items():
        assert torch.equal(artifact.read(f"{name}.{suffix}"), tensor), suffix


@pytest.mark.parametrize("options", [{}, {"true_sequential": True}])
def test_how_many_hessians_are_in_memory_changes_no_byte(
    options: dict[str, Any], tiny: Any, tmp_path: Path, learn: Learn, digests: Digests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of experts one at a time, each from a pass of its own over all tokens, and all at once."""
    collect = BlockRunner.collect
    most: list[int] = []

    def counting(self: BlockRunner, wanted: Any, inputs: Any, devices: Any) -> Any:
        most[-1] = max(most[-1], sum(planned.target.expert is not None for planned, _ in wanted))
        return collect(self, wanted, inputs, devices)

    monkeypatch.setattr(BlockRunner, "collect", counting)
    for limit in (1, sequential.MOST_STATISTICS):
        most.append(0)
        monkeypatch.setattr(sequential, "MOST_STATISTICS", limit)
        learn(tiny("mixtral"), tmp_path / str(limit), options=options)
    assert most[0] == 1 < most[1]
    first, second = (digests(tmp_path / str(limit)) for limit in (1, sequential.MOST_STATISTICS))
    assert first == second


# what is divided: layers of a block and of its stages, experts, other statistics, foldings, blocks that do not wait
DIVIDED: dict[str, tuple[str, dict[str, Any]]] = {
    "layers": ("llama", {"options": {"by_gradient": False}}),
    "stages": ("gpt2", {"options": {"true_sequential": True}}),
    "experts": ("mixtral", {"num_hidden_layers": 2}),
    "gradients": ("llama", {}),
    "gradients of unquantized blocks": ("llama", {"sequential": False}),
    "inputs": ("llama", {"method": "auto", "scheme": "int8-static"}),
    "transform": ("llama", {"options": {"by_gradient": False}, "transform": "awq"}),
    "gradients of what is scaled": ("llama", {"transform": "awq"}),
    "blocks": ("llama", {"options": {"by_gradient": False}, "sequential": False}),
    "budget": ("llama", {"method": "auto", "scheme": "auto", "budget": "5 bits", "choices": ["int3-g32"]}),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_how_many_devices_there_are_changes_no_byte(
    name: str, tiny: Any, tmp_path: Path, learn: Learn, digests: Digests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers and batches of text are divided among them: here a CPU that counts as two devices."""
    used: dict[str, set[str]] = {"layers": set(), "batches": set()}
    solve, device = weights.quantize_weight, BlockRunner._device

    def note_layer(planned: PlannedTensor, weight: Tensor, plan: Any, *rest: Any) -> Any:
        used["layers"].add(threading.current_thread().name.partition("_")[0])
        return solve(planned, weight, plan, *rest)

    def note_batch(self: BlockRunner, batch: int) -> torch.device:
        used["batches"].add(str(device(self, batch)))
        return device(self, batch)

    monkeypatch.setattr(block_runner, "BATCH_TOKENS", {"cpu": 16})
    monkeypatch.setattr(weights, "quantize_weight", note_layer)
    monkeypatch.setattr(BlockRunner, "_device", note_batch)
    architecture, settings = DIVIDED[name]
    layers = settings.pop("num_hidden_layers", None)
    source = tiny(architecture, **({"num_hidden_layers": layers} if layers else {}))
    learn(source, tmp_path / "one", **settings)
    assert used["batches"] == {"cpu"}
    learn(source, tmp_path / "two", more_devices=("cpu:1",), **settings)
    assert used["batches"] == {"cpu", "cpu:1"}
    beside = any("device" in thread or "ThreadPool" in thread for thread in used["layers"])
    assert beside == (name != "stages")  # each of which has one group of layers
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


class TestOrder:
    """What each layer's Hessian is of, told by hooks on the model that was made."""

    @pytest.mark.parametrize("sequential", [True, False])
    def test_layers_learn_from_the_quantized_ones_before_them(
        self, tiny: Any, out: Path, sequential: bool, learn: Learn, hessians: dict[str, Tensor]
    ) -> None:
        """All of them (true_sequential), or those of the blocks before theirs."""
        learn(tiny("llama"), out, options={"true_sequential": sequential, "by_gradient": False})
        model, given = load_model(Checkpoint(out), torch.device("cpu"), "float32", "reference"), {}

        def note(name: str, x: Tensor) -> None:
            rows = x.double().flatten(0, -2)
            given[name] = rows.t() @ rows

        for name in hessians:
            model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: note(name, x[0]))
        with torch.no_grad():
            model(input_ids=torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0)))
        assert len(hessians) == 14
        far = {name for name, found in hessians.items() if (found - given[name]).norm() > 1e-4 * given[name].norm()}
        first = {name for name in hessians if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")}
        assert far == (set() if sequential else set(hessians) - first)


def test_three_state_files_at_most(source: Path, out: Path, learn: Learn, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, original = [], files.write_rows

    def spy(path: Path, *arguments: Any) -> Any:
        written = original(path, *arguments)
        counts.append(len(list(path.parent.iterdir())))
        return written

    monkeypatch.setattr(files, "write_rows", spy)
    learn(source, out)
    assert len(counts) == 2  # the inputs of both blocks
    assert max(counts) <= 3


class TestReferenceLogits:
    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("llama", {}),
            ("gemma2", {"scheme": "int8-static"}),
            ("gpt2", {"scheme": "int8-static-asym", "layers": {"*mlp*": "fp8-static"}}),
            ("llama", {"scheme": "fp8-dynamic", "layers": {"lm_head": "int8-dynamic"}}),
            ("llama", {"scheme": "int8-dynamic", "method": "tune", "options": {"steps": 4}}),
            ("mixtral", {"scheme": "int8-dynamic", "transform": "smooth"}),
            ("gpt2", {"scheme": "int8-dynamic", "distill": {"steps": 2, "windows": 1}}),
            ("qwen2", {"budget": "5.5 bits", "choices": ["int4-g32-int8-dynamic", "int8-dynamic", "int4-g32"]}),
            ("llama", {"budget": "8.48 bits", "choices": ["int8-static", "int8-static-asym"], "sequential": False}),
        ],
        ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())) or "int4-g32",
    )
    def test_the_artifact_is_what_was_in_memory(
        self, name: str, changes: dict[str, Any], tiny: Any, out: Path, learn: Learn, proved: Any
    ) -> None:
        """To the bit, as the same tokens go through it in the same order: inputs are rounded in memory, too."""
        learn(tiny(name), out, **({"method": "auto", "scheme": "auto"} if "budget" in changes else {}) | changes)
        found = proved(out)
        assert (found["tokens"], found["max_difference"]) == (16, 0)
        rounded = any(
            layer["scheme"].endswith(("dynamic", "static", "asym"))
            for layer in read_json(out / "bitpress.json")["coverage"]["layers"]
        )
        assert found["tolerance"] == (3e-2 if rounded else 1e-5)

    @pytest.mark.parametrize(
        ("scheme", "suffix", "factor"),
        [
            ("int4-g32", "q_proj.scales", 1.01),
            ("int4-g32", "down_proj.qweight", 1.01),
            ("int4-g32", "input_layernorm.weight", 1.01),
            ("int4-g32", "lm_head", 1.01),
            ("int8-static", "input_scale", 0.5),
        ],
    )
    def test_the_check_fails_where_it_is_not(
        self,
        tiny: Any,
        out: Path,
        scheme: str,
        suffix: str,
        factor: float,
        learn: Learn,
        edit_tensors: Any,
        proved: Any,
    ) -> None:
        learn(tiny("llama"), out, scheme=scheme)

        def spoil(tensors: dict[str, Tensor]) -> None:
            for name in tensors:
                if suffix in name:
                    tensors[name] = tensors[name] * factor if tensors[name].is_floating_point() else tensors[name] ^ 1

        for path in out.glob("*.safetensors"):
            edit_tensors(path, spoil)
        with pytest.raises(NumericsError, match="reloaded from its files it gives other logits than in memory"):
            proved(out)

    def test_is_asked_for_where_it_is_gone(self, tiny: Any, out: Path, learn: Learn) -> None:
        learn(tiny("llama"), out)
        recipe = replace(Recipe.make("gptq/int4-g32"), calibration=OTHER_TEXT)
        with pytest.raises(
            ConfigError, match=r"reference_logits\.safetensors is missing, by which the artifact is verified"
        ):
            verify.verify_artifact(Checkpoint(out), recipe, out, OTHER_TEXT.ids[0], "cpu", "auto")


class TestJobs:
    @pytest.fixture
    def text(self, tmp_path: Path) -> str:
        path = tmp_path / "a.txt"
        path.write_text("".join(f"{number} bottles of beer" for number in range(100, 400)))
        return str(path)

    def run(self, tmp_path: Path, model: Path, text: str) -> runner.Outcome:
        evaluation = {"text": str(Path(__file__).parents[3] / "README.md"), "context": 64, "windows": 2, "speed": None}
        defaults = {"calibration": {"text": text, "windows": 3, "context": 32}}
        chosen = {"name": "trial", "models": [{"id": str(model)}], "recipes": ["gptq/int4-g32"], "device": "cpu"}
        run = Run(**chosen, eval=evaluation, defaults=defaults, output=str(tmp_path / "runs"))
        return runner.execute(run, "", print)[-1]

    @pytest.fixture
    def here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a fresh process would do is done in this one."""
        tasks = {"verify": verify.verify_task, "measure": measure.measure_task}
        monkeypatch.setattr(worker, "call", lambda task, request: tasks[task](request))

    @pytest.mark.usefixtures("here")
    def test_run(self, tmp_path: Path, tiny_llama: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        outcome = self.run(tmp_path, tiny_llama, text)
        assert outcome.error is None
        assert "calibrated on a.txt: 3 windows of 32 tokens" in capsys.readouterr().out
        assert outcome.metrics["method"] == "gptq"
        assert outcome.metrics["reload"]["tokens"] == 32
        assert 0 < outcome.metrics["quality"]["kl_mean"] < 1
        files = {path.name for path in outcome.folder.iterdir()}
        assert {"reference_logits.safetensors", "artifact", "report.html"} <= files
        assert not (outcome.folder / "states").exists()
        assert self.run(tmp_path, tiny_llama, text).error is None
        assert "finished before, verified" in capsys.readouterr().out

    @pytest.mark.usefixtures("here")
    def test_run_notices_an_artifact_that_is_not_what_was_in_memory(
        self, tmp_path: Path, tiny_llama: Path, text: str, monkeypatch: pytest.MonkeyPatch, edit_tensors: Any
    ) -> None:
        publish = files.publish_folder

        def widen(tensors: dict[str, Tensor]) -> None:
            tensors.update({name: tensors[name] * 1.5 for name in tensors if name.endswith("o_proj.scales")})

        def spoil(folder: Path, out: Path) -> None:
            publish(folder, out)
            for path in out.glob("*.safetensors"):
                edit_tensors(path, widen)

        monkeypatch.setattr(files, "publish_folder", spoil)
        outcome = self.run(tmp_path, tiny_llama, text)
        assert isinstance(outcome.error, NumericsError)
        assert "other logits than in memory" in str(outcome.error)
        assert not (outcome.folder / "metrics.json").exists()

    def test_api(self, tmp_path: Path, tiny_llama: Path, text: str) -> None:
        settings = {"text": text, "windows": 3, "context": 32}
        for name in ("one", "two"):
            recipe = {"method": "gptq", "scheme": "int4-g32", "calibration": settings}
            notes = api.quantize(tiny_llama, recipe, tmp_path / name).notes
            assert notes == ["calibrated on a.txt: 3 windows of 32 tokens"]
        shards = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
        assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in shards)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "one", "two"]

    def test_the_default_text_without_a_network(
        self, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        datasets = pytest.importorskip("datasets")

        def unreachable(*arguments: Any, **options: Any) -> Any:
            raise ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        with pytest.raises(HubError) as caught:
            api.quantize(tiny_llama, "gptq/int4-g32", tmp_path / "out")
        assert "Salesforce/wikitext" in str(caught.value)
        assert "or calibrate on a file: a recipe's calibration or --calibration" in str(caught.value)
        assert list(tmp_path.iterdir()) == []


class TestLayersOfTheirOwn:
    """Layers with other schemes and methods than the rest, in one pass through the blocks."""

    RULES: ClassVar[dict[str, str]] = {
        "*.down_proj": "absmax/int4-g32",
        "model.layers.0.self_attn.*": "none",
        "lm_head": "gptq/int4-g32",
    }

    @pytest.fixture
    def mixed(self, tiny: Any, out: Path, learn: Learn, hessians: dict[str, Tensor]) -> Path:
        self.notes = learn(tiny("llama"), out, layers=self.RULES, format="compressed-tensors")
        return out

    def test_each_layer_by_its_own_method(self, mixed: Path, tiny: Any, hessians: dict[str, Tensor]) -> None:
        blocks = [f"model.layers.{number}" for number in (0, 1)]
        projections = [f"self_attn.{name}_proj" for name in "qkvo"]
        gptq = {f"{blocks[1]}.{name}" for name in projections} | {
            f"{b}.mlp.{n}_proj" for b in blocks for n in ("gate", "up")
        }
        down = {f"{block}.mlp.down_proj" for block in blocks}
        reports = layers(mixed)
        assert reports.keys() == gptq | down | {"lm_head"}
        assert hessians.keys() == gptq
        assert {name for name, report in reports.items() if "damping" in report} == gptq
        source, artifact, format = Checkpoint(tiny("llama")), Checkpoint(mixed), formats()["compressed-tensors"]
        for name in down:
            expected, _ = Absmax().quantize(source.read(f"{name}.weight"), Scheme.parse("int4-g32"), torch.float32)
            for suffix, tensor in format.write(expected, torch.float32).items():
                assert torch.equal(artifact.read(f"{name}.{suffix}"), tensor), (name, suffix)
        for name in projections:
            kept = f"{blocks[0]}.{name}.weight"
            assert torch.equal(artifact.read(kept), source.read(kept))

    def test_a_head_is_rounded_to_nearest_and_says_why(self, mixed: Path) -> None:
        said = "rounded by absmax: gptq is calibrated inside the decoder blocks only"
        assert layers(mixed)["lm_head"]["note"] == said
        assert self.notes[-1] == f"1 layers are special:\n  lm_head: {said}"

    def test_the_reference_logits_are_those_of_the_artifact(self, mixed: Path, proved: Any) -> None:
        assert proved(mixed)["max_difference"] == 0


def test_a_kept_block_is_passed_through(tiny: Any, out: Path, learn: Learn, proved: Any) -> None:
    learn(tiny("llama"), out, layers={"model.layers.0.*": "none"})
    assert all(name.startswith("model.layers.1.") for name in layers(out))
    assert proved(out)["max_difference"] == 0


def test_true_sequential_layers_beside_others(
    tiny: Any, out: Path, learn: Learn, hessians: dict[str, Tensor], proved: Any
) -> None:
    """down_proj, of a method that is not, is quantized before the stages of the others begin."""
    rules = {"*.down_proj": "absmax/int4-g32"}
    learn(tiny("llama"), out, layers=rules, options={"true_sequential": True}, format="compressed-tensors")
    assert len(layers(out)) == 14
    assert len(hessians) == 12
    assert proved(out)["max_difference"] == 0
