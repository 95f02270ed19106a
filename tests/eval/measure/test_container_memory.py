"""Limits of memory by control groups as Linux has them, of either version."""

import psutil
import pytest
import torch

from bitpress.eval.measure import container_memory, memory

MB = 1 << 20


@pytest.fixture
def groups(tmp_path):
    """groups(own, **files): what is left by /proc/self/cgroup and the files of a control group file system."""

    def left(own, files):
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return list(container_memory._control_groups(tmp_path / "groups", tmp_path / "own"))

    return left


def test_of_version_two_each_group_around_counts(groups):
    stat = {"inner/memory.stat": f"anon 5\ninactive_file {7 * MB}\n", "memory.stat": "anon 5\n"}
    files = {"inner/memory.max": f"{100 * MB}\n", "inner/memory.current": f"{60 * MB}\n"}
    outer = {"memory.max": f"{90 * MB}\n", "memory.current": f"{80 * MB}\n"}
    assert groups("0::/inner\n", {**files, **outer, **stat}) == [47 * MB, 10 * MB]


def test_of_version_one_only_the_group_of_memory(groups):
    own = "5:cpu,cpuacct:/box\n4:memory:/box\n0::/\n"
    files = {"memory.limit_in_bytes": f"{100 * MB}", "memory.usage_in_bytes": f"{90 * MB}"}
    files = {f"memory/box/{name}": text for name, text in files.items()}
    assert groups(own, {**files, "memory/box/memory.stat": f"total_inactive_file {MB}\n"}) == [11 * MB]


@pytest.mark.parametrize("own", ["0::/gone/away\n", "", "3:pids:/\n"])
def test_nothing_limits_where_nothing_is_said(groups, own):
    assert groups(own, {"memory.max": "max\n", "memory.current": "5\n", "memory.stat": ""}) == []


def test_a_group_that_the_container_does_not_see_is_left_out(groups):
    files = {"memory.max": f"{50 * MB}", "memory.current": f"{20 * MB}", "memory.stat": ""}
    assert groups("0::/kubepods/pod7\n", files) == [30 * MB]


@pytest.mark.parametrize(("left", "free"), [(7 * MB, 7 * MB), (-MB, 0), (1 << 62, None), (None, None)])
def test_what_is_free_is_within_the_limit(monkeypatch, left, free):
    monkeypatch.setattr(container_memory, "left", lambda: left)
    available = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    assert memory.free_bytes(torch.device("cpu")) == (available.available if free is None else free)
