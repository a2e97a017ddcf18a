"""The processes of a run that goes on elsewhere: its driver and the actors below it, from /proc."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

KINDS = {"RolloutActor": "rollout", "RewardActor": "reward", "LearnerActor": "learner"}


def children(root: int) -> Iterator[tuple[int, str]]:
    """(id, title) of all processes below `root`. Ray writes what an actor does into its title."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = (folder / "stat").read_text()
            except OSError:  # it has ended
                continue
            parents[int(folder.name)] = int(status.rpartition(")")[2].split()[1])
    for pid in parents:
        above = pid
        while above in parents and above != root:
            above = parents[above]
        if above == root != pid:
            try:
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            yield pid, title.replace(b"\0", b" ").decode(errors="replace").strip()


def actors(root: int, doing: str = "") -> dict[str, list[int]]:
    """Ids of the actors below `root` by kind; with `doing`, of those inside that method."""
    found: dict[str, list[int]] = {kind: [] for kind in KINDS.values()}
    for pid, title in children(root):
        body, _, method = title.split(" ")[0].removeprefix("ray::").partition(".")
        if title.startswith("ray::") and body in KINDS and doing in ("", method):
            found[KINDS[body]].append(pid)
    return found


def anonymous_mib(pid: int) -> float:
    """Memory of a process that no other one shares and no file holds. Raises OSError."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(f"process {pid} has ended")


def wait_for(there: Callable[[], object], alive: Callable[[], bool], seconds: float) -> bool:
    """Until `there()` says yes, asked often; False if `alive()` no longer does.

    Raises:
        TimeoutError: after `seconds`.
    """
    end = time.monotonic() + seconds
    while not there():
        if not alive():
            return False
        if time.monotonic() > end:
            raise TimeoutError(f"expected it within {seconds:.0f} s")
        time.sleep(0.005)
    return True
