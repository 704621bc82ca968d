"""Which processes have files of a mount open, as far as /proc tells us."""

import os


def open_for_writing(mountpoint: str) -> list[str]:
    """`path (process PID)` of each file below `mountpoint` that is open for writing.

    Processes of other users stay unseen unless we are root.
    """
    found: dict[str, str] = {}  # the first process that has each
    for pid in filter(str.isdigit, os.listdir("/proc")):
        folder = f"/proc/{pid}/fd"
        try:
            for number in os.listdir(folder):
                path = os.readlink(f"{folder}/{number}")
                if path.startswith(mountpoint + "/") and _writes(pid, number):
                    found.setdefault(path, pid)
        except OSError:
            continue  # it ended, or is not ours to see
    return [f"{path} (process {pid})" for path, pid in sorted(found.items())]


def _writes(pid: str, number: str) -> bool:
    with open(f"/proc/{pid}/fdinfo/{number}") as info:
        for line in info:
            if line.startswith("flags:"):
                return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False
