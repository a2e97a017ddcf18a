"""Replaceable actors, with actors that do next to nothing."""

import os
import signal
import threading
import time

import pytest

from rlhf.errors import ClusterError, ConfigError
from tests.rlhf.bodies import Body

pytestmark = pytest.mark.ray


@pytest.fixture
def crew(tmp_path, ray_head):
    import ray

    from rlhf.cluster.crew import Crew, drive

    made = []

    def make(size=1, **limits):
        spawn = lambda seat: ray.remote(Body).options(num_cpus=0).remote()  # noqa: E731
        limits = {"seconds": 60.0, "patience": 60.0, **limits}
        made.append(Crew("worker", spawn, str(tmp_path), size, **limits))
        drive(made, lambda: made[-1].started)
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(crew, numbers, until=None, **more):
    """Answers in the order in which they come."""
    from rlhf.cluster.crew import Call, drive

    got = []
    for number in numbers:
        crew.put(Call(method="work", args=(number,), then=got.append, **more))
    crew.dispatch()
    drive([crew], until or (lambda: len(got) == len(numbers)))
    return got


def asked(tmp_path):
    return [int(line) for line in (tmp_path / "log").read_text().split()]


def test_a_call_of_a_dead_actor_is_asked_again_first(crew, tmp_path):
    one = crew()
    (tmp_path / "block-1").touch()
    (first,) = one.pids.values()

    def strike():
        while not (tmp_path / "log").exists():
            time.sleep(0.01)
        os.kill(first, signal.SIGKILL)
        (tmp_path / "block-1").unlink()

    thread = threading.Thread(target=strike)
    thread.start()
    answers = ask(one, [1, 2, 3])
    thread.join()
    assert answers == [10, 20, 30] and asked(tmp_path) == [1, 1, 2, 3]
    assert first not in one.pids.values()


def test_an_actor_past_its_time_is_replaced_and_its_call_given_up_at_last(crew, tmp_path):
    one, reasons = crew(seconds=1.0, tries=2), []
    (tmp_path / "block-5").touch()
    ask(one, [5], until=lambda: bool(reasons), give_up=reasons.append)
    assert reasons == ["no answer within 1 s"] and asked(tmp_path) == [5, 5]
    assert ask(one, [6]) == [60]
    with pytest.raises(ClusterError, match="2 actors in a row were lost over one call"):
        ask(one, [5])


def test_what_a_call_raises_comes_back_as_itself_and_the_actor_lives(crew, tmp_path):
    one = crew()
    pids = dict(one.pids)
    with pytest.raises(ConfigError, match="number >= 0"):
        ask(one, [-1])
    assert ask(one, [7]) == [70] and one.pids == pids


def test_answers_that_came_while_nobody_looked_are_not_late(crew, tmp_path, ray_head):
    import ray

    from rlhf.cluster.crew import Call, drive

    two, got = crew(size=2, seconds=1.0), []
    pids = dict(two.pids)
    for number in (1, 2):
        two.put(Call(method="work", args=(number,), then=got.append))
    two.dispatch()
    time.sleep(2.0)  # the driver was stopped, or busy
    drive([two], lambda: len(got) == 2)
    assert sorted(got) == [10, 20] and sorted(asked(tmp_path)) == [1, 2] and two.pids == pids
    drive([], lambda: True, [ray.put(1), ray.put(2)], 0.0)


def test_actors_that_died_idle_cost_a_call_one_try(crew, tmp_path):
    three = crew(size=3, tries=2)
    pids = set(three.pids.values())
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert ask(three, [1]) == [10] and asked(tmp_path) == [1]
    assert not pids & set(three.pids.values())


def test_without_a_replacement_the_rest_go_on_and_the_last_one_ends_it(crew, tmp_path, caplog):
    from rlhf.cluster.crew import Call

    two = crew(size=2)
    (tmp_path / "no-start").touch()
    two.tries = 1
    for left in (1, 0):
        gone = []
        two.put(Call(method="die", args=(), then=gone.append, give_up=gone.append))
        if left:
            ask(two, [1], until=lambda gone=gone: bool(gone) and two.started)
            assert ask(two, [2, 3]) == [20, 30]
            assert caplog.messages[-1].startswith("a worker could not be started:")
        else:
            with pytest.raises(ClusterError, match="no worker is left of 2"):
                ask(two, [4])


def test_a_driven_wait_for_others_ends(crew, ray_head):
    import ray

    from rlhf.cluster.crew import drive

    slow = ray.remote(lambda: time.sleep(30)).options(num_cpus=0).remote()
    with pytest.raises(TimeoutError, match="no answer within 1 s"):
        drive([], lambda: True, [slow], 1.0)
    ray.cancel(slow, force=True)
    with pytest.raises(ClusterError, match="nothing is under way"):
        drive([], lambda: False)
