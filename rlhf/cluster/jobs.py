"""Commands as jobs of a Ray cluster: Ray's job API with every wait bounded.

Ray finds its token in RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token, but
sends it only where RAY_AUTH_MODE says `token`; we say so where there is one.
"""

from __future__ import annotations

import os
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf.errors import ClusterError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How a job stands: `status` is PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""

    id: str
    status: str
    message: str = ""

    @property
    def ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`. A request takes at most `seconds`.

    Raises:
        ClusterError: nobody answers there, or the token is missing or wrong. So do all methods.
    """

    def __init__(self, address: str, seconds: float = 60.0) -> None:
        self.address, self._seconds = address, seconds
        _send_token()
        from ray.job_submission import JobSubmissionClient

        self._client = self._within(lambda: JobSubmissionClient(address))

    def submit(self, command: Sequence[str], working_dir: str | None = None) -> str:
        """Have a command run on the head node; the id of the job. `working_dir` is sent along and
        is where it runs.
        """
        environment = {"working_dir": working_dir} if working_dir else {}
        entrypoint = shlex.join(command)
        return self._within(
            lambda: self._client.submit_job(entrypoint=entrypoint, runtime_env=environment)
        )

    def state(self, id: str) -> Job:
        info = self._within(lambda: self._client.get_job_info(id))
        return Job(id=id, status=str(info.status), message=info.message or "")

    def follow(self, id: str, write: Callable[[str], Any], every: float = 2.0) -> Job:
        """Write what a job prints, until it ends. As long as the cluster answers, so does this."""
        written = 0
        while True:
            job = self.state(id)  # before its last words are read
            text = self._within(lambda: self._client.get_job_logs(id))
            write(text[written:])
            written = len(text)
            if job.ended:
                return job
            time.sleep(every)

    def _within(self, ask: Callable[[], T]) -> T:
        """The answer to a request. Ray's client itself would wait for ever."""
        got: list[T] = []
        failed: list[Exception] = []

        def work() -> None:
            try:
                got.append(ask())
            except Exception as error:  # it is raised again in the thread that asked
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self._seconds)
        if got:
            return got[0]
        reason = failed[0] if failed else f"no answer within {self._seconds:.0f} s"
        raise ClusterError(
            f"the jobs of {self.address}: {reason}: write the address of the cluster's dashboard,"
            " such as address=http://head:8265, and its token into RAY_AUTH_TOKEN"
        ) from (failed[0] if failed else None)


def _send_token() -> None:
    """Must come before the first import of ray, which reads the mode."""
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
