"""`rlhf reward serve`: judges over HTTP, each in an environment and on a machine of its own.

Runs until Ctrl-C or SIGTERM and then ends with 0, after what is being scored. See
[docs/serving.md](../docs/serving.md).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rewards.compat import ensure_torchvision
from rewards.judge import load_judge
from rewards.lane import LaneConfig
from rewards.server import ServerConfig
from rewards.server import serve as serve_judges
from rewards.wire import TOKEN
from rlhf.errors import ConfigError
from rlhf.run import report


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """`judges`: the name in the URL -> what `judges` of an alignment run would be given.

    `threads` are torch's, shared by all judges. The token comes from the environment variable
    RLHF_REWARD_TOKEN, so that no file or process list shows it.
    """

    judges: dict[str, str] = field(default_factory=lambda: {"fidelity": "oracle/fidelity"})
    host: str = "127.0.0.1"
    port: int = 8000
    threads: int = 1
    lane: LaneConfig = field(default_factory=LaneConfig)
    max_samples: int = 64
    max_body_mb: int = 64
    max_side: int = 4096
    drain_s: float = 10.0

    def check(self) -> None:
        if self.threads < 1 or not 0 < self.port < 2**16:
            raise ConfigError(
                f"expected threads from 1 and a port from 1 to 65535, got {self.threads} and "
                f"{self.port}: threads=1 port=8000 is usual"
            )

    def server(self) -> ServerConfig:
        """Its part for `rewards.server`. Raises RewardConfigError without a token where it needs
        one.
        """
        return ServerConfig(
            host=self.host,
            port=self.port,
            token=os.environ.get(TOKEN) or None,
            lane=self.lane,
            max_samples=self.max_samples,
            max_body_mb=self.max_body_mb,
            max_side=self.max_side,
            drain_s=self.drain_s,
        )


def serve(config: ServeConfig) -> dict[str, Any]:
    """Load the judges, serve them until a signal; what was asked and answered."""
    server = config.server()  # refuses before anything is loaded
    ensure_torchvision()
    import torch

    torch.set_num_threads(config.threads)
    began = time.monotonic()
    judges = {name: load_judge(spec) for name, spec in config.judges.items()}
    for name, judge in judges.items():
        where = f"http://{config.host}:{config.port}/{name}"
        print(f"{where}  {judge.card.name} revision {judge.card.revision}", file=sys.stderr)
    counts = serve_judges(judges, server)
    metrics = {
        f"serve/{name}/{what}": {"value": count}
        for name, found in counts.items()
        for what, count in sorted(found.items())
    }
    return report("reward serve", time.monotonic() - began, metrics)


def plan_serve(config: ServeConfig) -> str:
    """What would be served where, for --dry-run. Raises RewardConfigError like `serve`."""
    server = config.server()
    lines = [
        f"http://{server.host}:{server.port}/{name}  {spec}" for name, spec in config.judges.items()
    ]
    guard = "with a token" if server.token else "without a token, for this machine only"
    lane = config.lane
    lines.append(
        f"{guard}; up to {lane.max_batch} samples a call, {lane.queue} waiting, "
        f"{lane.timeout_s:g} s a call"
    )
    return "\n".join(lines)


def summarise_serve(result: Mapping[str, Any]) -> str:
    """What each judge was asked."""
    lines = [f"{name}  {metric['value']}" for name, metric in result["metrics"].items()]
    return "\n".join([*lines, f"served for {result['seconds']:.0f} s"])
