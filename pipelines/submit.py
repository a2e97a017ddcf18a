"""`rlhf submit`: run a command of this package as a job of a Ray cluster.

The job's driver runs on the head node and joins the cluster there, whatever the command's
`cluster.address` says by default. What it prints is printed here until it ends.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.cluster.jobs import Jobs
from rlhf.errors import ClusterError, ConfigError
from rlhf.run import report


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`command` as after `rlhf`. `address` is that of the cluster's dashboard.

    `python` is the interpreter on the head node, by default this one; `working_dir` is sent along
    and is where the command runs. Without `wait` the job's id is all that comes back.
    """

    command: str = ""
    address: str = "http://127.0.0.1:8265"
    python: str = sys.executable
    working_dir: str | None = None
    wait: bool = True
    request_seconds: float = 60.0  # that the cluster may take to answer

    def check(self) -> None:
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise ConfigError(f"command: {error}: {self.command}") from error
        if not words or words[0] in ("submit", "rlhf"):
            raise ConfigError(
                f"command: expected the words after `rlhf`, got '{self.command}': write for example"
                " 'align --config align/scenes runs=/shared/runs'"
            )
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(
                f"address: expected that of a dashboard, got {self.address}: write http://head:8265"
            )
        if not self.request_seconds > 0:
            raise ConfigError(
                f"request_seconds: expected more than 0, got {self.request_seconds}: 60 is usual"
            )

    @property
    def words(self) -> list[str]:
        """The command line of the job."""
        return [self.python, "-m", "pipelines.cli", *shlex.split(self.command)]


def run(config: Config) -> dict[str, Any]:
    """Submit, follow to the end; returns the job's id and status.

    Raises:
        ClusterError: the cluster does not answer, or the job did not succeed.
    """
    began = time.monotonic()
    jobs = Jobs(config.address, config.request_seconds)
    id = jobs.submit(config.words, config.working_dir)
    print(f"job {id} at {config.address}: ray job stop {id} ends it", file=sys.stderr, flush=True)
    if config.wait:
        job = jobs.follow(id, lambda text: print(text, end="", file=sys.stderr, flush=True))
        if job.status != "SUCCEEDED":
            raise ClusterError(f"job {id} ended as {job.status}: {job.message}")
    else:
        job = jobs.state(id)
    return report("submit", time.monotonic() - began, {}, job=id, status=job.status)


def plan(config: Config) -> str:
    """What would be run, for --dry-run."""
    return f"at {config.address}: {shlex.join(config.words)}"


def summarise(result: Mapping[str, Any]) -> str:
    return f"job {result['job']}: {result['status']}"
