"""Many clients against one served judge, through a killed and restarted server if asked.

    python -m benchmarks.serving --minutes 5 --restart --out benchmarks/results/serving.json

Each client asks for one to four pictures of 64, 96 and 128 px at a time, each with a prompt of its
own so that nothing comes from the cache, and compares every score with the oracle's own. `lost` are
samples without a score, `wrong` those with another one than here; both must be 0. Latency is that
of a `score` call with all its waits for a full queue or a dead server. The clients share one
process, whose work (PNG, JSON) is part of the throughput; `bare` is the judge alone, in batches of
16.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rewards.client import RemoteJudge
from rewards.scenes import world
from rewards.scenes.judge import OracleJudge
from rewards.scenes.render import render
from rewards.types import Sample, Score
from rlhf.files import atomic_write_text, json_text
from rlhf.run import machine, report

SIZES = (64, 96, 128)  # px
QUEUE = 96  # of the server, so that 64 clients fill it now and then


@dataclass
class Tally:
    """What one client saw."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


def pool(count: int) -> list[Sample]:
    """Noisy pictures of each size, with their specs."""
    rng, out = np.random.default_rng(0), []
    for i in range(count):
        spec = world.draw("objects", i)
        picture = render(spec, SIZES[i % len(SIZES)])  # type: ignore[arg-type]
        noisy = np.clip(picture + rng.normal(0, 20, picture.shape), 0, 255).astype(np.uint8)
        out.append(Sample(image=noisy, prompt="", category="objects", target=world.dump(spec)))
    return out


class Server:
    """`rlhf reward serve` in a process of its own."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/fidelity"
        self.start()

    def start(self) -> None:
        words = ["judges={fidelity: oracle/fidelity}", f"port={self.port}", f"lane.queue={QUEUE}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "reward", "serve", *words, "--json"],
            stdout=subprocess.DEVNULL,
        )

    def restart(self, after_s: float) -> None:
        """Kill it as a lost machine would be, and start it again."""
        time.sleep(after_s)
        self.process.kill()
        self.process.wait()
        self.start()


def client(number: int, url: str, samples: list[Sample], truth: list[Score], end: float) -> Tally:
    """Ask until `end` (monotonic seconds)."""
    judge, tally = RemoteJudge(url, retries=20), Tally()
    rng, asked = np.random.default_rng(number), 0
    while time.monotonic() < end:
        chosen = rng.integers(0, len(samples), rng.integers(1, 5))
        batch = [replace(samples[k], prompt=f"{number} {asked + i}") for i, k in enumerate(chosen)]
        asked += len(batch)
        began = time.monotonic()
        scores = judge.score(batch)
        tally.seconds.append(time.monotonic() - began)
        for score, k in zip(scores, chosen, strict=True):
            what = "ok" if score == truth[k] else "lost" if score.state == "failed" else "wrong"
            tally.counts[what] += 1
    tally.counts += Counter({f"trouble {name}": n for name, n in judge.troubles.items()})
    return tally


def bare(samples: list[Sample], seconds: float = 2.0) -> float:
    """Samples per second of the judge alone."""
    judge, done, began = OracleJudge("fidelity"), 0, time.monotonic()
    by_size = [[s for s in samples if s.image.shape[1] == size][:16] for size in SIZES]
    while time.monotonic() < began + seconds:
        done += sum(len(judge.score(batch)) for batch in by_size)
    return done / (time.monotonic() - began)


def measure(clients: int, seconds: float, restart: bool) -> dict[str, dict[str, float | int]]:
    """The figures of one run."""
    samples = pool(96)
    truth, alone, server = OracleJudge("fidelity").score(samples), bare(samples), Server()
    try:
        RemoteJudge(server.url, retries=100)  # waits until it is there
        began = time.monotonic()
        if restart:
            threading.Thread(target=server.restart, args=(seconds / 2,)).start()
        with ThreadPoolExecutor(clients) as threads:
            ends = [began + seconds] * clients
            every = [[value] * clients for value in (server.url, samples, truth)]
            tallies = list(threads.map(client, range(clients), *every, ends))
        took = time.monotonic() - began
    finally:
        server.process.terminate()
        server.process.wait(30)
    counts = sum((tally.counts for tally in tallies), Counter())
    latency = np.concatenate([tally.seconds for tally in tallies])
    figures: dict[str, float | int] = {
        "clients": clients,
        "requests": latency.size,
        **{what: counts[what] for what in ("ok", "lost", "wrong")},
        "refusals": counts["trouble 503"],
        "lost_connections": sum(
            n for name, n in counts.items() if name.startswith("trouble") and name[8:] != "503"
        ),
        "samples_per_second": counts["ok"] / took,
        "bare_samples_per_second": alone,
        **{f"latency_p{p}_seconds": float(np.percentile(latency, p)) for p in (50, 90, 99)},
        "latency_max_seconds": float(latency.max()),
    }
    return {f"serving/{name}": {"value": value} for name, value in figures.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--restart", action="store_true", help="kill the server half-way")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.json"))
    options = parser.parse_args()
    began = time.monotonic()
    metrics = measure(options.clients, 60 * options.minutes, options.restart)
    result = report(
        "bench serving",
        time.monotonic() - began,
        metrics,
        minutes=options.minutes,
        restart=options.restart,
        sizes=list(SIZES),
        queue=QUEUE,
        machine=machine(),
    )
    text = json_text(result)
    atomic_write_text(options.out, text)
    print(text)
    return int(metrics["serving/lost"]["value"] + metrics["serving/wrong"]["value"] > 0)


if __name__ == "__main__":
    sys.exit(main())
