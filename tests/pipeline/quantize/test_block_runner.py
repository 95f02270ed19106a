"""The runner from block to block, against transformers' own forward of the whole model."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.pytorch_utils import Conv1D

from bitpress.pipeline.errors import CheckpointError, NumericsError
from bitpress.pipeline.methods.gptq import GPTQ
from bitpress.pipeline.methods.hessian import GradientHessian, Hessian
from bitpress.pipeline.quantize import block_runner as module
from bitpress.pipeline.quantize.block_runner import BlockRunner, BlockView, apart, divide, work_on
from bitpress.pipeline.quantize.plan import Plan, PlannedTensor, make_plan
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.storage.checkpoint import Checkpoint

WINDOWS, CONTEXT = 3, 24
Tiny = Callable[..., Path]


@pytest.fixture(autouse=True)
def two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two windows and one of one."""
    monkeypatch.setattr(module, "BATCH_TOKENS", {"cpu": 2 * CONTEXT, "meta": 2 * CONTEXT})


def ids() -> Tensor:
    return torch.randint(3, 96, (WINDOWS, CONTEXT), generator=torch.Generator().manual_seed(1))


def planned(folder: Path, *skip: str) -> tuple[Checkpoint, Plan]:
    checkpoint = Checkpoint(folder)
    settings = {"method": "gptq", "scheme": "int4-channel", "format": "compressed-tensors", "allow_split_fused": True}
    return checkpoint, make_plan(checkpoint, Recipe.make({**settings, "layers": dict.fromkeys(skip, "none")}))


def start(folder: Path, *skip: str) -> tuple[BlockRunner, Plan]:
    checkpoint, plan = planned(folder, *skip)
    outside = [entry for entry in plan.tensors if entry.block is None]
    return BlockRunner(checkpoint, outside, ids(), torch.float32, "cpu"), plan


@torch.no_grad()
def logits(runner: BlockRunner, outputs: Tensor) -> Tensor:
    """What the model makes of the last block's outputs for the first windows."""
    with runner.outside_in_memory():
        return runner.head(outputs, runner.batches[0][: len(outputs)])


def blocks(runner: BlockRunner, plan: Plan, states: list[Tensor]) -> Iterator[list[PlannedTensor]]:
    """Loads block after block; `states` holds the batches of its inputs, and of the last one's outputs at the end."""
    states += runner.embed()
    for unit in plan.units:
        if unit.block is not None:
            runner.load_block(unit.block, ((entry, runner.checkpoint.read(entry.info.name)) for entry in unit.tensors))
            yield [entry for entry in unit.tensors if entry.spec]
            states[:] = [*runner.outputs(states)]
            runner.unload_block()


def hessians_of(runner: BlockRunner, groups: list[list[PlannedTensor]], states: list[Tensor]) -> list[Hessian]:
    """Of each group's inputs, over these batches."""
    return [found[Hessian] for found in runner.collect([(group[0], (Hessian,)) for group in groups], states)]


def whole(folder: Path) -> Any:
    """As transformers loads it, its experts one after the other, as the runner has them."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


@torch.no_grad()
def products(model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int | None], Tensor]:
    """X^T X in float64 of the inputs of every linear layer and of every expert's two products, over all windows: by
    hooks on modules, and for experts, which are slices of one parameter, by what is given to `linear`."""
    found: dict[tuple[str, int | None], Tensor] = {}
    slices = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            slices |= {parameter[expert].data_ptr(): (name, expert) for expert in range(len(parameter))}

    def note(key: tuple[str, int | None], x: Tensor) -> None:
        rows = x.double().reshape(-1, x.shape[-1])
        found[key] = found.get(key, torch.zeros(())) + rows.t() @ rows

    original = nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.data_ptr() in slices:
            note(slices[weight.data_ptr()], x)
        return original(x, weight, bias)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            layer.register_forward_pre_hook(lambda _, x, name=name: note((f"{name}.weight", None), x[0]))
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", linear)
        model(input_ids=ids())
    return found


def test_block_by_block_as_the_whole_model(architecture: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits, and (fault 33) Hessians of all tokens and of nothing else."""
    folder = tiny(architecture)
    model = whole(folder)
    with torch.no_grad():
        expected = model(input_ids=ids(), use_cache=False).logits
    reference = products(model, monkeypatch)
    (runner, plan), states, called = start(folder), [], []
    for entries in blocks(runner, plan, states):
        groups = runner.groups(entries, states[0])
        for group, hessian in zip(groups, hessians_of(runner, groups, states)):
            assert (hessian.tokens, hessian.dropped) == (WINDOWS * CONTEXT, 0)
            found, dead = hessian.matrix().double(), hessian.dead()
            found[dead, dead] = 0
            for entry in group:
                target = entry.target
                called.append(entry.info.name)
                one = reference[(target.parameter, target.expert[0] if target.expert else None)]
                size = one.diagonal().sqrt()
                # sums of 72 float32 products, of inputs that themselves agree to float32
                assert ((found - one).abs() <= 1e-5 * torch.outer(size, size)).all(), entry.module
    assert sorted(called) == sorted(entry.info.name for entry in plan.quantized), "each layer once"
    # the same operations in float32, on two windows at a time rather than three
    torch.testing.assert_close(logits(runner, states[0]), expected[:2], rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(runner, states[0][:1]), logits(runner, states[0])[:1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_on_several_threads(name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches go through a block side by side, and are summed in their order all the same."""
    monkeypatch.setattr(module, "BATCH_TOKENS", {"cpu": CONTEXT})
    made: list[list[Tensor]] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            (runner, plan), states, hessians = start(tiny(name)), [], []
            for entries in blocks(runner, plan, states):
                groups = runner.groups(entries, states[0])
                hessians += [hessian.matrix() for hessian in hessians_of(runner, groups, states)]
            assert torch.get_num_threads() == threads
            made.append([*hessians, *states])
    finally:
        torch.set_num_threads(1)
    for one, two, three in zip(*made):
        # each product may be summed in another order; float32
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(three, one, rtol=1e-4, atol=1e-4)


SHARING = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "mixtral": [["q_proj", "k_proj", "v_proj"], ["o_proj"], *[["w1", "w3"], ["w2"]] * 4],
}


@pytest.mark.parametrize("name", SHARING)
def test_layers_that_read_the_same_are_found_in_the_order_of_their_calls(name: str, tiny: Tiny) -> None:
    (runner, plan), states = start(tiny(name)), []
    for entries in blocks(runner, plan, states):
        groups = runner.groups(entries[::-1], states[0])
        leaves = [sorted(entry.module.rpartition(".")[2] for entry in group) for group in groups]
        assert [sorted(group) for group in SHARING[name]] == leaves
        experts = [[entry.module.split(".")[-2] for entry in group] for group in groups if group[0].target.expert]
        assert experts == [[number] * count for number in "0123" for count in (2, 1)][: len(experts)]


def test_experts_that_the_first_batch_does_not_reach_come_last(tiny: Tiny) -> None:
    """One expert of 32 for each token: gate and up of each are together all the same."""
    (runner, plan), states = start(tiny("mixtral", num_experts_per_tok=1, num_experts=32, num_local_experts=32)), []
    for entries in blocks(runner, plan, states):
        groups = runner.groups(entries, states[0])
        assert sorted(entry.module for group in groups for entry in group) == sorted(e.module for e in entries)
        experts = [group for group in groups if group[0].target.expert]
        assert sorted(len(group) for group in experts) == [1] * 32 + [2] * 32
        first = hessians_of(runner, experts, states[:1])
        tokens = {group[0].target.expert[0]: hessian.tokens for group, hessian in zip(experts, first)}
        assert sum(tokens.values()) == 2 * CONTEXT
        assert 0 in tokens.values()
        reached = [tokens[group[0].target.expert[0]] > 0 for group in experts]
        assert reached == sorted(reached, reverse=True)
        whole_text = hessians_of(runner, experts, states)
        assert sum(h.tokens for group, h in zip(experts, whole_text) if len(group) == 2) == WINDOWS * CONTEXT


def test_one_blocks_weights_are_in_memory(tiny: Tiny) -> None:
    (runner, plan), states = start(tiny("llama")), []
    for number, _ in enumerate(blocks(runner, plan, states)):
        held = {name for name, parameter in runner.model.named_parameters() if parameter.device.type != "meta"}
        assert held
        assert all(name.startswith(f"model.layers.{number}.") for name in held)
    assert all(parameter.device.type == "meta" for parameter in runner.model.parameters())
    logits(runner, states[0])
    assert all(parameter.device.type == "meta" for parameter in runner.model.parameters())


def test_masks_and_positions_are_held_once(tiny: Tiny) -> None:
    runner, _ = start(tiny("llama"))
    list(runner.embed())
    assert [len(calls) for calls in runner._calls] == [2, 2, 2]
    first, second = (calls[1].options["position_embeddings"] for calls in runner._calls[:2])
    assert first[0] is second[0]


@pytest.mark.parametrize("name", ["gpt_neo", "llama"])
def test_buffers_are_where_the_work_is(name: str, tiny: Tiny) -> None:
    """Masks that blocks keep for themselves among them."""
    checkpoint, plan = planned(tiny(name))
    runner = BlockRunner(checkpoint, [], ids(), torch.float32, "meta")
    for part in [runner.model, *runner._real]:
        assert all(buffer.device.type == "meta" for buffer in part.buffers())
    assert plan


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "gpt2"])
def test_a_batch_goes_through_a_copy_on_its_device(name: str, tiny: Tiny) -> None:
    """Weights, masks, positions and inputs: torch refuses to mix devices, here with one that holds no values."""
    checkpoint, plan = planned(tiny(name))
    outside = [entry for entry in plan.tensors if entry.block is None]
    runner = BlockRunner(checkpoint, outside, ids(), torch.float32, "cpu", more_devices=["meta"])
    states: list[Tensor] = []
    for _ in blocks(runner, plan, states):
        break
    first, second = map(runner._forwards(), enumerate(states))
    assert (first.device.type, second.device.type) == ("cpu", "meta")
    assert second.shape == states[1].shape
    assert all(parameter.device.type == "cpu" for parameter in runner.model.get_submodule(runner.path)[0].parameters())


def test_the_heaviest_layers_are_divided_first(tiny: Tiny) -> None:
    runner, plan = start(tiny("llama"))
    states: list[Tensor] = []
    groups = next(runner.groups(entries, states[0]) for entries in blocks(runner, plan, states))
    assert divide(groups, 1) == [0, 0, 0, 0]
    chosen = divide(groups, 2)
    loads = [sum(work_on(group) for group, part in zip(groups, chosen) if part == each) for each in range(2)]
    best = min(
        max(sum(map(work_on, part)), sum(map(work_on, groups)) - sum(map(work_on, part)))
        for count in range(5)
        for part in itertools.combinations(groups, count)
    )
    assert max(loads) == best


class TestInfinite:
    """Fault 34."""

    def hessian(self, folder: Path, bad: int, value: float) -> Any:
        """Of down_proj in block 0, `bad` of whose 72 inputs have a value that is not finite."""
        (runner, plan), states = start(folder), []
        entries = next(blocks(runner, plan, states))
        (entry,) = [entry for entry in entries if entry.module.endswith("down_proj")]
        rest = bad

        def spoil(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            nonlocal rest
            spoiled = inputs[0].clone()
            rows = spoiled.view(-1, spoiled.shape[-1])
            rows[:rest, 7] = value
            rest -= min(rest, len(rows))
            return (spoiled,)

        runner.layer(entry).register_forward_pre_hook(spoil)
        (found,) = hessians_of(runner, [[entry]], states)
        return found

    @pytest.mark.parametrize("value", [torch.inf, torch.nan])
    def test_a_token_now_and_then_is_left_out_and_counted(
        self, value: float, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_MOST_DROPPED", 1 / 72)
        found = self.hessian(tiny("llama"), 1, value)
        assert (found.tokens, found.dropped) == (71, 1)
        assert torch.isfinite(found.matrix()).all()

    def test_more_than_one_in_a_hundred_is_refused_by_name(self, tiny: Tiny) -> None:
        with pytest.raises(NumericsError, match=r"layers\.0\.mlp\.down_proj: 2 of 72 calibration tokens gave it NaN"):
            self.hessian(tiny("llama"), 2, torch.inf)


def scaled(model: Any, hidden: Tensor) -> Any:
    for layer in model.layers:
        hidden = layer(hidden * 2)


def added_to(model: Any, hidden: Tensor) -> Any:
    for layer in model.layers:
        hidden = layer(hidden)
        hidden += 1


def backwards(model: Any, hidden: Tensor) -> Any:
    for layer in reversed(model.layers):
        hidden = layer(hidden)


def none(model: Any, hidden: Tensor) -> Any:
    return hidden


def twice(model: Any, hidden: Tensor) -> Any:
    for layer in [model.layers[0], *model.layers]:
        hidden = layer(hidden)


def pairs(model: Any, hidden: Tensor) -> Any:
    for layer in model.layers:
        hidden, _ = layer(hidden)


def second(model: Any, hidden: Tensor) -> Any:
    bias = None
    for layer in model.layers:
        outputs = layer(hidden, bias)
        hidden, bias = outputs[0], outputs[1]


def asked(model: Any, hidden: Tensor) -> Any:
    for layer in model.layers:
        hidden = layer(hidden + layer.mlp.up_proj.weight.sum())


def copies(model: Any, hidden: Tensor) -> Any:
    hidden = torch.stack([hidden, hidden])
    for layer in model.layers:
        hidden = layer(hidden)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (scaled, "block 1 reads something else"),
        (added_to, "block 1 reads something else than what the block before it puts out"),
        (backwards, "block 0 reads something else"),
        (none, "not all of them are called"),
        (twice, "block 0 reads something else"),
        (pairs, "several outputs of a block are wanted"),
        (second, "output 1 of a block is wanted"),
        (asked, ".* has no attribute 'mlp'"),
        (copies, r"they read tensors of shape \[2, 2, 24, 64\] for \[2, 24\] tokens"),
    ],
)
def test_models_that_are_no_chain_of_blocks_are_refused(
    forward: Callable[..., Any], said: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def instead(self: LlamaModel, input_ids: Tensor, **options: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=forward(self, self.embed_tokens(input_ids)))

    runner, _ = start(tiny("llama"))
    monkeypatch.setattr(LlamaModel, "forward", instead)
    with pytest.raises(CheckpointError, match=rf"LlamaForCausalLM is no plain chain of blocks \(({said})") as caught:
        list(runner.embed())
    assert "use a method that needs no calibration" in str(caught.value)


class TestRealModels:
    """That the checks above are met by what transformers has, on both sides."""

    def save(self, kind: str, folder: Path, **extra: Any) -> Path:
        shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        config = getattr(transformers, kind)(**{**shape, **heads, **extra})
        AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
        return folder

    def test_a_model_that_asks_its_blocks_what_they_are(self, tmp_path: Path) -> None:
        mixer = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "head_dim": 16}
        folder = self.save("NemotronHConfig", tmp_path, hybrid_override_pattern="M*", **mixer)
        (runner, plan), states = start(folder, "*conv1d*"), []
        for _ in blocks(runner, plan, states):
            pass
        with torch.no_grad():
            expected = whole(folder)(input_ids=ids()[:2], use_cache=False).logits
        torch.testing.assert_close(logits(runner, states[0]), expected, rtol=1e-5, atol=1e-5)

    def test_a_block_that_gives_a_list(self, tmp_path: Path) -> None:
        folder = self.save("OpenAIGPTConfig", tmp_path, n_positions=64)
        (runner, plan), states = start(folder), []
        for _ in blocks(runner, plan, states):
            pass
        with torch.no_grad():
            expected = whole(folder)(input_ids=ids()[:2]).logits
        torch.testing.assert_close(logits(runner, states[0]), expected, rtol=1e-5, atol=1e-5)

    def test_a_model_that_rescales_its_blocks(self, tmp_path: Path) -> None:
        runner, _ = start(self.save("RwkvConfig", tmp_path), "*time_*")
        with pytest.raises(CheckpointError, match="RwkvForCausalLM is no plain chain of blocks"):
            list(runner.embed())


class TestBlockView:
    """What a method sees of a block, and may change."""

    NORMS: ClassVar[dict[str, dict[str, str]]] = {
        "llama": {"q_proj k_proj v_proj": "input_layernorm", "gate_proj up_proj": "post_attention_layernorm"},
        "phi3": {"qkv_proj": "input_layernorm", "gate_up_proj": "post_attention_layernorm"},
        "opt": {"k_proj v_proj q_proj": "self_attn_layer_norm", "fc1": "final_layer_norm"},
        "gpt2": {"c_attn": "ln_1", "c_fc": "ln_2"},
        "gpt_neox": {"query_key_value": "input_layernorm", "dense_h_to_4h": "post_attention_layernorm"},
        "mixtral": {"q_proj k_proj v_proj": "input_layernorm"},  # its experts and its router read a reshaped copy
    }

    def view(self, folder: Path, *skip: str) -> tuple[BlockView, list[Tensor]]:
        """Of the first block, all of whose layers gptq quantizes, but for some that are kept."""
        (runner, plan), states = start(folder, *skip), []
        next(blocks(runner, plan, states))
        tensors = next(unit.tensors for unit in plan.units if unit.block == 0)
        weights = {planned.info.name: runner.checkpoint.read(planned.info.name) for planned in tensors}
        assert plan.quantized[0].spec
        method = plan.quantized[0].spec.method
        return BlockView(runner, tensors, weights, lambda: iter(states), method), states

    @pytest.mark.parametrize("name", NORMS)
    def test_groups_and_the_norm_before_each(self, name: str, tiny: Tiny) -> None:
        view, _ = self.view(tiny(name))
        found = {}
        for group in view.groups:
            leaves = {layer.rpartition(".")[2] for layer in group.layers}
            if group.norm is not None:
                found[frozenset(leaves)] = group.norm.rpartition(".")[2]
                assert view.tensor(f"{group.norm}.weight").shape == (64,)
        assert found == {frozenset(leaves.split()): norm for leaves, norm in self.NORMS[name].items()}

    def test_kept_layers_that_read_the_same_are_among_them(self, tiny: Tiny) -> None:
        view, _ = self.view(tiny("llama"), "*.v_proj", "*.o_proj")
        groups = [[layer.rpartition(".")[2] for layer in group.layers] for group in view.groups]
        assert sorted(groups[0]) == ["k_proj", "q_proj", "v_proj"]
        assert [sorted(group) for group in groups[1:]] == [["gate_proj", "up_proj"], ["down_proj"]]

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_what_is_set_is_what_the_block_computes_with(self, name: str, tiny: Tiny) -> None:
        view, states = self.view(tiny(name))
        before = [*view.outputs(view.inputs())]
        last = view.groups[-1].layers[0]
        weight = view.tensor(f"{last}.weight")
        assert weight.shape == (64, 128 if name == "llama" else 256)
        view.set(f"{last}.weight", weight * 0)
        assert torch.equal(view.tensor(f"{last}.weight"), weight * 0)
        after = [*view.outputs(states)]
        assert not torch.equal(after[0], before[0])
        view.set(f"{last}.weight", weight)
        assert all(map(torch.equal, view.outputs(states), before))

    def test_statistics_are_of_each_groups_inputs(self, tiny: Tiny) -> None:
        view, _ = self.view(tiny("llama"))
        found = view.collect(Hessian)
        assert [len(hessian.matrix()) for hessian in found] == [64, 64, 64, 128]
        (rows,) = {hessian.tokens for hessian in found}
        assert rows == WINDOWS * CONTEXT

    def test_a_scaled_layer_as_its_method_will_quantize_it(self, tiny: Tiny) -> None:
        view, _ = self.view(tiny("llama"))
        (folding,) = (each for each in view.foldings if each and each.group.layers[0].endswith("down_proj"))
        (layer,), scale = folding.group.layers, torch.randint(-3, 3, (128,)).float().exp2()
        judged = view.as_quantized(layer, scale)
        view.fold(folding, scale)
        scheme, hessian = view.scheme(layer), view.collect(GradientHessian)[-1]
        assert scheme
        weight = view.tensor(f"{layer}.weight")
        expected, _ = GPTQ().quantize(weight.float(), scheme, torch.float32, (hessian,))
        assert judged is not None
        assert torch.equal(judged, expected.dequantize())

    # what each group's inputs are made by: a norm's name, or the layer before
    FOLDINGS: ClassVar[dict[str, dict[str, str | None]]] = {
        "llama": {
            "k_proj": "input_layernorm",
            "o_proj": "v_proj",
            "gate_proj": "post_attention_layernorm",
            "down_proj": "up_proj",
        },
        "phi3": {
            "qkv_proj": "input_layernorm",
            "o_proj": "qkv_proj",
            "gate_up_proj": "post_attention_layernorm",
            "down_proj": "gate_up_proj",
        },
        # GELU comes before the last layer; the norms multiply by 1 + weight in gemma2
        "gpt2": {"c_attn": "ln_1", "attn.c_proj": "c_attn", "c_fc": "ln_2", "mlp.c_proj": None},
        "gemma2": {"k_proj": None, "o_proj": "v_proj", "gate_proj": None, "down_proj": "up_proj"},
    }

    @pytest.mark.parametrize("name", FOLDINGS)
    def test_scales_fold_into_what_makes_the_inputs(self, name: str, tiny: Tiny) -> None:
        """And the block computes the same bits, whatever the powers of two."""
        view, states = self.view(tiny(name))
        made_by = {}
        for group, folding in zip(view.groups, view.foldings):
            layer = min(layer for layer in group.layers)
            short = next(key for key in self.FOLDINGS[name] if layer.endswith(key))
            made_by[short] = folding.tensors[0].rsplit(".", 2)[1] if folding else None
        assert made_by == self.FOLDINGS[name]
        before = [*view.outputs(states)]
        for number, folding in enumerate(view.foldings):
            if folding:
                rows = int(folding.rows.max()) + 1
                view.fold(folding, ((torch.arange(rows) + number) % 5 - 2).float().exp2()[folding.rows])
        assert all(map(torch.equal, view.outputs(states), before))

    def test_heads_that_share_values_share_a_scale(self, tiny: Tiny) -> None:
        view, _ = self.view(tiny("llama"))
        (values,) = [each for each in view.foldings if each and each.tensors[0].endswith("v_proj.weight")]
        heads = torch.arange(32).view(2, 1, 16).expand(2, 2, 16)  # two value heads of 16, each of two query heads
        assert torch.equal(values.rows, heads.reshape(-1))

    def test_what_does_not_fit_is_refused(self, tiny: Tiny) -> None:
        view, _ = self.view(tiny("gpt2"))
        name = "transformer.h.0.mlp.c_fc.weight"
        with pytest.raises(ValueError, match=r"is set to shape \[64, 256\], expected \[256, 64\]"):
            view.set(name, view.tensor(name).t())
        with pytest.raises(ValueError, match="'c_fc' is no tensor of the block"):
            view.set("c_fc", torch.zeros(1))
        spoiled = view.tensor(name).clone()
        spoiled[3, 5] = torch.nan
        with pytest.raises(NumericsError, match=r"c_fc\.weight: 1 of 16384 values are NaN or infinite"):
            view.set(name, spoiled)


class TestByGradient:
    """Inputs weighted by how an error of the layer's output moves the block's."""

    def test_weights_of_tokens(self, tiny: Tiny) -> None:
        """The gradient is that by a shift of the layer's outputs, which is 0 here."""
        (runner, plan), states = start(tiny("llama")), []
        for entries in blocks(runner, plan, states):
            for entry in entries:
                inputs, shifts = [], []

                def shifted(module: Any, x: Any, y: Tensor, inputs: Any = inputs, shifts: Any = shifts) -> Tensor:
                    inputs.append(x[0].detach().flatten(0, -2).double())
                    shifts.append(torch.zeros_like(y, requires_grad=True))
                    return y + shifts[-1]

                expected = torch.zeros(entry.shape[1], entry.shape[1], dtype=torch.float64)
                with runner.layer(entry).register_forward_hook(shifted):
                    for number, batch in enumerate(states):
                        outputs = runner.differentiable(number, batch)
                        generator = torch.Generator().manual_seed(number)
                        signs = 2 * torch.randint(0, 2, outputs.shape, generator=generator, dtype=torch.int8) - 1
                        sizes = outputs.detach().norm(dim=-1, keepdim=True)
                        (signs * outputs / sizes).sum().backward()
                        importance = shifts[-1].grad.double().square().flatten(0, -2).sum(-1)
                        expected += inputs[-1].t() @ (importance.unsqueeze(1) * inputs[-1])
                (found,) = runner.collect([(entry, (GradientHessian,))], states)
                matrix, dead = found[GradientHessian].matrix().double(), found[GradientHessian].dead()
                matrix[dead, dead] = 0
                size = expected.diagonal().sqrt()
                # sums of 72 float32 products, of factors with a few roundings each
                assert ((matrix - expected).abs() <= 1e-5 * torch.outer(size, size)).all(), entry.module
                assert found[GradientHessian].tokens == WINDOWS * CONTEXT

    def test_where_nothing_moves_the_block_all_tokens_count_alike(self, tiny: Tiny) -> None:
        """As in layers before one of zeros, by which blocks are left out or new ones begin."""
        (runner, plan), states = start(tiny("llama")), []
        for entries in blocks(runner, plan, states):
            layers = {entry.module.rpartition(".")[2]: entry for entry in entries}
            runner.set_tensor(layers["down_proj"], torch.zeros(layers["down_proj"].info.shape))
            (found,) = runner.collect([(layers["gate_proj"], (Hessian, GradientHessian))], states)
            alike, weighted = (found[kind].matrix() for kind in (Hessian, GradientHessian))
            torch.testing.assert_close(weighted / weighted.norm(), alike / alike.norm())

    def test_beside_other_statistics(self, tiny: Tiny) -> None:
        """A layer's other statistics are of the inputs as they are."""
        (runner, plan), states = start(tiny("llama")), []
        for entries in blocks(runner, plan, states):
            layers = list(itertools.chain.from_iterable(runner.groups(entries, states[0])))
            both = runner.collect([(each, (Hessian, GradientHessian)) for each in layers], states)
            alone = runner.collect([(each, (Hessian,)) for each in layers], states)
            for one, other in zip(both, alone, strict=True):
                assert torch.equal(one[Hessian].matrix(), other[Hessian].matrix())
                assert not torch.equal(one[GradientHessian].matrix(), other[Hessian].matrix())

    def test_layers_of_one_input_stand_alone(self, tiny: Tiny) -> None:
        (runner, plan), states = start(tiny("llama")), []
        for entries in blocks(runner, plan, states):
            groups = runner.groups(entries, states[0])
            assert [len(group) for group in groups] == [3, 1, 2, 1]
            assert apart(groups, [Hessian]) == groups
            assert apart(groups, [Hessian, GradientHessian]) == [[each] for group in groups for each in group]
