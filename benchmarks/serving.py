"""Many clients against the served judges, through a killed and restarted server if asked.

    python -m benchmarks.serving --minutes 5 --restart --out benchmarks/results/serving.json

Each client asks one of the judges of configs/reward/serve.yaml for one to four pictures of 64, 96
and 128 px at a time, each as a sample of its own so that nothing comes from the cache, and compares
every score with the judge's own in this process. `lost` are samples without a score, `wrong` those
whose state differs or whose value is more than 1e-5 away; both must be 0. Latency is that of a
`score` call with all its waits for a full queue or a dead server. The clients share one process,
whose work (PNG, JSON) is part of the throughput; `bare` are the judges alone, in batches of 16.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np

from pipelines.reward_serve import ServeConfig
from rewards.client import RemoteJudge
from rewards.judge import Judge, load_judge
from rewards.scenes import world
from rewards.scenes.candidates import answer
from rewards.scenes.render import render
from rewards.scenes.specs import Edit
from rewards.scenes.world import Category
from rewards.types import Sample, Score
from rlhf import config
from rlhf.files import atomic_write_text, json_text
from rlhf.run import machine, report

SIZES = (64, 96, 128)  # px
QUEUE = 32  # of each judge, so that its dozen clients fill it now and then
TOLERANCE = 1e-5
CONFIG = "reward/serve"


@dataclass
class Tally:
    """What one client saw."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    worst: float = 0.0  # difference from the judge's own score

    def see(self, score: Score, truth: Score) -> None:
        """Count one answer."""
        if score.state == "failed":
            self.counts["lost"] += 1
            return
        away = 0.0 if score.state == truth.state else float("inf")
        if score.value is not None and truth.value is not None:
            away = abs(score.value - truth.value)
        self.worst = max(self.worst, away)
        self.counts["ok" if away <= TOLERANCE else "wrong"] += 1


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One served judge, what it is asked, and what it says in this process."""

    name: str
    judge: Judge
    samples: list[Sample]
    truth: list[Score]


def pool(judge: Judge, count: int) -> list[Sample]:
    """Noisy pictures of each size, of the categories that the judge judges."""
    rng, out = np.random.default_rng(0), []
    kinds = [kind for kind in get_args(Category) if {kind, "*"} & set(judge.card.categories)]
    for i in range(count):
        spec = world.draw(kinds[i // len(SIZES) % len(kinds)], i)
        size = SIZES[i % len(SIZES)]
        picture = render(spec.target if isinstance(spec, Edit) else spec, size)
        noisy = np.clip(picture + rng.normal(0, 20, picture.shape), 0, 255).astype(np.uint8)
        out.append(answer(spec, noisy))
    return out


def asked(specs: Mapping[str, str], count: int = 48) -> list[Asked]:
    """The judges by their name on the server, each with `count` samples."""
    out = []
    for name, spec in specs.items():
        judge = load_judge(spec)
        samples = pool(judge, count)
        out.append(Asked(name=name, judge=judge, samples=samples, truth=judge.score(samples)))
    return out


class Server:
    """`rlhf reward serve` in a process of its own."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        words = ["--config", CONFIG, f"port={self.port}", f"lane.queue={QUEUE}", "max_samples=16"]
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


def client(number: int, url: str, about: Asked, end: float) -> Tally:
    """Ask until `end` (monotonic seconds)."""
    judge, tally = RemoteJudge(f"{url}/{about.name}", retries=20), Tally()
    rng, count = np.random.default_rng(number), 0
    while time.monotonic() < end:
        chosen = rng.integers(0, len(about.samples), rng.integers(1, 5))
        batch = [
            replace(about.samples[k], columns={"asked": f"{number} {count + i}"})
            for i, k in enumerate(chosen)
        ]
        count += len(batch)
        began = time.monotonic()
        scores = judge.score(batch)
        tally.seconds.append(time.monotonic() - began)
        for score, k in zip(scores, chosen, strict=True):
            tally.see(score, about.truth[k])
    tally.counts += Counter({f"trouble {name}": n for name, n in judge.troubles.items()})
    return tally


def bare(every: Sequence[Asked], seconds: float = 2.0) -> float:
    """Samples per second of the judges alone, each asked as much as the others."""
    done, began = 0, time.monotonic()
    while time.monotonic() < began + seconds:
        for about in every:
            for size in SIZES:
                batch = [s for s in about.samples if s.image.shape[1] == size][:16]
                done += len(about.judge.score(batch))
    return done / (time.monotonic() - began)


def measure(clients: int, seconds: float, restart: bool) -> dict[str, dict[str, float | int]]:
    """The figures of one run."""
    judged = asked(config.load(ServeConfig, CONFIG, [], "reward").judges)
    alone, server = bare(judged), Server()
    try:
        RemoteJudge(f"{server.url}/{judged[0].name}", retries=100)  # waits until it is there
        began = time.monotonic()
        if restart:
            threading.Thread(target=server.restart, args=(seconds / 2,)).start()
        with ThreadPoolExecutor(clients) as threads:
            found = [
                threads.submit(client, i, server.url, judged[i % len(judged)], began + seconds)
                for i in range(clients)
            ]
            tallies = [one.result() for one in found]
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
        "worst_difference": max(tally.worst for tally in tallies),
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
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
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
