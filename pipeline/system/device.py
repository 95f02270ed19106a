"""The device that work is done on."""

import contextlib

import psutil
import torch

from ..errors import ConfigError


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, and torch finds none; use device auto or cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is unknown; use auto, cpu or cuda") from None


def pick_devices(name: str, gpus: int) -> tuple[torch.device, ...]:
    """The devices among which calibrated methods divide their work; for one GPU, that of pick_device.

    Raises:
        ConfigError: there are fewer GPUs, or they are of several kinds: what rounds how would depend on who does what.
    """
    device = pick_device(name)
    if gpus == 1:
        return (device,)
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if gpus > count:
        raise ConfigError(f"gpus: {gpus} were asked for, and torch finds {count} for device {name}; ask for as many")
    kinds = sorted({torch.cuda.get_device_name(number) for number in range(gpus)})
    if len(kinds) > 1:
        raise ConfigError(
            f"gpus: {gpus} would be {' and '.join(kinds)}, which may round sums differently; choose GPUs of one kind "
            "by CUDA_VISIBLE_DEVICES"
        )
    return tuple(torch.device("cuda", number) for number in range(gpus))


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Meanwhile, kernels of this thread that name no GPU run on this one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def total_memory(device: torch.device) -> int:
    """The bytes of memory of the device that models run on."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
