"""How experts lie in the tensors that hold all of them, and such tensors seen as a layer for each."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bitpress.pipeline.models.experts import ExpertLayout, ExpertSlice, SplitCheckpoint
from bitpress.pipeline.storage.checkpoint import Checkpoint

GENERATOR = torch.Generator().manual_seed(0)
GATES, UPS = torch.randn(2, 3, 5, 4, generator=GENERATOR)  # 3 experts, 4 inputs, 5 outputs


def stored(transposed: bool, interleaved: bool) -> Tensor:
    """Gate and up of all experts in one tensor, output by output."""
    pairs = [
        [row for each in zip(gate, up) for row in each] if interleaved else [*gate, *up] for gate, up in zip(GATES, UPS)
    ]
    together = torch.stack([torch.stack(rows) for rows in pairs])
    return together.transpose(1, 2).contiguous() if transposed else together


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_each_layer_of_each_expert(transposed: bool, interleaved: bool, tmp_path: Path) -> None:
    layout = ExpertLayout(3, ("gate_proj", "up_proj"), transposed, interleaved)
    tensor = stored(transposed, interleaved)
    assert layout.piece_shape(tuple(tensor.shape)) == (5, 4)
    for expert, gate, up in zip(tensor, GATES, UPS):
        pieces = layout.split(expert)
        assert torch.equal(pieces[0], gate)
        assert torch.equal(pieces[1], up)
        assert torch.equal(layout.join(pieces), expert)
    save_file({"other": torch.ones(2), "all": tensor}, tmp_path / "model.safetensors")
    slices = {
        f"{e}.{p}.weight": ExpertSlice("all", layout, e, n) for e in range(3) for n, p in enumerate(layout.pieces)
    }
    view = SplitCheckpoint(Checkpoint(tmp_path), slices)
    assert set(view.tensors) == {"other", *slices}
    for number, (gate, up) in enumerate(zip(GATES, UPS)):
        assert torch.equal(view.read(f"{number}.gate_proj.weight"), gate)
        assert torch.equal(view.read(f"{number}.up_proj.weight"), up)
        assert [len(rows) for rows in view.read_rows(f"{number}.up_proj.weight", [2, 1], first=1)] == [2, 1]
        assert torch.equal(torch.cat(list(view.read_rows(f"{number}.up_proj.weight", [2, 1], first=1))), up[1:4])
    assert torch.equal(view.read("other"), torch.ones(2))
    assert sum(info.nbytes for info in view.tensors.values()) == tensor.nbytes + 8
    assert set(Checkpoint(tmp_path).tensors) == {"other", "all"}


def test_all_experts_in_two_dimensions() -> None:
    """DBRX: rows of one expert after those of another; its last product is by the transposed weight."""
    layout = ExpertLayout(3, ("w2",), transposed=True)
    assert layout.expert_shape((15, 4)) == (5, 4)
    assert layout.piece_shape((15, 4)) == (4, 5)


def test_biases_alternate_as_outputs_do() -> None:
    layout = ExpertLayout(3, ("gate_proj", "up_proj"), interleaved=True, bias=True)
    assert layout.piece_shape((3, 10)) == (5,)
    gate, up = layout.split(torch.arange(10.0))
    assert gate.tolist() == [0, 2, 4, 6, 8]
    assert torch.equal(layout.join([gate, up]), torch.arange(10.0))
