"""llama.cpp's types as rows of the quality benchmark, with a stand-in for llama.cpp whose next tokens are all alike."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import save_tokenizer_of_llamacpp

from bitpress.pipeline.bench import kquants
from bitpress.pipeline.bench.kquants import KQuant
from bitpress.pipeline.bench.programs import Program
from bitpress.pipeline.bench.quality import Comparison
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.storage.checkpoint import Checkpoint

STAND_IN = """
import json, shutil, sys, numpy
for line in sys.stdin:
    request, answer = json.loads(line), {}
    if request["do"] == "quantize":
        shutil.copy(request["source"], request["output"])
        answer = {"seconds": 0.5, "versions": {"stand-in": str(len(numpy.load(request["importance"]).files))}}
    elif request["do"] == "logits":
        numpy.save(request["output"], numpy.zeros((len(request["ids"]), WORDS), numpy.float32))
    print(json.dumps(answer), flush=True)
"""
WORDS = 300


@pytest.fixture
def comparison(tiny: Callable[..., Path], copy_of: Callable[..., Path], tmp_path: Path) -> Comparison:
    folder, text = copy_of(tiny("llama", vocab_size=WORDS)), tmp_path / "text.txt"
    save_tokenizer_of_llamacpp(folder)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    read = {"text": str(text), "windows": 2, "context": 16}
    return Comparison.make(str(folder), {**read, "seed": None}, read, "cpu", tmp_path / "out")


def test_a_row_is_measured_by_the_other_programs_logits(comparison: Comparison, tmp_path: Path):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN.replace("WORDS", str(WORDS)))
    row = KQuant(Program(kquants.NAME, "llama_cpp", script, sys.executable), "Q4_K_M").measure(comparison, tmp_path)
    tensors = Checkpoint(comparison.source.folder).tensors.values()
    assert row.perplexity == pytest.approx(WORDS, rel=1e-5)
    assert row.nbytes == sum(info.nbytes for info in tensors)
    assert row.versions == {"stand-in": str(2 * 7)}  # layers with an importance
    assert not list(tmp_path.glob("*.gguf"))


def test_types_that_are_not_known_are_refused():
    with pytest.raises(ConfigError, match="Q4_K: expected one of Q2_K"):
        kquants.entrants([], ["Q4_K"])
