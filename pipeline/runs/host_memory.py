"""How much memory the host has left, and whether a copy of a state fits into it."""

from collections.abc import Iterator
from pathlib import Path

# by the name of a control group's hierarchy: its folder, and the names of its limit, its use and its inactive file
# memory
CONTROL_GROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),  # version 2
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def fits(size: int, processes: int = 1, root: Path = Path("/")) -> bool:
    """Whether `size` bytes more fit beside training. The available memory has to hold them and what a step will take
    again: for each of the processes, the difference between this one's peak and its present use.

    True if the system does not say (systems other than Linux): they swap.
    """
    available = available_memory(root)
    if available is None:
        return True
    held = _numbers(root / "proc/self/status")
    again = max(0, held.get("VmHWM", 0) - held.get("VmRSS", 0)) * 1024
    return size + again * processes <= available


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping and without reaching a limit of the container or batch system, which
    would end this process. None if the system does not say."""
    if not (meminfo := root / "proc/meminfo").is_file():
        return None
    free = _numbers(meminfo).get("MemAvailable", 0) * 1024
    return min([free, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """The bytes that each control group of this process, and each one above, leaves: limit - (use - inactive files)."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, names, place = line.split(":", 2)
        if names not in CONTROL_GROUPS:
            continue
        folder, limit, use, files = CONTROL_GROUPS[names]
        top = root / "sys/fs/cgroup" / folder
        here = top / place.lstrip("/")
        # in a container the path may be the host's and not exist; the container's own limit is at the top
        for group in (here, *here.parents):
            if (group / limit).is_file() and (most := (group / limit).read_text().strip()) != "max":
                yield int(most) - int((group / use).read_text()) + _numbers(group / "memory.stat").get(files, 0)
            if group == top:
                break


def _numbers(file: Path) -> dict[str, int]:
    """The first number behind each name."""
    lines = (line.replace(":", " ").split() for line in file.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
