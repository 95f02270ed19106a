"""How much more memory this process may take. In a container that is less than the machine has free."""

from collections.abc import Iterator
from pathlib import Path

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# A control group's three files or fields: its limit, its usage, and the part of the usage that the system can free at
# once because it is a cache of files. https://docs.kernel.org/admin-guide/cgroup-v2.html#memory, cgroup-v1/memory.html
_UNIFIED = ("memory.max", "memory.current", "inactive_file")
_SEPARATE = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def left() -> int | None:
    """Bytes that the control groups of this process still allow; None where nothing limits it."""
    return min(_control_groups(_GROUPS, _OWN), default=None)


def _control_groups(groups: Path, own: Path) -> Iterator[int]:
    """Bytes that are left in each group of the process, and in each group around it.

    A container may see only the inner part of the tree of groups. Groups that it cannot see are left out.
    """
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (groups / "memory", _SEPARATE) if controllers else (groups, _UNIFIED)
        folder = root / name.strip("/")
        limit_file, usage_file, cache_field = files
        for group in (folder, *folder.parents):
            if (group / limit_file).exists() and (group / usage_file).exists():
                limit = (group / limit_file).read_text().strip()
                if limit != "max":
                    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    cached = int(stat.get(cache_field, 0))
                    yield int(limit) - int((group / usage_file).read_text()) + cached
            if group == root:
                break
