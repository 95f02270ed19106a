"""Figures and their errors against plain sums, known answers, and what errors are for: how far repeats lie apart."""

import math

import pytest
import torch

from bitpress.eval.measure import statistics
from bitpress.eval.measure.statistics import mean_and_error, summarize


def draws(windows, tokens, seed, shared=1.0):
    """Scores of tokens that have a part in common with their window: not independent, as of real text."""
    generator = torch.Generator().manual_seed(seed)
    common = shared * torch.randn(windows, 1, generator=generator)
    return list(common + torch.randn(windows, tokens, generator=generator))


def test_a_mean_and_its_error_by_hand():
    """Windows of two tokens and of one: 1, 2 and 6; mean 3, residuals 3 - 6 and 6 - 3."""
    result = mean_and_error([torch.tensor([1.0, 2.0]), torch.tensor([6.0])])
    assert result == pytest.approx((3.0, math.sqrt(2 / 1 * ((3 - 6) ** 2 + (6 - 3) ** 2)) / 3))


def test_one_window_tells_no_error():
    assert mean_and_error([torch.tensor([1.0, 2.0])]) == (1.5, None)


def test_equal_windows_give_the_textbooks_error_of_a_mean():
    values = draws(40, 5, 0)
    means = torch.stack([window.mean() for window in values]).double()
    expected = means.std().item() / math.sqrt(40)
    assert mean_and_error(values)[1] == pytest.approx(expected, rel=1e-6)  # the draws are float32


def test_errors_are_those_of_repeated_measurements():
    """The error that is estimated from one text against the spread of the means of 400 texts."""
    repeats = [mean_and_error(draws(50, 20, seed)) for seed in range(400)]
    spread = torch.tensor([mean for mean, _ in repeats]).std().item()
    estimate = torch.tensor([error for _, error in repeats]).mean().item()
    # a standard deviation of 400 is known to 1 / sqrt(800), 3.5%; three of these
    assert estimate == pytest.approx(spread, rel=0.11)
    by_token = torch.cat(draws(50, 20, 0)).std().item() / math.sqrt(50 * 20)
    assert estimate > 2 * by_token, "tokens that are taken for independent would give too small an error"


@pytest.mark.parametrize("times", [4, 16])
def test_errors_shrink_as_the_root_of_the_text(times):
    one, more = (
        torch.tensor([mean_and_error(draws(n, 10, seed))[1] for seed in range(40)]).mean() for n in (30, 30 * times)
    )
    assert (one / more).item() == pytest.approx(math.sqrt(times), rel=0.05)  # of 40 repeats, each good to 13%


def compared(windows, seed=0, noise=0.05, shift=0.01):
    """A baseline whose loss varies much with the text, and a model that is a little off it."""
    generator = torch.Generator().manual_seed(seed)
    base = [(3.0 + 0.2 * level).clamp(min=0.1) for level in draws(windows, 30, seed)]
    change = [shift + noise * torch.randn(30, generator=generator) for _ in base]
    return [
        {
            "baseline_nll": b,
            "nll": b + c,
            "kl": c.square() / 2,
            "same": c.abs() < noise,
        }
        for b, c in zip(base, change)
    ]


def test_figures_by_hand():
    figures = summarize(
        [
            {
                "baseline_nll": torch.tensor([1.0, 2.0, 0.5]),
                "nll": torch.tensor([1.5, 2.0, 0.5]),
                "kl": torch.tensor([0.0, 0.1, 0.8]),
                "same": torch.tensor([True, True, False]),
            },
            {
                "baseline_nll": torch.tensor([3.0]),
                "nll": torch.tensor([2.5]),
                "kl": torch.tensor([0.3]),
                "same": torch.tensor([True]),
            },
        ],
        4,
    )
    assert figures["perplexity"] == pytest.approx(math.exp(6.5 / 4))
    assert figures["baseline_perplexity"] == pytest.approx(math.exp(6.5 / 4))
    assert figures["perplexity_ratio"] == pytest.approx(1.0)
    assert figures["kl_mean"] == pytest.approx(0.3)
    assert figures["kl_median"] == pytest.approx(0.2)
    assert figures["kl_p99"] == pytest.approx(0.3 + 0.97 * 0.5)  # between the third and fourth of four
    assert figures["kl_max"] == pytest.approx(0.8)
    assert figures["top1_agreement"] == 0.75
    changes = [math.exp(-1.5) - math.exp(-1), 0, 0, math.exp(-2.5) - math.exp(-3)]
    assert figures["rms_dp"] == pytest.approx(math.sqrt(sum(change**2 for change in changes) / 4))
    assert (figures["kl_mean_bound"], figures["kl_token_bound"]) == (0, 0)
    assert figures["windows"]["tokens"] == [3, 1]
    assert figures["windows"]["nll"] == pytest.approx([4.0, 2.5])
    assert figures["windows"]["baseline_nll"] == pytest.approx([3.5, 3.0])
    assert figures["windows"]["kl"] == pytest.approx([0.9, 0.3])


def test_a_ratio_of_perplexities_is_known_far_better_than_either():
    figures = summarize(compared(60), 60 * 30)
    assert figures["perplexity_ratio"] == pytest.approx(
        figures["perplexity"] / figures["baseline_perplexity"], rel=1e-9
    )
    assert figures["perplexity_ratio"] == pytest.approx(math.exp(0.01), rel=0.01)
    own = figures["perplexity_se"] / figures["perplexity"]
    assert figures["perplexity_ratio_se"] < 0.05 * own


def test_paired_errors_shrink_as_the_root_of_the_text_and_are_those_of_repeats():
    few = [summarize(compared(25, seed), 25 * 30) for seed in range(200)]
    many = [summarize(compared(100, seed), 100 * 30) for seed in range(50)]
    for name in ("perplexity_ratio", "kl_mean", "top1_agreement", "rms_dp"):
        error_of_few, error_of_many = (
            torch.tensor([figures[f"{name}_se"] for figures in runs]).mean().item() for runs in (few, many)
        )
        assert error_of_few / error_of_many == pytest.approx(2.0, rel=0.1), name  # 200 errors of 15% each, and 50 of 7%
        spread = torch.tensor([figures[name] for figures in few], dtype=torch.float64).std().item()
        assert error_of_few == pytest.approx(spread, rel=0.2), name  # a standard deviation of 200 is known to 5%


def test_a_model_beside_itself_changes_nothing():
    scores = [{**window, "nll": window["baseline_nll"]} for window in compared(3)]
    figures = summarize([{**window, "kl": torch.zeros(30)} for window in scores], 90)
    assert (figures["perplexity_ratio"], figures["perplexity_ratio_se"]) == (1.0, 0.0)
    assert (figures["rms_dp"], figures["rms_dp_se"], figures["kl_mean"], figures["kl_mean_se"]) == (0, 0, 0, 0)


def test_words():
    """A perplexity of words: the same sum over fewer units; errors follow."""
    scores = compared(10)
    tokens, words = summarize(scores, 300), summarize(scores, 100)
    assert math.log(words["perplexity"]) == pytest.approx(3 * math.log(tokens["perplexity"]))
    assert math.log(words["perplexity_ratio"]) == pytest.approx(3 * math.log(tokens["perplexity_ratio"]))
    relative = [figures["perplexity_se"] / figures["perplexity"] for figures in (tokens, words)]
    assert relative[1] == pytest.approx(3 * relative[0])


def test_a_perplexity_beyond_float_has_no_error():
    scores = [{"nll": torch.full((3,), 1e6)}, {"nll": torch.full((3,), 2e6)}]
    assert statistics.perplexity(scores, 6) == (math.exp(700), None)


def test_sampling_adds_up():
    scores = [{**window, "kl_variance": torch.full((30,), 0.04)} for window in compared(2)]
    figures = summarize(scores, 60)
    assert figures["kl_token_bound"] == pytest.approx(4 * 0.2)
    assert figures["kl_mean_bound"] == pytest.approx(4 * 0.2 / math.sqrt(60))
