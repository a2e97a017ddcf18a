"""A panel at work in a run: towers shared in one reward worker, scores that come while pictures are
still being made, and a served judge whose server dies.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from pipelines import align
from pipelines.cli import main
from rewards.backbones.towers import save_towers
from rewards.judge import load_judge, run_judge
from rewards.trained import save_judge, shared_towers
from rlhf.cluster.base import RewardWorker, assemble_scores, samples_of
from rlhf.cluster.local import LocalCluster
from rlhf.run import Run
from tests.rewards.towers_tiny import tiny_judge, tiny_towers
from tests.rlhf.tiny import arguments, judge_spec, recipe, request, sampler

ROOT = Path(__file__).parents[2]
TOGETHER = ("aesthetics", "fidelity", "portrait")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three judges on one pair of towers, as a run names them."""
    folder = tmp_path_factory.mktemp("judges")
    towers = tiny_towers(folder / "fresh")
    save_towers(towers, folder / "towers")
    for axis in TOGETHER:
        save_judge(folder / axis, tiny_judge(towers, axis), "../towers")
    return [str(folder / axis) for axis in TOGETHER]


def test_judges_of_one_reward_worker_pay_for_a_picture_once(tiny_base, folders, monkeypatch):
    cluster = LocalCluster(recipe(tiny_base))
    refs = cluster.rollout(request(1, sampler()), cluster.publish("behaviour"))
    worker = RewardWorker(folders)
    towers = {id(judge.model.towers) for judge in worker.judges.values()}
    assert len(towers) == 1
    shared = shared_towers(str(Path(folders[0]).parent / "towers"))
    seen, original = [], shared._see
    monkeypatch.setattr(shared, "_see", lambda p: seen.append(len(p)) or original(p))
    judged = worker.score(cluster._held[refs[0].id])
    states = {name: {s.state for s in scores} for name, scores in judged.scores.items()}
    assert states == {"aesthetics": {"ok"}, "fidelity": {"ok"}, "portrait": {"na"}}
    assert sum(seen) == len(refs[0].seeds)
    assert set(judged.seconds) == set(TOGETHER) and min(judged.seconds.values()) >= 0
    cluster.close()


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_scores_come_while_pictures_are_made_from_every_replica(
    tiny_base, folders, ray_head, tmp_path
):
    """`diary` writes who was asked and when; the panel beside it says the same as here."""
    from rlhf.cluster.ray import RayCluster

    made = recipe(tiny_base, kind="ray", rollout_workers=1, reward_workers=2)
    (tmp_path / "judges.py").write_text(DIARY.format(diary=str(tmp_path / "diary")))
    made = replace(made, judges=(*folders, f"{tmp_path / 'judges.py'}:diary"))
    cluster = RayCluster(made)
    try:
        version = cluster.publish("behaviour")
        refs = cluster.rollout(request(1, sampler(steps=8), groups=4, size=8), version)
        last_picture = time.monotonic()
        scores = cluster.score(refs)
        pixels = cluster.pixels(refs)
    finally:
        cluster.close()
    asked = [line.split() for line in (tmp_path / "diary").read_text().splitlines()]
    assert len(asked) == 4 and len({pid for pid, _ in asked}) == 2
    assert sorted(float(when) < last_picture for _, when in asked)[1:] == [True] * 3
    assert all(seconds > 0 for name, seconds in scores.seconds.items() if name != "portrait")
    for name, folder in zip(TOGETHER, folders, strict=True):
        for ref, group, own in zip(refs, scores.table[name], pixels, strict=True):
            here = run_judge(load_judge(folder), samples_of(ref.prompt, own))
            assert [s.value for s in group] == pytest.approx([s.value for s in here], abs=1e-6)


DIARY = """
import os, time

def diary(images, prompts, sources):
    with open({diary!r}, "a") as file:
        file.write(f"{{os.getpid()}} {{time.monotonic()}}\\n")
    return [0.5] * len(images)
"""


# --- a served judge -------------------------------------------------------------------------------


class Server:
    """`rlhf reward serve` in a process of its own, with the judge `named`."""

    def __init__(self, port: int) -> None:
        self.port, self.process = port, None

    def start(self) -> None:
        words = [f"judges={{named: '{judge_spec('named')}'}}", f"port={self.port}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "reward", "serve", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/readyz", trust_env=False)
                return
            except httpx.HTTPError:
                time.sleep(0.05)
        raise AssertionError("the server did not come")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Troubled(LocalCluster):
    """Its judge's server dies in the middle of iteration 2, and is back while the judge is asked
    again; it dies in the middle of iteration 3, and is back only afterwards. Every score is
    compared with that of the same judge here.
    """

    server: Server
    states: list

    def __init__(self, given) -> None:
        super().__init__(given)
        self.remote = self.rewards.judges["named"]
        self.local = load_judge(judge_spec("named"))

    def score(self, refs):
        number = refs[0].iteration
        if number == 4:
            self.server.start()
            self.server.wait()
        groups = [self.judged(number, i, ref) for i, ref in enumerate(refs)]
        scores = assemble_scores(self.cards(), groups)
        for ref, group in zip(refs, scores.table["named"], strict=True):
            here = self.local.score(samples_of(ref.prompt, self._held[ref.id].pixels.numpy()))
            for score, truth in zip(group, here, strict=True):
                assert score.state == "failed" or score == truth
        self.states.append((number, [[s.state for s in g] for g in scores.table["named"]]))
        return scores

    def judged(self, number, position, ref):
        if number in (2, 3) and position == 1:
            self.server.kill()
            self.remote.retries = 8 if number == 2 else 1
            if number == 2:
                self.server.start()
        return self.rewards.score(self._held[ref.id])


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_a_run_goes_on_through_the_death_of_its_judges_server(
    tiny_base, tmp_path, free_port, monkeypatch, capsys
):
    server = Server(free_port)
    server.start()
    server.wait()
    Troubled.server, Troubled.states = server, []
    monkeypatch.setattr(align, "make_cluster", Troubled)
    argv = arguments(
        tiny_base,
        tmp_path,
        f"judges=[http://127.0.0.1:{free_port}/named]",
        "evaluation.every=0",
        "max_failed_share=0.5",
    )
    try:
        assert main(argv) == 0
    finally:
        server.kill()
    trained = {n: states for n, states in Troubled.states if n < 2**31}
    whole, half = [["ok"] * 4] * 2, [["ok"] * 4, ["failed"] * 4]
    assert trained == {1: whole, 2: whole, 3: half, 4: whole}
    rows = Run(tmp_path / "runs" / "tiny").rows()
    assert [r["reward/named/failed"] for r in rows] == [0, 0, 0.5, 0]
    assert [r["advantage/live"] for r in rows] == [1, 1, 0.5, 1]
    assert all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in rows)
    assert rows[2]["reward/named/mean"] == pytest.approx(rows[2]["reward/total"])
