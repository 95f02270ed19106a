"""Which tokens are taken, and when a text that repeats itself ends."""

import pytest
import torch

from bitpress.pipeline.api import load
from bitpress.pipeline.errors import ConfigError, NumericsError
from bitpress.pipeline.models.generation import FiniteLogits, Printer, Repetition, Sampling, generate, repetition


@pytest.mark.parametrize(
    ("tokens", "what"),
    [
        ([*range(100), *[7] * 64], "the same token came 64 times"),
        ([*range(100), *[1, 2, 3] * 22], "the same 3 tokens came 21 times"),
        ([*range(100), *list(range(500, 560)) * 4], "the same 60 tokens came 4 times"),
        ([*range(100), *[7] * 63], ""),  # a ruler
        ([*range(300)], ""),
        ([*[1, 2, 3] * 40, 9], ""),  # it has left its loop
    ],
)
def test_repetition(tokens: list[int], what: str):
    assert repetition(tokens).startswith(f"stopped: {what}" if what else "")
    assert bool(repetition(tokens)) == bool(what)


def test_a_prompt_may_repeat_itself():
    ids = torch.full((1, 200), 5)
    assert not Repetition(prompt=150)(ids, None).any()
    assert Repetition(prompt=100)(torch.full((1, 204), 5), None).all()


def test_draws_are_those_of_the_seed_and_torchs_own_are_left_alone():
    model, tokenizer = load("builtin:demo", device="cpu")
    ids = torch.tensor([[5, 6, 7]])

    def words(sampling: Sampling) -> tuple[str, str]:
        printer = Printer(tokenizer, lambda words: None)
        _, said = generate(model, ids, 8, sampling, printer, pad_token_id=0)
        return printer.words, said

    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    drawn, said = words(Sampling(1.5, 0.9, seed=3))
    assert torch.equal(torch.rand(2), expected)
    assert said.startswith("8 tokens, ")
    assert said.endswith("; seed 3")
    assert words(Sampling(1.5, 0.9, seed=3))[0] == drawn
    assert words(Sampling(1.5, 0.9, seed=4))[0] != drawn
    assert words(Sampling(1.5, 0.9))[0] != drawn
    assert "seed" not in words(Sampling(0))[1]


def test_nothing_is_drawn_at_temperature_0():
    with pytest.raises(ConfigError, match="--seed 3: at temperature 0 nothing is drawn"):
        Sampling(0, seed=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_choose_no_token(value: float):
    model, tokenizer = load("builtin:demo", device="cpu")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.index_fill(-1, torch.tensor([9]), value))
    with pytest.raises(NumericsError, match=f"after 3 tokens the model gives {value} as its largest logit"):
        generate(model, torch.tensor([[5, 6, 7]]), 8, Sampling(0), Printer(tokenizer, lambda words: None))


def test_a_token_may_be_ruled_out():
    scores = torch.tensor([[1.0, -torch.inf], [2.0, 3.0]])
    assert FiniteLogits()(torch.zeros(2, 1), scores) is scores
    with pytest.raises(NumericsError, match="-inf"):
        FiniteLogits()(torch.zeros(1, 1), torch.full((1, 2), -torch.inf))
