"""Memory: each storage counted once, and the peak of this process alone."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from bitpress.eval import memory

MEBIBYTE = 1 << 20

CHILD = """
from bitpress.eval.memory import peak_rss_bytes
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
    from bitpress.kernels.qlinear import QLinear
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
