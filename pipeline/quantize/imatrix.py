"""An importance matrix for llama.cpp's own quantization: how large each input of each layer is on calibration text.

Written as llama.cpp's tool of that name writes it, GGUF or the older binary form, from the statistics that calibrated
methods use. Sources: tools/imatrix/imatrix.cpp of llama.cpp, and its reader in tools/quantize.
"""

import os
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitpress.kernels.activations.base import finite_rows

from ..data.calibration import Calibration
from ..errors import ConfigError
from ..storage import files
from ..storage.checkpoint import Checkpoint
from ..storage.gguf import architectures
from ..system.packages import unsupported
from ..system.progress import OnStep
from .block_runner import BlockRunner
from .plan import make_plan
from .recipe import Recipe

_LEGACY = ".dat"
_EVERY_LAYER = "int8-channel"  # a scheme that fits every layer: the plan then names all of them


class SquareSums:
    """The sum over tokens of the square of each input, float32 [in].

    tokens: how many inputs were added. dropped: how many were left out because they were not finite.
    """

    multiplies_inputs = True  # it has no matrix products at all
    by_gradient = False

    def __init__(self, in_features: int, device: torch.device):
        self.tokens = 0
        self.dropped = 0
        self.sums = torch.zeros(in_features, dtype=torch.float64, device=device)

    @staticmethod
    def nbytes(in_features: int) -> int:
        return 8 * in_features

    def add(self, inputs: Tensor) -> None:
        rows, dropped = finite_rows(inputs)
        self.dropped += dropped
        self.tokens += len(rows)
        self.sums += rows.to(torch.float32).square().sum(0, dtype=torch.float64)

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "counts": torch.tensor([self.tokens, self.dropped])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.tokens, self.dropped = state["counts"].tolist()
        self.sums.copy_(state["sums"])


@dataclass(frozen=True)
class Importance:
    """How large the inputs of one tensor of a GGUF file are; each expert is a matrix.

    sums: of the squares of inputs, float32 [matrices, in]. counts: of tokens, float32 [matrices].
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """The mean square of each input, float32 [matrices, in]; an expert's is that of the tokens which reached it."""
        return self.sums / np.maximum(self.counts, 1)[:, None]


def imatrix(
    checkpoint: Checkpoint, calibration: Calibration, out: Path, device: str, on_step: OnStep = lambda done, total: None
) -> list[str]:
    """Write the importance matrix of an unquantized checkpoint; a name that ends in .dat gets the older form.

    Returns:
        Sentences on what was done.
    Raises:
        ConfigError: the architecture is not known as GGUF, a package is missing, or the output exists.
        CheckpointError, NumericsError: see BlockRunner.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; choose another output")
    if out.suffix != _LEGACY and (reason := unsupported("gguf")):
        raise ConfigError(f"{out}: {reason}; or give a name that ends in {_LEGACY}, for the older form")
    importance = importances(checkpoint, calibration.ids, device, on_step)
    chunks, size = calibration.ids.shape
    (_write_legacy if out.suffix == _LEGACY else _write)(out, importance, str(calibration), chunks, size)
    unseen = [name for name, own in importance.items() if not own.counts.all()]
    notes = [f"{len(importance)} tensors, from {calibration.ids.numel()} tokens in windows of {size}"]
    return notes + ([f"{len(unseen)} of them have experts that no token reached ({unseen[0]})"] if unseen else [])


def importances(
    checkpoint: Checkpoint, ids: Tensor, device: str, on_step: OnStep = lambda done, total: None
) -> dict[str, Importance]:
    """How much each input of the layers in an unquantized model's blocks matters, by the layers' names in GGUF.

    Args:
        ids: int64 [windows, context], to calibrate on.
    Raises:
        ConfigError: the architecture is not known as GGUF. CheckpointError, NumericsError: see BlockRunner.
    """
    try:
        architecture = architectures.architecture_of(checkpoint.config)
    except ValueError as error:
        raise ConfigError(f"{checkpoint.folder} has no importance matrix: {error}") from error
    entries: dict[str, dict[int, SquareSums]] = defaultdict(dict)
    for name, statistic in _square_sums(checkpoint, ids, device, on_step).items():
        if (place := architecture.place(f"{name}.weight", checkpoint.config)) is not None:
            entries[place.name][place.expert or 0] = statistic
    result = {}
    for name, matrices in sorted(entries.items()):
        own = [matrices[number] for number in sorted(matrices)]
        sums = torch.stack([each.sums for each in own]).to(torch.float32).cpu().numpy()
        result[name] = Importance(sums, np.array([each.tokens for each in own], np.float32))
    return result


def _square_sums(checkpoint: Checkpoint, ids: Tensor, device: str, on_step: OnStep) -> dict[str, SquareSums]:
    """Layer -> its statistic, of the layers in the decoder blocks of the unquantized model."""
    plan = make_plan(checkpoint, Recipe.make({"scheme": _EVERY_LAYER, "fit_groups": True}))
    outside = [planned for planned in plan.tensors if planned.block is None]
    runner = BlockRunner(plan.checkpoint, outside, ids, plan.activation_dtype, device)
    result: dict[str, SquareSums] = {}
    for unit, _, inputs in runner.blocks_in_memory(plan.units, on_step):
        groups = runner.groups([planned for planned in unit.tensors if planned.spec], inputs[0])
        collected = runner.collect([(group[0], (SquareSums,)) for group in groups], inputs)
        for group, statistics in zip(groups, collected):
            own = statistics[SquareSums]
            assert isinstance(own, SquareSums)
            result |= {planned.module: own for planned in group}
    return result


def _write(out: Path, importance: Mapping[str, Importance], text: str, chunks: int, size: int) -> None:
    """The GGUF form: for each tensor X, X.in_sum2 [matrices, in] and X.counts [matrices, 1]."""
    import gguf

    temporary = out.with_name(f".{out.name}.tmp")
    with files.disk_errors(out):
        try:
            writer = gguf.GGUFWriter(temporary, "imatrix")
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", [text])
            writer.add_uint32("imatrix.chunk_count", chunks)
            writer.add_uint32("imatrix.chunk_size", size)
            for name, own in importance.items():
                writer.add_tensor(f"{name}.in_sum2", own.sums)
                writer.add_tensor(f"{name}.counts", own.counts[:, None])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)


def _write_legacy(out: Path, importance: Mapping[str, Importance], text: str, chunks: int, size: int) -> None:
    """The older form: for each tensor its name, the number of chunks, and the mean square of each input times that.

    It has one count for all matrices.
    """
    parts = [struct.pack("<i", len(importance))]
    for name, own in importance.items():
        means = own.means
        label = name.encode()
        parts += [struct.pack("<i", len(label)), label, struct.pack("<ii", chunks, means.size)]
        parts.append((means * chunks).astype("<f4").tobytes())
    label = text.encode()
    parts += [struct.pack("<ii", chunks, len(label)), label]
    temporary = out.with_name(f".{out.name}.tmp")
    with files.disk_errors(out):
        try:
            temporary.write_bytes(b"".join(parts))
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
