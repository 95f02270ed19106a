"""generate with one call a token: the same as transformers' own loop, in all that it serves."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SMALL
from torch import Tensor
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from bitpress.kernels.cpu.library import library
from bitpress.kernels.decoder_layer import NativeDecoder
from bitpress.pipeline.api import quantize
from bitpress.pipeline.errors import NumericsError
from bitpress.pipeline.models import optimize
from bitpress.pipeline.models.generation import FiniteLogits
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.storage.checkpoint import Checkpoint

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason=str(library()))

SHAPE = {**SMALL, "max_position_embeddings": 256, "eos_token_id": None}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
CAPPED = Gemma2Config(**SHAPE, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, final_logit_softcapping=5.0)
IDS = torch.tensor([[5, 9, 2, 31, 7]])


class Twelfth(StoppingCriteria):
    """Stops at the twelfth token, and looks at nothing else."""

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] == 12)


class Listener:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., Path]) -> Callable[..., Path]:
    """pressed(config): the folder of a quantized model. Read only."""

    def press(config: PreTrainedConfig, **recipe: Any) -> Path:
        folder = tmp_path_factory.mktemp("next")
        quantize(save_model(config, folder / "source"), {"scheme": "int4-g32", **recipe}, folder / "int4")
        return folder / "int4"

    return press


@pytest.fixture(scope="module")
def llama(pressed: Callable[..., Path]) -> PreTrainedModel:
    return load(pressed(LlamaConfig(**SHAPE)))


def load(folder: Path) -> PreTrainedModel:
    return load_model(Checkpoint(folder), torch.device("cpu"), "bfloat16", "auto")


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, with transformers' own loop."""
    copied: Any = copy.deepcopy(model)
    del copied.generate, copied.decoding
    return copied


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that NativeDecoder.next was called with."""
    tokens: list[int] = []
    following = NativeDecoder.next

    def counted(self: NativeDecoder, token: int, *more: Any) -> int:
        tokens.append(token)
        return following(self, token, *more)

    monkeypatch.setattr(NativeDecoder, "next", counted)
    return tokens


def text(model: Any, **how: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model.generate(IDS, **{"max_new_tokens": 20, "do_sample": False, **how})


@pytest.mark.parametrize(
    "how",
    [
        {}, {"max_new_tokens": 80}, {"do_sample": True, "top_k": 9}, {"do_sample": True, "top_p": 0.9},
        {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2, "min_new_tokens": 3}, {"max_new_tokens": 1},
        {"eos_token_id": list(range(48))}, {"stopping_criteria": StoppingCriteriaList([Twelfth()])},
    ],
    ids=lambda how: ", ".join(how) or "greedy",
)  # fmt: skip
def test_the_same_tokens_from_one_call_each(how: dict[str, Any], llama: PreTrainedModel, calls: list[int]):
    listeners = Listener(), Listener()
    want = text(plain(llama), streamer=listeners[1], **how)
    assert calls == []
    got = text(llama, streamer=listeners[0], **how)
    assert torch.equal(got, want)
    assert calls == want[0, 5:-1].tolist()
    assert listeners[0].heard == listeners[1].heard


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 2}, {"output_scores": True, "return_dict_in_generate": True}, {"use_cache": False},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=lambda how: ", ".join(how) or "greedy",
)  # fmt: skip
def test_everything_else_goes_through_transformers_loop(how: dict[str, Any], llama: PreTrainedModel, calls: list[int]):
    got, want = (text(model, **how) for model in (llama, plain(llama)))
    assert torch.equal(getattr(got, "sequences", got), getattr(want, "sequences", want))
    assert calls == []


def test_hooks_are_heard(llama: PreTrainedModel, calls: list[int]):
    heard: list[int] = []
    handle = llama.lm_head.register_forward_hook(lambda *given: heard.append(1))
    text(llama)
    handle.remove()
    assert (len(heard), calls) == (20, [])


def test_a_cache_goes_on(llama: PreTrainedModel, calls: list[int]):
    sequences = []
    for model in (llama, plain(llama)):
        first = text(model, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, IDS], 1)
        more: Any = model
        again = more.generate(
            longer,
            past_key_values=first.past_key_values,
            do_sample=False,
            max_new_tokens=9,
            return_dict_in_generate=True,
        )
        assert again.past_key_values.get_seq_length() == again.sequences.shape[1] - 1
        sequences.append(again.sequences)
    assert torch.equal(*sequences)
    assert len(calls) == 19 + 8


@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        (LlamaConfig(**SHAPE, tie_word_embeddings=True), {}),
        (LlamaConfig(**SHAPE), {"layers": {"lm_head": "int8-channel"}}),
        (GPT2Config(**GPT2, bos_token_id=1, eos_token_id=None), {}),
        (LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), {}),
        (LlamaConfig(**SHAPE), {"kv_cache": "int8-g16"}),
    ],
    ids=["tied", "quantized head", "learned positions", "positions that depend on the length", "rounded cache"],
)
def test_kinds_of_models(config: Any, recipe: dict[str, Any], pressed: Callable[..., Path], calls: list[int]):
    model = load(pressed(config, **recipe))
    assert model.fusing == optimize.Fusing(2, 2, {})
    calls.clear()
    assert torch.equal(text(model), text(plain(model)))
    assert len(calls) == 19


def test_a_model_that_computes_more_is_left_alone(pressed: Callable[..., Path]):
    fusing: Any = load(pressed(CAPPED)).fusing
    assert fusing.around == "the model computes something else than its decoder and a head"


def test_of_equal_logits_the_first_is_taken(llama: PreTrainedModel):
    model: Any = copy.deepcopy(llama)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight[:1].expand_as(model.lm_head.weight))
    assert text(model)[0, 5:].tolist() == [0] * 20


def test_logits_that_are_no_numbers_stop(llama: PreTrainedModel):
    model: Any = copy.deepcopy(llama)

    class Spoil(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
            with torch.no_grad():
                model.lm_head.weight[50, 3] = torch.nan if input_ids.shape[1] == 9 else 0
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with pytest.raises(NumericsError, match="after 9 tokens the model gives nan as its largest logit"):
        text(model, logits_processor=[FiniteLogits()], stopping_criteria=[Spoil()])
