"""Perplexity and divergence against plain computations: the paper's loop, float64 by hand, and known distributions."""

import contextlib
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitpress.eval.measure import scores as quality
from bitpress.eval.measure.protocols import Window, halves
from bitpress.eval.measure.statistics import summarize

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
    return halves(ids, CONTEXT, 0)


def figures(scores):
    return SimpleNamespace(**summarize(scores, sum(window["nll"].numel() for window in scores)))


def score(model, data):
    return figures(quality.score(model, data))


def compare(base, model, data):
    return figures(quality.compare(base, model, data))


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
    for window in data:
        for here, following in pairwise(window.ids.tolist()):
            p = base.table[here].double().softmax(-1)
            q = model.table[here].double().softmax(-1)
            nll -= q[following].log().item()
            divergences.append(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist())))
            same += p.argmax() == q.argmax()
    count = len(divergences)
    return math.exp(nll / count), sum(divergences) / count, max(divergences), int(same) / count


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
    result = score(model, halves(ids, length, 0))
    assert result.perplexity == pytest.approx(expected, rel=1e-6)
    assert result.windows["tokens"] == 6 * [31]
    assert not hasattr(result, "kl_mean")


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(data):
    result = score(Toy(torch.zeros(VOCABULARY, VOCABULARY)), data)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_compare_against_float64_by_hand(data):
    base, model = toy(0), toy(1)
    perplexity, mean, largest, same = by_hand(base, model, data)
    result = compare(base, model, data)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert result.baseline_perplexity == pytest.approx(by_hand(model, base, data)[0], rel=1e-5)
    assert result.kl_mean == pytest.approx(mean, rel=1e-5)
    assert result.kl_max == pytest.approx(largest, rel=1e-5)
    assert result.top1_agreement == same


def test_compare_against_torch_distributions(data):
    from torch.distributions import Categorical, kl_divergence

    base, model = toy(2), toy(3)
    ids = torch.stack([window.ids for window in data])
    p, q = (Categorical(logits=m.table[ids[:, :-1]].double()) for m in (base, model))
    expected = kl_divergence(p, q)
    result = compare(base, model, data)
    assert result.kl_mean == pytest.approx(expected.mean().item(), rel=1e-5)
    assert result.kl_max == pytest.approx(expected.max().item(), rel=1e-5)


def test_the_baseline_comes_first(data):
    """KL(p || q) of a sharp and a flat distribution is not KL(q || p)."""
    sharp = Toy(torch.tensor([9.0] + [0.0] * (VOCABULARY - 1)).repeat(VOCABULARY, 1))
    flat = Toy(torch.zeros(VOCABULARY, VOCABULARY))
    assert compare(sharp, flat, data).kl_mean == pytest.approx(by_hand(sharp, flat, data)[1], rel=1e-5)
    assert compare(flat, sharp, data).kl_mean == pytest.approx(by_hand(flat, sharp, data)[1], rel=1e-5)


def test_a_known_divergence():
    """p = (3/4, 1/4) against q = (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2."""
    p = Toy(torch.tensor([0.75, 0.25]).log().repeat(2, 1))
    q = Toy(torch.zeros(2, 2))
    result = compare(p, q, halves(torch.tensor([0, 1, 0, 0]), 4, 0))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert result.kl_mean == pytest.approx(expected, rel=1e-6)
    assert result.kl_max == pytest.approx(expected, rel=1e-6)
    assert result.top1_agreement == 1  # of two equal ones the first counts, which is p's first too


def test_a_model_against_itself(small_vocabulary):
    model, ids = small_vocabulary
    data = halves(ids, 32, 0)
    result = compare(model, model, data)
    assert (result.kl_mean, result.kl_max, result.top1_agreement) == (0.0, 0.0, 1.0)
    assert result.perplexity == result.baseline_perplexity == score(model, data).perplexity


def test_compare_scores_as_score_does(data):
    base, model = toy(4), toy(5)
    result = compare(base, model, data)
    assert result.perplexity == score(model, data).perplexity
    assert result.baseline_perplexity == score(base, data).perplexity


@pytest.mark.parametrize("rows", [0, 1, 3, CONTEXT - 1, CONTEXT])
def test_rows_at_a_time_change_nothing(data, rows, monkeypatch):
    base, model = toy(4), toy(5)
    whole = compare(base, model, data)
    monkeypatch.setitem(quality._CHUNK, "cpu", rows * VOCABULARY)
    parts = compare(base, model, data)
    # each row is on its own; only the order of the float64 sums differs
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-12)
    assert parts.kl_mean == pytest.approx(whole.kl_mean, rel=1e-12)
    assert (parts.kl_max, parts.top1_agreement) == (whole.kl_max, whole.top1_agreement)
    assert parts.windows["tokens"] == whole.windows["tokens"]
    assert score(model, data).perplexity == pytest.approx(whole.perplexity, rel=1e-12)


def test_half_precision_is_widened(data):
    """A softmax in bfloat16 has three digits; the figures of bfloat16 logits must be those of float32 arithmetic."""
    base, model = (Toy(toy(seed).table.bfloat16()) for seed in (0, 1))
    perplexity, mean, _, _ = by_hand(base, model, data)
    result = compare(base, model, data)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert result.kl_mean == pytest.approx(mean, rel=1e-5)


def test_tokens_ruled_out_by_both_add_nothing(data):
    """Logits of minus infinity, as for a padded vocabulary: 0 log 0 is 0, not NaN."""
    base, model = toy(0), toy(1)
    shown = by_hand(base, model, data)
    for table in (base, model):
        table.table = torch.cat([table.table, torch.full((VOCABULARY, 3), -math.inf)], -1)
    result = compare(base, model, data)
    assert result.kl_mean == pytest.approx(shown[1], rel=1e-5)
    assert result.kl_max == pytest.approx(shown[2], rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stops(data, value):
    broken = toy()
    broken.table[data[-1].ids[-2]] = value
    with pytest.raises(ValueError, match="the model's logits are NaN"):
        score(broken, data)
    with pytest.raises(ValueError, match="the model's logits are NaN"):
        compare(toy(), broken, data)
    with pytest.raises(ValueError, match="the baseline's logits are NaN"):
        compare(broken, toy(), data)


def test_a_perplexity_beyond_float_stays_finite(data):
    """A model that rules out the next token: exp would overflow."""
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[:, data[0].ids[1]] = -1e6
    assert math.isfinite(score(Toy(table), data).perplexity)


def test_what_the_baseline_allows_and_the_model_rules_out(data):
    model = toy()
    model.table = model.table.clone()
    model.table[:, data[0].targets[0]] = -math.inf
    with pytest.raises(ValueError, match="the model gives a token of the text no chance"):
        score(model, data)
    unseen = torch.cat([toy().table, torch.zeros(VOCABULARY, 1)], -1)
    ruled_out = torch.cat([toy().table, torch.full((VOCABULARY, 1), -math.inf)], -1)
    with pytest.raises(ValueError, match="the divergence is infinite"):
        compare(Toy(unseen), Toy(ruled_out), data)
    assert math.isfinite(compare(Toy(ruled_out), Toy(unseen), data).kl_mean)


def both(baseline, model):
    return {
        "score": lambda data, *rest: quality.score(model, data, *rest),
        "compare": lambda data, *rest: quality.compare(baseline, model, data, *rest),
    }


@pytest.mark.parametrize("measure", ["score", "compare"])
def test_steps_are_told(data, measure):
    steps = []
    both(toy(), toy())[measure](data, None, lambda number, scores: None, lambda *step: steps.append(step))
    assert steps == [(number, 5) for number in range(6)]


class Broken(Exception):
    pass


@pytest.mark.parametrize("measure", ["score", "compare"])
@pytest.mark.parametrize("after", range(6))
def test_what_is_finished_is_not_computed_again_and_the_rest_is_the_same_to_the_bit(data, measure, after):
    whole = both(toy(0), toy(1))[measure](data)
    finished, seen = {}, []

    class Dying(Toy):
        def forward(self, input_ids, use_cache):
            if len(finished) == after:
                raise Broken
            return super().forward(input_ids, use_cache)

    with contextlib.suppress(Broken):
        both(toy(0), Dying(toy(1).table))[measure](data, finished, finished.__setitem__)
    assert len(finished) == min(after, 5)
    scores = both(toy(0), toy(1))[measure](data, finished, lambda number, scores: seen.append(number))
    assert seen == list(range(after, 5))
    for one, other in zip(scores, whole, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_only_the_targets_are_scored(data):
    """The logits at first, first + 1, … against the targets, whatever else the window holds."""
    model = toy()
    ids = data[0].ids
    [scores] = quality.score(model, [Window(ids, torch.tensor([3, 4]), 2)])
    log_p = model.table.double().log_softmax(-1)
    expected = [-log_p[ids[2], 3].item(), -log_p[ids[3], 4].item()]
    assert scores["nll"].tolist() == pytest.approx(expected, rel=1e-5)


@torch.inference_mode()
def test_logits_that_no_target_needs_are_not_computed(small_vocabulary):
    model, ids = small_vocabulary
    lengths = []
    model.lm_head.register_forward_hook(lambda head, given, output: lengths.append(output.shape[1]))
    window = Window(ids[:12], ids[8:12], 7)
    got = quality.logits(model, window)
    want = model(input_ids=ids[:12].unsqueeze(0)).logits[0, 7:11]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert lengths == [5, 12]
