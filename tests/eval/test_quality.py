"""Perplexity and divergence against plain computations: the paper's loop, float64 by hand, and known distributions."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitpress.eval import quality

VOCABULARY, CONTEXT = 11, 8


class Toy(nn.Module):
    """A causal LM whose logits are a table's row of the current token."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, input_ids, use_cache):
        assert not use_cache
        return SimpleNamespace(logits=self.table[input_ids])


def toy(seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return Toy(scale * torch.randn(VOCABULARY, VOCABULARY, generator=generator))


@pytest.fixture
def data():
    ids = torch.randint(VOCABULARY, (5 * CONTEXT,), generator=torch.Generator().manual_seed(7))
    return quality.windows(ids, CONTEXT)


@pytest.fixture
def small_vocabulary(tiny_llama):
    """A tiny Llama that transformers loads, in float32, and ids for it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ids = torch.randint(model.config.vocab_size, (200,), generator=torch.Generator().manual_seed(1))
    return model, ids


def by_hand(base, model, data):
    """Perplexity and per-token KL in float64, nothing shared with the code under test."""
    nll, divergences, same = 0.0, [], 0
    for window in data.tolist():
        for here, following in pairwise(window):
            p = base.table[here].double().softmax(-1)
            q = model.table[here].double().softmax(-1)
            nll -= q[following].log().item()
            divergences.append(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist())))
            same += p.argmax() == q.argmax()
    count = len(divergences)
    return math.exp(nll / count), sum(divergences) / count, max(divergences), int(same) / count


def test_windows_drop_the_tail():
    assert torch.equal(quality.windows(torch.arange(11), 4), torch.arange(8).view(2, 4))


def test_windows_stop_at_the_limit():
    assert torch.equal(quality.windows(torch.arange(11), 4, limit=1), torch.arange(4).view(1, 4))
    assert quality.windows(torch.arange(11), 4, limit=9).shape == (2, 4)


def test_windows_of_too_short_a_text():
    with pytest.raises(ValueError, match="3 tokens, less than one window of 4"):
        quality.windows(torch.arange(3), 4)
    assert quality.windows(torch.arange(4), 4).shape == (1, 4)


def test_perplexity_is_the_papers(small_vocabulary):
    """The evaluation loop of GPTQ's and its successors' scripts: mean loss of each window, weighted by its length."""
    model, ids = small_vocabulary
    length, losses = 32, []
    count = len(ids) // length
    loss_of = nn.CrossEntropyLoss()
    with torch.no_grad():
        for number in range(count):
            batch = ids[number * length : (number + 1) * length].unsqueeze(0)
            logits = model(batch).logits
            shifted = logits[:, :-1, :].contiguous()
            loss = loss_of(shifted.view(-1, shifted.size(-1)), batch[:, 1:].view(-1))
            losses.append(loss.float() * length)
    expected = torch.exp(torch.stack(losses).sum() / (count * length)).item()
    found = quality.score(model, quality.windows(ids, length))
    assert found.perplexity == pytest.approx(expected, rel=1e-6)
    assert (found.windows, found.tokens) == (6, 6 * 31)
    assert found.kl_mean is None
    assert found.top1_agreement is None


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(data):
    found = quality.score(Toy(torch.zeros(VOCABULARY, VOCABULARY)), data)
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_compare_against_float64_by_hand(data):
    base, model = toy(0), toy(1)
    perplexity, mean, largest, same = by_hand(base, model, data)
    found = quality.compare(base, model, data)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.baseline_perplexity == pytest.approx(by_hand(model, base, data)[0], rel=1e-5)
    assert found.kl_mean == pytest.approx(mean, rel=1e-5)
    assert found.kl_max == pytest.approx(largest, rel=1e-5)
    assert found.top1_agreement == same


def test_compare_against_torch_distributions(data):
    from torch.distributions import Categorical, kl_divergence

    base, model = toy(2), toy(3)
    p, q = (Categorical(logits=m.table[data[:, :-1]].double()) for m in (base, model))
    expected = kl_divergence(p, q)
    found = quality.compare(base, model, data)
    assert found.kl_mean == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found.kl_max == pytest.approx(expected.max().item(), rel=1e-5)


def test_the_baseline_comes_first(data):
    """KL(p || q) of a sharp and a flat distribution is not KL(q || p)."""
    sharp = Toy(torch.tensor([9.0] + [0.0] * (VOCABULARY - 1)).repeat(VOCABULARY, 1))
    flat = Toy(torch.zeros(VOCABULARY, VOCABULARY))
    assert quality.compare(sharp, flat, data).kl_mean == pytest.approx(by_hand(sharp, flat, data)[1], rel=1e-5)
    assert quality.compare(flat, sharp, data).kl_mean == pytest.approx(by_hand(flat, sharp, data)[1], rel=1e-5)


def test_a_known_divergence():
    """p = (3/4, 1/4) against q = (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2."""
    p = Toy(torch.tensor([0.75, 0.25]).log().repeat(2, 1))
    q = Toy(torch.zeros(2, 2))
    found = quality.compare(p, q, torch.tensor([[0, 1, 0, 0]]))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.kl_mean == pytest.approx(expected, rel=1e-6)
    assert found.kl_max == pytest.approx(expected, rel=1e-6)
    assert found.top1_agreement == 1  # of equals the first counts, and that is p's first too


def test_a_model_against_itself(small_vocabulary):
    model, ids = small_vocabulary
    data = quality.windows(ids, 32)
    found = quality.compare(model, model, data)
    assert (found.kl_mean, found.kl_max, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.baseline_perplexity == quality.score(model, data).perplexity


def test_compare_scores_as_score_does(data):
    base, model = toy(4), toy(5)
    found = quality.compare(base, model, data)
    assert found.perplexity == quality.score(model, data).perplexity
    assert found.baseline_perplexity == quality.score(base, data).perplexity


@pytest.mark.parametrize("rows", [1, 3, CONTEXT - 1, CONTEXT])
def test_rows_at_a_time_change_nothing(data, rows, monkeypatch):
    base, model = toy(4), toy(5)
    whole = quality.compare(base, model, data)
    monkeypatch.setattr(quality, "_ROWS", rows)
    parts = quality.compare(base, model, data)
    # each row is on its own; only the order of the float64 sums differs
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-12)
    assert parts.kl_mean == pytest.approx(whole.kl_mean, rel=1e-12)
    assert (parts.kl_max, parts.top1_agreement) == (whole.kl_max, whole.top1_agreement)
    assert parts.tokens == whole.tokens
    assert quality.score(model, data).perplexity == pytest.approx(whole.perplexity, rel=1e-12)


def test_half_precision_is_widened(data):
    """A softmax in bfloat16 has three digits; the figures of bfloat16 logits must be those of float32 arithmetic."""
    base, model = (Toy(toy(seed).table.bfloat16()) for seed in (0, 1))
    perplexity, mean, _, _ = by_hand(base, model, data)
    found = quality.compare(base, model, data)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.kl_mean == pytest.approx(mean, rel=1e-5)


def test_tokens_ruled_out_by_both_add_nothing(data):
    """Logits of minus infinity, as for a padded vocabulary: 0 log 0 is 0, not NaN."""
    base, model = toy(0), toy(1)
    shown = by_hand(base, model, data)
    for table in (base, model):
        table.table = torch.cat([table.table, torch.full((VOCABULARY, 3), -math.inf)], -1)
    found = quality.compare(base, model, data)
    assert found.kl_mean == pytest.approx(shown[1], rel=1e-5)
    assert found.kl_max == pytest.approx(shown[2], rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stops(data, value):
    broken = toy()
    broken.table[data[-1, -2]] = value
    with pytest.raises(ValueError, match="the model's logits are NaN"):
        quality.score(broken, data)
    with pytest.raises(ValueError, match="the model's logits are NaN"):
        quality.compare(toy(), broken, data)
    with pytest.raises(ValueError, match="the baseline's logits are NaN"):
        quality.compare(broken, toy(), data)


def test_a_perplexity_beyond_float_stays_finite(data):
    """Of a model that rules out what comes: exp would overflow."""
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[:, data[0, 1]] = -1e6
    assert math.isfinite(quality.score(Toy(table), data).perplexity)


@pytest.mark.parametrize("measure", [quality.score, lambda m, d, s: quality.compare(m, m, d, s)])
def test_steps_are_told(data, measure):
    steps = []
    measure(toy(), data, lambda done, total: steps.append((done, total)))
    assert steps == [(number, 5) for number in range(6)]
