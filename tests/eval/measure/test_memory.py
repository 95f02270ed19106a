"""Memory: each storage counted once, and the peak of this process alone."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from bitpress.eval.measure import memory

MEBIBYTE = 1 << 20

CHILD = """
from bitpress.eval.measure.memory import peak_rss_bytes
before = peak_rss_bytes()
block = bytearray(b"1") * (64 << 20)
grown = peak_rss_bytes()
del block
print(before, grown, peak_rss_bytes())
"""


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_parameters_and_buffers_count():
    model = nn.Linear(3, 5).bfloat16()
    model.register_buffer("scales", torch.zeros(7, dtype=torch.float32), persistent=False)
    model.register_buffer("codes", torch.zeros(9, dtype=torch.uint8))
    assert memory.resident_bytes(model) == (3 * 5 + 5) * 2 + 7 * 4 + 9


def test_tied_weights_count_once():
    assert memory.resident_bytes(Tied()) == 10 * 4 * 4


def test_views_of_one_storage_count_once():
    model = nn.Module()
    whole = torch.zeros(8, 4)
    for name, part in (("a", whole[:3]), ("b", whole[3:]), ("c", whole.T)):
        model.register_buffer(name, part)
    assert memory.resident_bytes(model) == 8 * 4 * 4


def test_a_view_holds_its_whole_storage():
    """A slice of a large tensor keeps all of it in memory."""
    model = nn.Module()
    model.register_buffer("slice", torch.zeros(100, 4)[:1])
    assert memory.resident_bytes(model) == 100 * 4 * 4


def test_nothing_and_empty_tensors():
    assert memory.resident_bytes(nn.Identity()) == 0
    model = nn.Module()
    model.register_buffer("a", torch.zeros(0))
    model.register_buffer("b", torch.zeros(0, 3))
    assert memory.resident_bytes(model) == 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_onednn_tensors_count_by_their_elements():
    model = nn.Module()
    model.register_buffer("opaque", torch.zeros(8, 4).to_mkldnn())
    assert memory.resident_bytes(model) == 8 * 4 * 4


def test_a_quantized_layer_counts_what_it_holds():
    """Codes and scales, as a kernel keeps them, not the weight they stand for."""
    from bitpress.kernels.linear import QLinear
    from bitpress.kernels.qtensor import QTensor
    from bitpress.kernels.scheme import Scheme

    scales = torch.ones(64, 4, dtype=torch.bfloat16)
    qtensor = QTensor(Scheme.parse("int4-g32"), (64, 128), torch.zeros(64, 128 // 8, dtype=torch.int32), scales)
    layer = QLinear(qtensor, torch.zeros(64, dtype=torch.bfloat16), torch.bfloat16, "reference")
    assert memory.resident_bytes(layer) == 64 * 128 // 2 + 64 * 4 * 2 + 64 * 2


def test_the_peak_grows_and_stays():
    before, grown, after = map(int, subprocess.run(
        [sys.executable, "-c", CHILD], check=True, capture_output=True, text=True
    ).stdout.split())  # fmt: skip
    assert before > MEBIBYTE  # bytes, not kibibytes
    assert grown >= before + 60 * MEBIBYTE  # of 64: part may lie in what the process already held
    assert after >= grown - 2 * MEBIBYTE  # the peak, not what is held now; each core counts pages in batches of its own


def test_the_peak_is_this_process_alone():
    """A process that starts another hands down its own ru_maxrss; what is measured must not be the parent's."""
    start = f"subprocess.run([sys.executable, '-c', {CHILD!r}])"
    program = f"import subprocess, sys; block = bytearray(b'1') * (600 << 20); {start}"
    parent = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    before = int(parent.stdout.split()[0])
    alone = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True)
    assert before < int(alone.stdout.split()[0]) + 200 * MEBIBYTE


def test_no_cuda_is_no_figure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert memory.peak_cuda_bytes() is None


def test_a_peak_is_what_rose_within_it_and_no_more():
    program = """
import torch
from bitpress.eval.measure.memory import Peak
before = bytearray(b"1") * (200 << 20)
del before
with Peak(torch.device("cpu")) as peak:
    block = bytearray(b"1") * (64 << 20)
    del block
print(peak.growth or -1, peak.rss)
"""
    growth, rss = map(int, subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split())  # fmt: skip
    assert rss >= 200 * MEBIBYTE, "the process's own peak is kept"
    if growth == -1:
        pytest.skip("this system does not let a process start its peak anew")
    assert 60 * MEBIBYTE <= growth <= 80 * MEBIBYTE  # of 64: pages come and go by cores' batches


def test_a_peak_that_cannot_be_told_is_no_figure(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path)  # a folder: it cannot be written
    with memory.Peak(torch.device("cpu")) as peak:
        pass
    assert peak.growth is None
    assert peak.rss > MEBIBYTE


def test_a_prompts_cache(tiny_llama):
    """Keys and values of two blocks in bfloat16: heads x width x 2 bytes each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    config = model.config
    costs, peak = memory.prefill(model, torch.arange(40))
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    assert (costs["prompt"], costs["kv_cache_bytes_per_token"]) == (40, per_token)
    assert costs["activation_peak_bytes"] is None or costs["activation_peak_bytes"] >= 0
    assert peak.rss > MEBIBYTE


def test_the_cache_of_sliding_windows_stops_growing():
    """Gemma 3 has five layers with a window to each without: what is computed from a short prompt is what a long one
    takes."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma3TextConfig(vocab_size=64, num_hidden_layers=6, head_dim=16, sliding_window=16, **shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    costs, _ = memory.prefill(model, torch.arange(12))
    layer = 2 * 16 * 4
    assert costs["kv_cache_bytes_per_token"] == layer
    assert costs["kv_cache_windows"] == [{"tokens": 15, "bytes_per_token": 5 * layer}]
    quantized, _ = memory.prefill(model, torch.arange(12), lambda heads, key, value: heads * (key + value))
    assert quantized["kv_cache"] == {"bytes_per_token": 32, "windows": [{"tokens": 15, "bytes_per_token": 5 * 32}]}
    for tokens in (12, 15, 100):
        with torch.inference_mode():
            cache = model(input_ids=torch.arange(tokens).remainder(64)[None], use_cache=True).past_key_values
        assert memory.cache_size(tokens, layer, costs["kv_cache_windows"]) == memory.cache_bytes(cache)


def test_what_fits_beside_windows():
    gib, windows = (
        1 << 30,
        [{"tokens": 1 << 20, "bytes_per_token": 1 << 10}, {"tokens": 10, "bytes_per_token": 1 << 29}],
    )
    first, second = (fit["context"] for fit in memory.fitting(0, 1 << 10, 0, None, windows)[:2])
    assert first == (7 * gib - 5 * gib) >> 11  # 5 GiB of the short window; the other still grows
    assert second == (11 * gib - 6 * gib) >> 10  # and that is full, too
    assert memory.cache_size(second, 1 << 10, windows) == 11 * gib
    assert memory.fitting(0, 1 << 10, 0, None, [{"tokens": 10, "bytes_per_token": 1 << 30}])[0]["context"] == 6
    assert memory.fitting(0, 0, 0, 4096, windows)[-1]["context"] == 4096
    assert memory.fitting(0, 0, 0, None, windows)[-1]["context"] is None


def test_a_model_that_keeps_no_cache():
    class Stateful(nn.Module):
        def forward(self, input_ids):
            raise AssertionError("not called")

    costs, _ = memory.prefill(Stateful(), torch.arange(4))
    assert costs == {"prompt": 4, "kv_cache_bytes_per_token": None, "activation_peak_bytes": None}


def test_what_fits_on_which_card():
    """An 8B model of 4 bits, 5.7 GB, its cache 128 KiB a token, activations 32 KiB a token."""
    gib, weights = 1 << 30, 5_700_000_000
    contexts = {entry["card_gib"]: entry["context"] for entry in memory.fitting(weights, 131072, 32768, 131072)}
    assert list(contexts) == [8, 12, 16, 24, 48, 80]
    assert contexts[8] == (7 * gib - weights) // 163840 == 11085
    assert contexts[24] == (23 * gib - weights) // 163840
    assert contexts[48] == contexts[80] == 131072  # what the model can hold
    assert memory.fitting(weights, 131072, None, None)[0]["context"] == (7 * gib - weights) // 131072
    assert memory.fitting(8 * gib, 131072, 0, 4096)[0]["context"] == 0
    assert memory.fitting(weights, None, None, 4096)[0]["context"] is None
