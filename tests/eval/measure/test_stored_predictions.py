"""A baseline's stored predictions against both models side by side, where the tail is sampled and where it is not."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitpress.eval.measure import scores as quality
from bitpress.eval.measure import stored_predictions
from bitpress.eval.measure.protocols import Window, halves
from bitpress.eval.measure.statistics import summarize

VOCABULARY = 2000


class Table(nn.Module):
    """A causal LM whose logits are a table's row of the current token."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


def tables(rows=300, vocabulary=VOCABULARY, scale=2.0, change=0.3, dtype=torch.float32):
    """A baseline and a model that is somewhat off it; the flatter, the more is in the tail."""
    generator = torch.Generator().manual_seed(0)
    base = scale * torch.randn(rows, vocabulary, generator=generator)
    other = base + change * torch.randn(rows, vocabulary, generator=generator)
    return Table(base.to(dtype)), Table(other.to(dtype))


def text(rows=300, length=50, count=6):
    ids = torch.randint(rows, (length * count,), generator=torch.Generator().manual_seed(1))
    return halves(ids, length, 0)


def stored(base, model, windows):
    return [stored_predictions.compare(stored_predictions.predict(base, w, n), model, w) for n, w in enumerate(windows)]


def streamed_and_stored(base, model, windows):
    tokens = sum(window.targets.numel() for window in windows)
    return (
        summarize(scores, tokens) for scores in (quality.compare(base, model, windows), stored(base, model, windows))
    )


@pytest.mark.parametrize("change", [0.03, 0.3, 3.0])  # a good model, a poor one, and a ruin
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])  # from flat, all tail, to sharp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_ways_agree_within_the_bound(change, scale, dtype):
    streamed, stored = streamed_and_stored(*tables(scale=scale, change=change, dtype=dtype), text())
    assert stored["kl_mean_bound"] < 0.15 * streamed["kl_mean"], "else the bound says nothing"
    # 1e-6: float32 sums of log-probabilities around ten, beside which the smallest of the bounds vanishes
    assert abs(stored["kl_mean"] - streamed["kl_mean"]) <= stored["kl_mean_bound"] + 1e-6
    for name in ("kl_median", "kl_p99", "kl_max"):
        assert abs(stored[name] - streamed[name]) <= stored["kl_token_bound"] + 1e-6, name
    for name in ("perplexity", "baseline_perplexity", "perplexity_ratio", "top1_agreement", "rms_dp"):
        assert stored[name] == streamed[name], name


def test_every_token_lies_within_its_own_bound():
    base, model = tables(scale=1.0)
    windows = text(count=40)
    streamed = torch.cat([scores["kl"] for scores in quality.compare(base, model, windows)])
    scores = stored(base, model, windows)
    from_disk, variance = (torch.cat([window[name] for window in scores]) for name in ("kl", "kl_variance"))
    off = (from_disk - streamed).double()
    assert abs(off.sum().item()) < 3 * variance.double().sum().sqrt().item()  # right on average
    # and as far off as is said; 10%: three standard errors of 1960 squares of skewed draws
    assert off.square().mean().item() == pytest.approx(variance.double().mean().item(), rel=0.1)


def test_a_bound_says_more_of_more_text():
    _, few = streamed_and_stored(*tables(scale=1.0), text(count=2))
    _, many = streamed_and_stored(*tables(scale=1.0), text(count=32))
    assert few["kl_mean_bound"] / many["kl_mean_bound"] == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("vocabulary", [2, 7, stored_predictions.TOP - 1, stored_predictions.TOP])
def test_a_small_vocabulary_is_kept_whole(vocabulary):
    base, model = tables(5, vocabulary)
    streamed, stored = streamed_and_stored(base, model, halves(torch.arange(40) % min(5, vocabulary), 8, 0))
    assert (stored["kl_mean_bound"], stored["kl_token_bound"]) == (0, 0)
    assert stored["kl_mean"] == pytest.approx(streamed["kl_mean"], abs=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_against_itself_is_exactly_zero(dtype):
    """bfloat16 has equal logits: the token ranked first must be the same one in both ways."""
    base, _ = tables(dtype=dtype)
    _, stored = streamed_and_stored(base, base, text())
    assert (stored["kl_mean"], stored["kl_max"], stored["kl_mean_bound"], stored["top1_agreement"]) == (0, 0, 0, 1)


def test_tokens_that_the_baseline_rules_out_add_nothing():
    base, model = tables(5, 400)
    padded = [Table(torch.cat([m.table, torch.full((5, 50), -math.inf)], -1)) for m in (base, model)]
    windows = halves(torch.arange(40) % 5, 8, 0)
    streamed, stored = streamed_and_stored(*padded, windows)
    assert abs(stored["kl_mean"] - streamed["kl_mean"]) <= stored["kl_mean_bound"] + 1e-6


def test_the_same_seed_gives_the_same_bytes():
    base, _ = tables(5, 400)
    window = halves(torch.arange(8) % 5, 8, 0)[0]
    one, again, other = (stored_predictions.predict(base, window, seed) for seed in (3, 3, 4))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["samples"], other["samples"])
    assert torch.random.initial_seed() != 3


def test_the_bytes_that_are_announced():
    base, _ = tables(5, 400)
    prediction = stored_predictions.predict(base, Window(torch.arange(5), torch.arange(3), 1), 0)
    assert sum(tensor.nbytes for tensor in prediction.values()) == 3 * stored_predictions.bytes_per_token()
