"""The devices that are asked for are there, and alike."""

import pytest
import torch

from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.system.device import pick_devices


def test_one_is_that_of_every_other_stage() -> None:
    assert pick_devices("cpu", 1) == (torch.device("cpu"),)


def test_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="gpus: 2 were asked for, and torch finds 0 for device cpu"):
        pick_devices("cpu", 2)
    names = ["A", "A", "B"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    assert pick_devices("auto", 2) == (torch.device("cuda:0"), torch.device("cuda:1"))
    with pytest.raises(ConfigError, match="gpus: 3 would be A and B, which may round sums differently"):
        pick_devices("cuda", 3)
    with pytest.raises(ConfigError, match="gpus: 4 were asked for, and torch finds 3"):
        pick_devices("cuda", 4)
