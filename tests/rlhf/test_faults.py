"""Workers that die or hang in the middle of a run, and what is left of it: everything."""

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rlhf.cluster.local import LocalCluster
from rlhf.errors import ClusterError, LearnerLost
from rlhf.loop import align
from tests.rlhf.test_cluster import Plan, Watch, assert_bitwise_equal, outcome
from tests.rlhf.tiny import judge_spec, recipe, request, sampler

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass(frozen=True)
class Marked(Plan):
    """Prompts carry a folder in which judges leave traces."""

    folder: str = ""

    def request(self, iteration):
        asked = super().request(iteration)
        marked = tuple(replace(p, columns={"folder": self.folder}) for p in asked.prompts)
        return replace(asked, prompts=marked)


def ray_cluster(tiny_base, kind=None, **settings):
    from rlhf.cluster.ray import RayCluster

    judges = settings.pop("judges", ("brightness",))
    return (kind or RayCluster)(recipe(tiny_base, judges=judges, kind="ray", **settings))


@pytest.fixture(scope="module")
def undisturbed(tiny_base, tmp_path_factory):
    plan = Plan(groups=3)
    return outcome(LocalCluster(recipe(tiny_base)), plan, tmp_path_factory.mktemp("undisturbed"))


def killing():
    """A cluster that kills a rollout worker in its second rollout and a judge in its third."""
    from rlhf.cluster.ray import RayCluster

    class Killing(RayCluster):
        killed = ()

        def rollout(self, asked, version):
            self.begin(asked, version)
            kind = {2: "rollout", 3: "reward"}.get(asked.iteration)
            if kind is not None:
                victim = self.processes[kind][0]
                os.kill(victim, signal.SIGKILL)
                self.killed = (*self.killed, victim)
            return super().rollout(asked, version)

        def close(self):
            alive = {pid for pids in self.processes.values() for pid in pids} if self.killed else ()
            assert not set(self.killed) & set(alive)
            super().close()

    return Killing


def test_a_run_with_killed_workers_ends_as_one_without(tiny_base, tmp_path, ray_head, undisturbed):
    cluster = ray_cluster(tiny_base, killing(), rollout_workers=2)
    assert_bitwise_equal(undisturbed, outcome(cluster, Plan(groups=3), tmp_path))
    assert len(cluster.killed) == 2


def test_a_judge_that_took_its_process_with_it_is_asked_again(tiny_base, tmp_path, ray_head):
    name, plan = "dies_once", Marked(judges=("dies_once",), iterations=2, folder=str(tmp_path))
    first = outcome(ray_cluster(tiny_base, judges=(name,)), plan, tmp_path / "first")
    assert (tmp_path / "died").exists()  # and from now on the judge is like any other
    again = outcome(LocalCluster(recipe(tiny_base, judges=(name,))), plan, tmp_path / "again")
    assert_bitwise_equal(first, again)


def test_a_judge_that_never_answers_fails_and_the_other_one_counts(tiny_base, ray_head):
    names = ("always_hangs", "brightness")
    cluster = ray_cluster(tiny_base, judges=names, judge_seconds=4.0)
    try:
        version = cluster.publish("behaviour")
        began = time.monotonic()
        scores = cluster.score(cluster.rollout(request(1, sampler(), groups=1), version))
        assert time.monotonic() - began < 120
        hung, fine = (scores.table[judge_spec(name)][0] for name in names)
        assert {s.state for s in hung} == {"failed"} and "no answer within 4 s" in hung[0].reason
        assert {s.state for s in fine} == {"ok"}
    finally:
        cluster.close()


def test_a_learner_that_dies_is_an_error_of_its_own(tiny_base, ray_head):
    cluster = ray_cluster(tiny_base)
    try:
        cluster.publish("behaviour")
        os.kill(cluster.processes["learner"][0], signal.SIGKILL)
        with pytest.raises(LearnerLost, match="--resume"):
            cluster.publish("behaviour")
    finally:
        cluster.close()


def test_one_learner_of_two_that_dies_in_an_update_takes_both_along(tiny_base, ray_head):
    from rlhf.cluster.ray import RayCluster

    class Killing(RayCluster):
        def _ask(self, learners, method, *args):
            if method == "update":
                os.kill(self.processes["learner"][1], signal.SIGKILL)
            return super()._ask(learners, method, *args)

    cluster = ray_cluster(tiny_base, Killing, learners=2)
    try:
        with pytest.raises(LearnerLost, match="learner, update"):
            align(cluster, Plan(), Watch(cluster))
    finally:
        cluster.close()


def ended(pid, seconds=30.0):
    """Whether a process is gone, or goes in time."""
    end = time.monotonic() + seconds
    while alive := Path(f"/proc/{pid}").exists():
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return not alive


def test_a_hanging_worker_is_replaced_and_without_a_replacement_the_run_ends(tiny_base, ray_head):
    cluster = ray_cluster(tiny_base)
    try:
        version = cluster.publish("behaviour")
        cluster.workers._seconds = 10.0  # for a call; to start takes longer
        cluster.begin(request(1, sampler(), groups=1), version)
        (stopped,) = cluster.processes["rollout"]
        os.kill(stopped, signal.SIGSTOP)
        refs = cluster.rollout(request(1, sampler(), groups=1), version)
        assert ended(stopped)  # it holds no memory any more
        assert [p.shape for p in cluster.pixels(refs)] == [(4, 3, 64, 64)]
        cluster.workers._patience = 0.0  # nobody starts in no time
        cluster.begin(request(2, sampler(), groups=1), version)
        os.kill(cluster.processes["rollout"][0], signal.SIGKILL)
        with pytest.raises(ClusterError, match="no rollout worker is left of 1"):
            cluster.rollout(request(2, sampler(), groups=1), version)
    finally:
        cluster.close()
