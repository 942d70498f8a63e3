"""What Linux's control groups leave this process of memory: the limits of containers and services.

psutil reports the machine's memory; a process that takes more than its control group may have is
killed. Both versions of the interface are read: one tree of groups with memory.max (version 2, the
kernel's Documentation/admin-guide/cgroup-v2.rst), and one tree for memory alone with
memory.limit_in_bytes (version 1, cgroup-v1/memory.rst).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class _Interface:
    """Names of the files of one version."""

    limit: str
    usage: str
    cache: str


_VERSION_1 = _Interface("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Interface("memory.max", "memory.current", "inactive_file")


def available_bytes(
    mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Bytes this process may still take before a limit of its group, or of one above it, is reached.

    Files in the page cache that were not used of late count as available, for the kernel drops them.

    Args:
        mount: Where the groups are mounted.
        membership: Lists the groups of this process, in the form of cgroups(7).

    Returns:
        None where no limit is set or can be read, as on other systems than Linux.
    """
    left = [
        bytes_left
        for directory, interface in _groups(mount, membership)
        if (bytes_left := _left(directory, interface)) is not None
    ]
    return min(left, default=None)


def _groups(mount: Path, membership: Path) -> Iterator[tuple[Path, _Interface]]:
    """The directories of this process's groups and of all above them."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            root, interface = mount / "memory", _VERSION_1
        elif number == "0" and not controllers:
            root, interface = mount, _VERSION_2
        else:
            continue
        # Inside a container the path may be the host's; its group is then mounted as the root.
        directory = root / path.strip("/")
        while directory != root:
            yield directory, interface
            directory = directory.parent
        yield root, interface


def _left(directory: Path, interface: _Interface) -> int | None:
    try:
        limit = int((directory / interface.limit).read_text())  # "max" is no number
        usage = int((directory / interface.usage).read_text())
        statistics = (directory / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    cache = 0
    for line in statistics.splitlines():
        name, _, value = line.partition(" ")
        if name == interface.cache and value.isdecimal():
            cache = int(value)
    return max(0, limit - max(0, usage - cache))
