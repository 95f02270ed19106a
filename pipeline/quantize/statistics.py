"""Statistics of what an unquantized model's layers read: gathered once, kept on the disk, shared by recipes.

What a method such as GPTQ learns of a layer's inputs does not depend on the scheme that the layer will get. So one pass
of the unquantized model over the calibration tokens serves every recipe that is not sequential. Another serves every
budget: its costs are estimated on windows that no solution was fitted to. A sequential recipe reads what its own
quantized blocks put out, so it shares the first block alone: what that block reads is the same for all of them.

What is loaded is what was gathered, to the bit. So an artifact is the same whether its recipe shared or not.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ..methods.base import Statistic
from ..storage import files, journal
from ..storage.checkpoint import Checkpoint
from ..storage.fingerprint import digest, open_work
from ..system.progress import OnStep
from ..system.versions import releases
from .plan import Plan, PlannedTensor, Unit
from .recipe import Recipe, order_of_sums

SHARED = ".shared"  # beside the folders of a run's recipes: what they have in common
Kinds = tuple[type[Statistic], ...]
Statistics = dict[type[Statistic], Statistic]  # of the input that a group of layers reads


class Blocks(Protocol):
    """The decoder's blocks, unquantized, one after the other; see sequential.CalibratedBlocks."""

    def state(self, block: int) -> Path: ...
    def statistics(
        self, unit: Unit, wanted: Mapping[str, Kinds]
    ) -> Iterator[tuple[list[list[PlannedTensor]], list[Statistics]]]: ...
    def committed(self, block: int) -> None: ...
    def nbytes(self) -> int: ...


class SharedStatistics:
    """The statistics of one model, one calibration and one set of kinds, in a folder of their own."""

    def __init__(self, plan: Plan, source: dict[str, Any], recipe: Recipe, folder: Path):
        """Open the folder; nothing is gathered yet.

        Args:
            source: see artifact.quantize. folder: of all that recipes share.
        """
        assert recipe.calibration
        kinds = {kind for spec in recipe.specs() for kind in spec.statistics}
        self._names = {kind: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for kind in kinds}
        outside = {each.info.name: each.spec.name for each in plan.quantized if each.block is None and each.spec}
        origin: dict[str, Any] = {f"calibration.{key}": value for key, value in recipe.calibration.to_dict().items()}
        origin |= {f"source.{key}": value for key, value in source.items()}
        origin |= {f"files.{name}": value for name, value in plan.checkpoint.identity().items()}
        origin |= {f"versions.{name}": releases().get(name) for name in ("bitpress", "torch", "transformers")}
        origin |= {"outside": outside, "dtype": str(plan.dtype), "kinds": sorted(self._names.values())}
        origin |= {"learns": any(spec.method.learns for spec in recipe.specs())}  # which makes batches smaller
        origin |= order_of_sums(recipe)
        self.folder = folder / f"statistics-{digest(origin)[:12]}"
        self._origin = origin
        self._lines: list[dict[str, Any]] = []
        self._intact: dict[str, bool] = {}  # file -> whether it is as it was written

    @contextlib.contextmanager
    def locked(self, patience: float = math.inf) -> Iterator[journal.Journal]:
        """Hold the folder and know what is in it; others that want the same wait, and then find it there.

        Raises:
            LockedError: another one holds it, longer than `patience` seconds.
        """
        files.make_folder(self.folder)
        with journal.locked(self.folder, patience):
            open_work(self.folder, self._origin)
            entries = journal.Journal(self.folder / journal.NAME)
            self._lines = entries.entries
            yield entries

    def holds(self, block: int, wanted: Mapping[str, Kinds]) -> bool:
        """Whether the statistics of these layers of a block are there, as they were written."""
        if any(line["block"] == block and not line["reached"] for line in self._lines):
            return True
        return all(self._line(layer) for layer, kinds in wanted.items() if kinds)

    def _line(self, layer: str) -> dict[str, Any] | None:
        """The journal's line on the file that has a layer's statistics."""
        for line in reversed(self._lines):
            if layer in line.get("layers", {}):
                path = self.folder / line["file"]
                if path.name not in self._intact:
                    self._intact[path.name] = path.exists() and files.sha256_file(path) == line["sha256"]
                return line if self._intact[path.name] else None
        return None

    def leader(self, layer: str) -> str:
        """The first of the layers that read what this one reads; itself, where nothing is known of it."""
        line = self._line(layer)
        return line["layers"][layer] if line else layer

    def load(self, layer: str, in_features: int, device: torch.device) -> Statistics | None:
        """The statistics of what a layer reads, on a device; None where text alone does not go through its block."""
        line = self._line(layer)
        if line is None:
            return None
        leader, stored = line["layers"][layer], Checkpoint.single(self.folder / line["file"])
        result: Statistics = {}
        for kind, name in self._names.items():
            prefix = f"{leader}/{name}/"
            state = {key.removeprefix(prefix): stored.read(key) for key in stored.tensors if key.startswith(prefix)}
            if state:
                result[kind] = kind(in_features, device)
                result[kind].load_state_dict(state)
        return result

    def add(
        self,
        entries: journal.Journal,
        block: int,
        groups: Sequence[Sequence[PlannedTensor]],
        collected: Sequence[Statistics],
    ) -> None:
        """Write the statistics of these groups of a block's layers."""
        number = sum(line["block"] == block for line in self._lines)
        path = self.folder / f"{block:05d}-{number}.safetensors"
        tensors = {
            f"{group[0].module}/{self._names[kind]}/{key}": tensor
            for group, statistics in zip(groups, collected, strict=True)
            for kind, statistic in statistics.items()
            for key, tensor in statistic.state_dict().items()
        }
        written = files.write_safetensors(path, tensors)
        layers = {planned.module: group[0].module for group in groups for planned in group}
        entries.append({"block": block, "reached": True, "layers": layers, "file": path.name, **written})
        self._intact[path.name] = True

    def gather(
        self,
        units: Sequence[Unit],
        wanted: Mapping[str, Kinds],
        blocks: Callable[[Path], Blocks],
        on_step: OnStep = lambda done, total: None,
    ) -> None:
        """Take the unquantized model through the calibration tokens, as far as something that is wanted is not there.

        A pass that was broken off goes on at the block that it had come to.

        Args:
            units: the decoder's blocks, in order. wanted: layer -> kinds of statistics.
            blocks: makes the blocks, whose states lie in a folder. on_step: called with (blocks done, blocks in all).
        """
        layers = [[each.module for each in unit.tensors if each.module in wanted] for unit in units]
        of_unit = [{layer: wanted[layer] for layer in own} for own in layers]
        with self.locked() as entries:
            missing = [n for n, unit in enumerate(units) if not self.holds(_number(unit), of_unit[n])]
            if not missing:
                return
            chain = blocks(self.folder)
            first = missing[0] if chain.state(_number(units[missing[0]])).exists() else 0
            widths = {each.module: each.shape[1] for n in missing for each in units[n].tensors if each.module in wanted}
            most = sum(kind.nbytes(width) for layer, width in widths.items() for kind in wanted[layer])
            files.preflight(self.folder, chain.nbytes() + most // 2)
            for number in range(first, missing[-1] + 1):
                on_step(number, len(units))
                block = _number(units[number])
                own = of_unit[number] if number in missing else {}
                parts = 0
                for groups, collected in chain.statistics(units[number], own):
                    self.add(entries, block, groups, collected)
                    parts += 1
                if any(own.values()) and not parts:
                    entries.append({"block": block, "reached": False})
                chain.committed(block)
            files.remove_folder(chain.state(0).parent)


def _number(unit: Unit) -> int:
    assert unit.block is not None
    return unit.block
