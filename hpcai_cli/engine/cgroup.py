"""What a container or a batch system allows this process: the limits of its control groups, of both versions."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 1 << 60
"""Version 1 writes a number near 2^63 where there is none."""


@dataclass(frozen=True)
class Groups:
    """The control groups of this process."""

    folder: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def memory(self) -> tuple[int, int] | None:
        """Return the least limit and the least that is left below one, in bytes; None where nothing is limited."""
        found = []
        for group in self._of("memory"):
            limit = _number(group, "memory.max", "memory.limit_in_bytes")
            if limit is not None:
                used = _number(group, "memory.current", "memory.usage_in_bytes") or 0
                # Pages of files that nobody uses are given up before anybody is killed.
                found.append((limit, max(0, limit - max(0, used - _cached(group)))))
        return (min(limit for limit, _ in found), min(left for _, left in found)) if found else None

    def cores(self) -> float | None:
        """Return the least share of the machine's cores, 1.5 for one and a half; None where nothing is limited."""
        found = []
        for group in self._of("cpu"):
            # Version 2 writes both into one file, "max 100000" where there is no limit.
            quota, _, period = _text(group / "cpu.max").partition(" ")
            quota = quota or _text(group / "cpu.cfs_quota_us")
            period = period or _text(group / "cpu.cfs_period_us")
            if quota.isdecimal() and period.isdecimal() and int(period):
                found.append(int(quota) / int(period))
        return min(found, default=None)

    def processes(self) -> int | None:
        """Return how many more processes and threads may be started; None where nothing is limited."""
        limits = [(limit, _number(group, "pids.current") or 0) for group in self._of("pids")
                  if (limit := _number(group, "pids.max")) is not None]
        return min((max(0, limit - used) for limit, used in limits), default=None)

    def _of(self, controller: str) -> Iterator[Path]:
        """Yield the folders of this process's group and of all above it, each of which may set a limit."""
        for line in _text(self.membership).splitlines():
            controllers, _, path = line.partition(":")[2].partition(":")
            if controllers and controller not in controllers.split(","):
                continue
            # Version 1 has a tree for each controller; version 2 one for all, in `unified` where both are there.
            for base in [self.folder / controller] if controllers else [self.folder, self.folder / "unified"]:
                # A container that has no view of its own sees its host's path, of which it has but the end.
                group = base / path.lstrip("/")
                for each in [group, *group.parents]:
                    if each.is_relative_to(base) and each.is_dir():
                        yield each


def _number(group: Path, *names: str) -> int | None:
    for name in names:
        text = _text(group / name)
        if text.isdecimal():
            return int(text) if int(text) < _NO_LIMIT else None
    return None


def _cached(group: Path) -> int:
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        # Version 1's plain `inactive_file` leaves out the groups below, which its usage counts.
        if value.isdecimal() and name == ("inactive_file" if (group / "memory.max").exists() else
                                          "total_inactive_file"):
            return int(value)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
