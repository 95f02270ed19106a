"""Joules that a device has used, from the machine's own counters. Not every machine has them or lets us read them."""

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

_RAPL = Path("/sys/class/powercap")


class Meter(Protocol):
    """A counter of energy. name: what it counts. since(reading): joules between an earlier `read()` and now."""

    name: str

    def read(self) -> list[float]: ...

    def since(self, reading: list[float]) -> float: ...


class Rapl:
    """The counters of the processor packages (Linux's powercap). They count all programs that run, not only ours."""

    name = "RAPL, processor packages"

    def __init__(self, folder: Path = _RAPL):
        names = [path for path in sorted(folder.glob("*/name")) if path.read_text().startswith("package")]
        self._packages = [path.parent for path in names]
        self._ranges = [self._number(package / "max_energy_range_uj") for package in self._packages]
        self.read()  # raises where reading is forbidden

    @staticmethod
    def _number(path: Path) -> float:
        return int(path.read_text()) / 1e6

    def read(self) -> list[float]:
        if not self._packages:
            raise OSError("no package has a counter")
        return [self._number(package / "energy_uj") for package in self._packages]

    def since(self, reading: list[float]) -> float:
        # a counter starts again at 0 when it reaches its range, once in minutes under load
        return sum((now - then) % most for now, then, most in zip(self.read(), reading, self._ranges))


class Nvml:
    """The counter of one GPU, from NVIDIA's management library."""

    name = "NVML, the whole card"

    def __init__(self, device: torch.device):
        self._nvml: Any = import_module("pynvml")
        self._nvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        self._handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self.read()

    def read(self) -> list[float]:
        return [self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3]

    def since(self, reading: list[float]) -> float:
        return self.read()[0] - reading[0]


def meter(device: torch.device) -> Meter | None:
    """The counter of a device; None where this process can read none."""
    if device.type == "cuda":
        try:
            return Nvml(device)
        except (ImportError, AttributeError):
            return None
        except Exception as error:
            if type(error).__module__ != "pynvml":  # its error class cannot be named before the module is imported
                raise
            return None
    try:
        return Rapl()
    except (OSError, ValueError):
        return None
