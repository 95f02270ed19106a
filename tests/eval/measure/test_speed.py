"""Speed: what is fed to the model and what is counted. How fast anything is, is no test's business."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitpress.eval.measure import speed

VOCABULARY = 5


class Clock:
    """A time that only models move on."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


class Fake(nn.Module):
    """Records its calls; the n-th prefill takes seconds[n], a decode step a tenth of that."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds, self.calls, self.prefills = clock, seconds, [], -1

    def forward(self, input_ids, use_cache, past_key_values=None, logits_to_keep=0):
        assert use_cache
        assert not torch.is_grad_enabled()
        first = past_key_values is None
        self.prefills += first
        self.clock.now += self.seconds[self.prefills] * (1 if first else 0.1)
        cache = input_ids if first else torch.cat([past_key_values, input_ids], 1)
        self.calls.append((input_ids.clone(), cache.shape[1], logits_to_keep))
        kept = input_ids[:, -logits_to_keep:] if logits_to_keep else input_ids
        following = nn.functional.one_hot((kept + 1) % VOCABULARY, VOCABULARY).float()
        return SimpleNamespace(logits=following, past_key_values=cache)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


def run(clock, seconds, **changes):
    settings = {"load": speed.Load(2, 4, 3, 3), "meter": None, **changes}
    model = Fake(clock, seconds)
    return model, speed.measure(model, torch.arange(7) % VOCABULARY, **settings)


@pytest.mark.parametrize(
    ("context", "prompt", "generate", "expected"),
    [
        (2048, 512, 128, (512, 128)),
        (640, 512, 128, (512, 128)),
        (639, 512, 128, (512, 127)),
        (256, 512, 128, (205, 51)),
        (2, 512, 128, (1, 1)),
        (100, 1, 10**6, (1, 99)),
        (100, 10**6, 1, (99, 1)),
    ],
)
def test_fit(context, prompt, generate, expected):
    assert speed.fit(context, prompt, generate) == expected


@pytest.mark.parametrize(("prompt", "generate"), [(1, 1), (64, 16), (16, 64), (1, 63), (63, 1)])
def test_fit_always_leaves_both(prompt, generate):
    for context in range(2, 70):
        first, rest = speed.fit(context, prompt, generate)
        assert min(first, rest) >= 1
        assert first + rest == min(context, prompt + generate)


def test_what_the_model_is_fed(clock):
    model, measured = run(clock, [1.0] * 4)
    assert len(model.calls) == 4 * (1 + 3)  # a warm-up and three repeats, each a prefill and three steps
    assert (measured["batch"], measured["prompt"], measured["generate"], measured["repeats"]) == (2, 4, 3, 3)
    for start in range(0, len(model.calls), 4):
        prompt, length, kept = model.calls[start]
        assert prompt.tolist() == [[0, 1, 2, 3], [4, 0, 1, 0]]  # the text's tokens, wrapped round after seven
        assert (length, kept) == (4, 1)  # one row of logits: a prompt's worth of them would not fit for large models
        for step, (token, length, _) in enumerate(model.calls[start + 1 : start + 4], 1):
            assert token.tolist() == [[(3 + step) % VOCABULARY], [step % VOCABULARY]]  # greedy: the fake counts on
            assert length == 4 + step  # the cache grows: nothing is read twice


def test_the_warm_up_is_not_counted(clock):
    _, slow = run(clock, [1000.0, 1.0, 1.0, 1.0])
    assert slow["prefill"] == pytest.approx({"median": 8.0, "min": 8.0, "max": 8.0})


def test_rates_and_spread(clock):
    _, measured = run(clock, [9.0, 1.0, 4.0, 2.0])
    assert measured["prefill"] == pytest.approx({"median": 4.0, "min": 2.0, "max": 8.0})  # 2 x 4 tokens
    decode = {"median": 6 / 0.6, "min": 6 / 1.2, "max": 6 / 0.3}  # 2 x 3 tokens in 3 steps of a tenth
    assert measured["decode"] == pytest.approx(decode)


def test_one_repeat_is_its_own_spread():
    assert speed.Spread.of([3.0]) == speed.Spread(3.0, 3.0, 3.0)
    assert speed.Spread.of([1.0, 2.0, 4.0, 8.0]) == speed.Spread(3.0, 1.0, 8.0)


def test_steps_are_told(clock):
    steps = []
    run(clock, [1.0] * 4, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(number, 4) for number in range(5)]


class Counter:
    """Energy that grows with the clock: 5 watts at prefill, as at decode."""

    name = "a test's"

    def __init__(self, clock):
        self.clock = clock

    def read(self):
        return [5 * self.clock.now]

    def since(self, reading):
        return self.read()[0] - reading[0]


def test_time_to_the_first_token_and_energy(clock):
    _, measured = run(clock, [9.0, 1.0, 4.0, 2.0], meter=Counter(clock))
    assert measured["first_token_seconds"] == pytest.approx({"median": 2.0, "min": 1.0, "max": 4.0})
    # of the three repeats: 7 seconds for 3 x 8 tokens, 3 steps of a tenth of that for 3 x 6
    expected = {"prefill": 5 * 7 / 24, "decode": 5 * 3 * 0.7 / 18}
    assert measured["joules_per_token"] == pytest.approx(expected)
    assert run(clock, [1.0] * 4)[1]["joules_per_token"] is None


def test_what_decode_moves():
    """Each step reads the weights once and each sequence's cache; a batch of two shares the weights."""
    measured = {"batch": 2, "prompt": 100, "generate": 20, "decode": {"median": 60.0}}
    moved = speed.traffic(measured, 1000, 3.0, 1e6)
    steps = 60.0 / 2
    assert moved["bytes_per_second"] == pytest.approx(steps * (1000 + 2 * 3.0 * (100 + 10)))
    assert moved["bandwidth_share"] == pytest.approx(moved["bytes_per_second"] / 1e6)
    assert speed.traffic(measured, None, 3.0, 1e6) == {"bytes_per_second": None, "bandwidth_share": None}


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_step_reads(save_model, llama_config, tmp_path, tied):
    from transformers import AutoModelForCausalLM

    folder = save_model(llama_config(tie_word_embeddings=tied), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    table = model.get_input_embeddings().weight
    whole = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert speed.read_bytes(model) == whole - (0 if tied else table.nbytes)
    model.config.num_experts = 4
    assert speed.read_bytes(model) is None


def test_bandwidth_is_that_of_memory(monkeypatch):
    monkeypatch.setattr(speed, "BANDWIDTH_BYTES", 1 << 22)
    assert 1e8 < speed.bandwidth(torch.device("cpu")) < 1e13


def test_a_real_model(tiny_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.arange(50) % model.config.vocab_size
    measured = speed.measure(model, ids, speed.Load(2, 16, 4, 2), None)
    for phase in ("prefill", "decode"):
        assert 0 < measured[phase]["min"] <= measured[phase]["median"] <= measured[phase]["max"]
