"""Importance matrices against sums that forward hooks of transformers' own model see."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from bitpress.pipeline.api import imatrix, load
from bitpress.pipeline.errors import ConfigError

CALIBRATION = {"text": "builtin:pydoc-topics", "windows": 4, "context": 32}


def expected(folder: Path, ids: torch.Tensor, layers: list[str]) -> dict[str, np.ndarray]:
    model, _ = load(folder, device="cpu", dtype="float32")
    sums: dict[str, Any] = dict.fromkeys(layers, 0)

    def hook(name: str) -> Any:
        def add(module: Any, arguments: Any) -> None:
            sums[name] = sums[name] + arguments[0].flatten(0, -2).double().square().sum(0)

        return add

    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(ids)
    return {name: total.numpy() for name, total in sums.items()}


def test_both_forms_hold_what_hooks_see(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpress.pipeline import api

    seen = []
    calibrate = api.calibrate_on
    monkeypatch.setattr(api, "calibrate_on", lambda *given: seen.append(calibrate(*given)) or seen[-1])
    assert "14 tensors, from 128 tokens" in imatrix(tiny_llama, tmp_path / "i.gguf", CALIBRATION, device="cpu")[1]
    names = {
        "blk.1.attn_k.weight": "model.layers.1.self_attn.k_proj",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj",
    }
    sums = expected(tiny_llama, seen[0].ids, list(names.values()))
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 4
    assert reader.fields["imatrix.chunk_size"].contents() == 32
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 28
    for name, layer in names.items():
        assert tensors[f"{name}.counts"].tolist() == [[128.0]]
        np.testing.assert_allclose(tensors[f"{name}.in_sum2"][0], sums[layer], rtol=0.03)  # blocks run in bfloat16
    imatrix(tiny_llama, tmp_path / "i.dat", CALIBRATION, device="cpu")
    data = (tmp_path / "i.dat").read_bytes()
    (count,), place, means = struct.unpack_from("<i", data), 4, {}
    for _ in range(count):
        (length,) = struct.unpack_from("<i", data, place)
        name = data[place + 4 : place + 4 + length].decode()
        calls, size = struct.unpack_from("<ii", data, place + 4 + length)
        place += 12 + length
        means[name] = np.frombuffer(data, "<f4", size, place) / calls
        place += 4 * size
    assert struct.unpack_from("<i", data, place) == (4,)
    for name in names:
        np.testing.assert_allclose(means[name], tensors[f"{name}.in_sum2"][0] / 128, rtol=1e-6)


def test_refusals(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match="exists; choose another output"):
        imatrix(tiny_llama, tmp_path / "there.gguf", CALIBRATION, device="cpu")
