"""What is left of the memory that this process may take, which in a container is less than the machine has free."""

from collections.abc import Iterator
from pathlib import Path

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# of a control group: its limit, what it takes, and which part of that are files that the system lets go of when asked;
# https://docs.kernel.org/admin-guide/cgroup-v2.html#memory, and cgroup-v1/memory.html
_UNIFIED = ("memory.max", "memory.current", "inactive_file")
_SEPARATE = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def left() -> int | None:
    """Bytes that the control groups of this process leave it; None where nothing limits it."""
    return min(_control_groups(_GROUPS, _OWN), default=None)


def _control_groups(groups: Path, own: Path) -> Iterator[int]:
    """Of each group that the process is in, and of those around it. In a container the groups that it sees may begin
    further in than their names say: those that are missing are left out."""
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (groups / "memory", _SEPARATE) if controllers else (groups, _UNIFIED)
        folder = root / name.strip("/")
        for place in (folder, *folder.parents):
            if (place / files[0]).exists() and (place / files[1]).exists():
                yield from _room(place, files)
            if place == root:
                break


def _room(folder: Path, files: tuple[str, str, str]) -> Iterator[int]:
    limit = (folder / files[0]).read_text().strip()
    if limit == "max":
        return
    facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    yield int(limit) - int((folder / files[1]).read_text()) + int(facts.get(files[2], 0))
