"""A checkpoint that is read in another dtype, and what is quantized from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitpress.pipeline.api import quantize
from bitpress.pipeline.errors import NumericsError
from bitpress.pipeline.evaluate import worker
from bitpress.pipeline.evaluate.verify import verify_artifact, verify_task
from bitpress.pipeline.models.dtypes import CastCheckpoint
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.storage.checkpoint import Checkpoint, read_json

TEXT = "All that is gold does not glitter, not all those who wander are lost; 7 * 6 = 42. " * 30


def test_tensors_of_the_dtype_that_most_have_are_cast(tiny_llama: Path, copy_of: Any, edit_tensors: Any) -> None:
    folder, norm = copy_of(tiny_llama), "model.norm.weight"
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({norm: tensors[norm].float()}))
    stored, cast = load_file(folder / "model.safetensors"), CastCheckpoint(Checkpoint(folder), torch.float16)
    assert cast.config["dtype"] == "float16"
    for name, info in cast.tensors.items():
        expected = stored[name] if name == norm else stored[name].to(torch.float16)
        assert torch.equal(cast.read(name), expected)
        assert (info.dtype, info.nbytes) == (expected.dtype, expected.nbytes)
        pieces = cast.read_rows(name, [3, 5], first=2)
        assert torch.equal(torch.cat(list(pieces)), expected[2:10])


def test_values_beyond_its_range_are_refused(tiny_llama: Path, copy_of: Any, edit_tensors: Any, tmp_path: Path) -> None:
    folder, name = copy_of(tiny_llama), "model.embed_tokens.weight"
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors[name][0, :2].fill_(1e5))
    with pytest.raises(NumericsError, match=rf"{name}: 2 of its values are beyond 65504, the largest of float16"):
        quantize(folder, {"scheme": "int4-g32", "dtype": "float16"}, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize(("architecture", "rules"), [("llama", {}), ("mixtral", {"*.experts.0.*": "none"})])
@pytest.mark.parametrize("method", ["absmax", "gptq"])
def test_an_artifact_in_another_dtype(
    architecture: str, rules: dict[str, str], method: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(worker, "call", lambda task, request: verify_task(request))  # here, not in a fresh process
    (tmp_path / "text.txt").write_text(TEXT)
    folder, out = tiny(architecture, vocab_size=256), tmp_path / "artifact"
    settings: dict[str, Any] = {"scheme": "int4-g32", "method": method, "layers": rules, "dtype": "float16"}
    settings |= {"format": "compressed-tensors", "allow_split_fused": True}
    text = {"text": str(tmp_path / "text.txt"), "windows": 4, "context": 32}
    quantize(folder, settings | ({"calibration": text} if method == "gptq" else {}), out)
    floats = {info.dtype for info in Checkpoint(out).tensors.values() if info.dtype.is_floating_point}
    assert (floats, read_json(out / "config.json")["dtype"]) == ({torch.float16}, "float16")
    if method == "absmax":
        ids = torch.arange(40)
        verified = verify_artifact(Checkpoint(folder), Recipe.make(settings), out, ids, "cpu", "auto")
        assert verified["max_difference"] <= verified["tolerance"]
