"""Memory that a process of this machine may have: the machine's, or its container's limit.

Imports nothing heavy.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_MEMBERSHIP = Path("/proc/self/cgroup")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def memory_of_this_machine() -> int:
    """Bytes of physical memory; fewer where a control group of this process allows fewer."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *group_limits(_MEMBERSHIP, _CONTROL_GROUPS)])


def group_limits(membership: Path, root: Path) -> Iterator[int]:
    """Limits in bytes of a process's control groups, and of the groups around them.

    Args:
        membership: the process's lines `number:controllers:path`; version 2 names no controller.
        root: where the groups are mounted.
    """
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folder, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        # A container sees its own group as the root, while the path may be the host's.
        parts = PurePosixPath(path.lstrip("/")).parts
        for depth in range(len(parts) + 1):
            file = folder.joinpath(*parts[:depth], name)
            limit = file.read_text().strip() if file.is_file() else ""
            if limit.isdigit():  # version 2 writes `max` for none
                yield int(limit)
