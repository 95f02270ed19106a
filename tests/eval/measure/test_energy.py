"""Energy counters: a simulated powercap folder and a simulated NVML; without counters there is no meter."""

import sys
from types import SimpleNamespace

import pytest
import torch

from bitpress.eval.measure import energy


def package(folder, name, microjoules, most=10_000_000):
    folder.mkdir()
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{value}\n")


@pytest.fixture
def powercap(tmp_path):
    """Two packages, and a part of one of them, which must not count twice."""
    package(tmp_path / "intel-rapl:0", "package-0", 1_000_000)
    package(tmp_path / "intel-rapl:1", "package-1", 9_000_000)
    package(tmp_path / "intel-rapl:0:0", "core", 5_000_000)
    return tmp_path


def test_packages_add_up_and_counters_start_again(powercap):
    meter = energy.Rapl(powercap)
    reading = meter.read()
    assert reading == [1.0, 9.0]
    (powercap / "intel-rapl:0" / "energy_uj").write_text("3500000")
    (powercap / "intel-rapl:1" / "energy_uj").write_text("1000000")  # past its range of 10 J
    assert meter.since(reading) == pytest.approx(2.5 + 2.0)


@pytest.mark.parametrize("damage", ["gone", "folder", "words"])
def test_a_processor_that_does_not_tell_has_no_meter(powercap, monkeypatch, damage):
    monkeypatch.setattr(energy.Rapl.__init__, "__defaults__", (powercap,))
    assert energy.meter(torch.device("cpu")).name == "RAPL, processor packages"
    for file in powercap.glob("*/energy_uj"):
        file.unlink()
        if damage == "folder":  # as unreadable as for a user whom the system forbids it; root may read all
            file.mkdir()
        elif damage == "words":
            file.write_text("none")
    assert energy.meter(torch.device("cpu")) is None


def test_a_machine_without_the_counters(tmp_path, monkeypatch):
    monkeypatch.setattr(energy.Rapl.__init__, "__defaults__", (tmp_path / "nowhere",))
    assert energy.meter(torch.device("cpu")) is None


class NVMLError(Exception):
    pass


NVMLError.__module__ = "pynvml"


@pytest.fixture
def card(monkeypatch):
    """A GPU that has used 5 joules so far; `card.fails` makes its counter raise."""
    state = SimpleNamespace(millijoules=5000, fails=False)

    def total(handle):
        assert handle == "handle of GPU-abc"
        if state.fails:
            raise NVMLError("not supported")
        return state.millijoules

    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: f"handle of {uuid}",
        nvmlDeviceGetTotalEnergyConsumption=total,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    return state


def test_a_card(card):
    meter = energy.meter(torch.device("cuda"))
    reading = meter.read()
    card.millijoules = 7500
    assert meter.since(reading) == pytest.approx(2.5)
    card.fails = True
    assert energy.meter(torch.device("cuda")) is None


def test_without_nvidias_library(card, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.meter(torch.device("cuda")) is None
