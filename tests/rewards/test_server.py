"""A server refuses what is malformed, never hangs, and never answers one sample in two ways."""

import base64
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from rewards.errors import ImageError, JudgeBusy, RewardConfigError
from rewards.lane import LEFT_BEHIND, Lane, LaneConfig
from rewards.server import ServerConfig, make_app
from rewards.types import JudgeCard, Score
from rewards.wire import encode_sample, from_png, to_png
from tests.rewards.serving import Stub, ask, scenes, served

PNG = to_png(scenes(1)[0].image)


@pytest.fixture(scope="module")
def server():
    with served(max_body_mb=1, max_samples=8, max_side=128) as found:
        yield found


def body(*prompts, **fields):
    item = {"image": PNG, "category": "objects"} | fields
    return {"samples": [item | {"prompt": str(prompt)} for prompt in prompts]}


def post(server, content, name="stub", headers=None):
    content = json.dumps(content) if isinstance(content, dict) else content
    return httpx.post(f"{server.url}/v1/judges/{name}/score", content=content, headers=headers)


def results(lane, samples):
    return [future.result(timeout=10) for future in lane.submit(samples)]


def waiting_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# --- what is said ---------------------------------------------------------------------------------


def test_scores_come_with_one_value_and_the_card(server):
    answer = post(server, body(2, "raise", 3)).json()
    assert answer["judge"]["name"] == "stub" and answer["judge"]["revision"] == "1"
    first, fault, last = answer["scores"]
    assert first == {
        "value": 2.0, "state": "ok", "reason": "", "parts": {"twice": 4.0}, "flags": ["seen"]
    }  # fmt: skip
    assert (fault["value"], fault["state"]) == (None, "failed") and "at fault" in fault["reason"]
    assert last["value"] == 3.0


def test_cards_health_and_readiness(server):
    cards = httpx.get(f"{server.url}/v1/judges").json()["judges"]
    assert list(cards) == ["stub"] and cards["stub"]["high"] == 1e9
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert httpx.get(f"{server.url}/readyz").json() == {"ready": True, "judges": {"stub": ""}}


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (pickle.dumps({"samples": []}), 422, "body: Invalid JSON"),
        (b"", 422, "body: Invalid JSON"),
        (body(1) | {"more": 1}, 422, "more: Extra inputs"),
        ({"samples": [body(1)["samples"][0], {"prompt": "1"}]}, 422, "samples[1].image"),
        (body(1, image=PNG[:-1]), 422, "samples[0].image: expected base64"),
        (body(1, image="~" + PNG[1:]), 422, "samples[0].image: expected base64"),
        (body(1, image=PNG[:400]), 422, "samples[0].image: expected a whole PNG"),
        (body(1, image=base64.b64encode(pickle.dumps([1] * 99)).decode()), 422, "expected a PNG"),
        (body(1, sources=[PNG, "GIF8"]), 422, "samples[0].sources[1]: expected a PNG"),
        (body(1, image=to_png(ask(1, size=129)[0].image)), 422, "got 129 x 129"),
        (body(1, columns={"x": [1, {"y": 2}]}, category=3), 422, "samples[0].category"),
        (body(*range(9)), 413, "at most 8 samples"),
        (body("x" * 2**20), 413, "at most 1 MB"),
    ],
)
def test_what_is_malformed_is_refused_by_name_and_not_judged(server, content, status, said):
    calls = len(server.judges["stub"].calls)
    answer = post(server, content)
    assert answer.status_code == status and said in answer.json()["detail"]
    assert len(server.judges["stub"].calls) == calls


def test_a_flipped_bit_in_a_picture_is_seen():
    data = bytearray(base64.b64decode(PNG))
    data[len(data) // 2] ^= 4
    with pytest.raises(ImageError, match="expected a whole PNG"):
        from_png(base64.b64encode(data).decode(), 4096)


def test_a_huge_picture_is_refused_before_it_is_decoded():
    data = bytearray(base64.b64decode(PNG))
    data[16:24] = (50_000).to_bytes(4, "big") * 2
    with pytest.raises(ImageError, match="50000 x 50000"):
        from_png(base64.b64encode(data).decode(), 4096)


def test_an_unknown_judge_is_named_with_those_there_are(server):
    answer = post(server, body(1), name="other")
    assert answer.status_code == 404 and "['stub'], got 'other'" in answer.json()["detail"]


def test_an_answer_that_is_known_comes_at_once(server):
    with httpx.Client() as client:
        seconds = []
        for _ in range(15):
            began = time.perf_counter()
            client.post(f"{server.url}/v1/judges/stub/score", json=body(6)).raise_for_status()
            seconds.append(time.perf_counter() - began)
    assert sorted(seconds)[7] < 0.035  # 40 ms is what TCP waits if its answers are held back


# --- who may ask ----------------------------------------------------------------------------------


def test_a_token_is_asked_for_before_anything_is_read():
    with served(token="secret") as server:
        for header in ({}, {"Authorization": "Bearer Secret"}, {"Authorization": "secret"}):
            assert post(server, b"never read", headers=header).status_code == 401
            assert httpx.get(f"{server.url}/v1/judges", headers=header).status_code == 401
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        right = {"Authorization": "Bearer secret"}
        assert post(server, body(5), headers=right).json()["scores"][0]["value"] == 5.0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
@pytest.mark.parametrize("token", [None, ""])
def test_a_host_that_others_reach_needs_a_token(host, token):
    with pytest.raises(RewardConfigError, match="expected a token"):
        ServerConfig(host=host, token=token)
    assert "secret" not in repr(ServerConfig(host=host, token="secret"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_none(host):
    assert ServerConfig(host=host).token is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"token": "two words"}, "printable ASCII"),
        ({"max_samples": 300}, "1 to lane.queue = 256"),
        ({"max_side": 0}, "max_side"),
    ],
)
def test_impossible_limits_are_refused(wrong, said):
    with pytest.raises(RewardConfigError, match=said):
        ServerConfig(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"max_batch": 0}, {"queue": 0}, {"timeout_s": 0.0}, {"cache": -1}]
)
def test_impossible_lanes_are_refused(wrong):
    with pytest.raises(RewardConfigError, match="lane"):
        LaneConfig(**wrong)


@pytest.mark.parametrize("judges", [{}, {"a/b": Stub()}, {"": Stub()}])
def test_names_must_fit_into_a_url(judges):
    with pytest.raises(RewardConfigError, match="expected names"):
        make_app(judges, ServerConfig())


# --- batches and the queue ------------------------------------------------------------------------


def test_batches_are_of_one_resolution_and_bounded():
    judge = Stub()
    lane = Lane(judge, LaneConfig(max_batch=3, max_wait_ms=200.0))
    samples = [s for i in range(5) for s in (*ask(i, size=8), *ask(i, size=16))]
    assert [score.value for score in results(lane, samples)] == [i // 2 for i in range(10)]
    assert sorted(map(len, judge.calls)) == [2, 2, 3, 3]
    assert all(len(set(sizes)) == 1 for sizes in judge.calls)
    lane.close(5.0)


def test_a_full_queue_refuses_at_once_and_takes_nothing_of_the_request():
    judge = Stub()
    with served({"stub": judge}, lane=LaneConfig(queue=4, max_batch=1), max_samples=4) as server:
        lane = server.lane()
        with ThreadPoolExecutor(2) as pool:
            slow = pool.submit(post, server, body("slow"))
            waiting_until(lambda: judge.calls)
            queued = pool.submit(post, server, body(1, 2, 3))
            waiting_until(lambda: lane.waiting == 3)
            began = time.monotonic()
            answer = post(server, body(4, 5))
            assert answer.status_code == 503 and time.monotonic() - began < 0.5
            assert answer.headers["retry-after"] == "1" and lane.waiting == 3
            assert "queue holds 4" in answer.json()["detail"]
            judge.release.set()
            assert [s["value"] for s in queued.result().json()["scores"]] == [1.0, 2.0, 3.0]
            assert slow.result().json()["scores"][0]["value"] == 1.0
        assert lane.counts["refused"] == 2 and lane.counts["ok"] == 4


def test_only_the_slow_sample_times_out():
    judge = Stub()
    lane = Lane(judge, LaneConfig(timeout_s=0.2))
    began = time.monotonic()
    scores = results(lane, ask(1, "slow", 2))
    assert [score.state for score in scores] == ["ok", "failed", "ok"]
    assert scores[1].value is None and scores[1].reason.startswith("timeout")
    assert time.monotonic() - began < 2
    assert results(lane, ask(3))[0].value == 3.0  # the lane goes on
    judge.release.set()
    waiting_until(lambda: results(lane, ask("slow"))[0].state == "ok")  # asked anew
    lane.close(5.0)


def test_a_judge_is_never_entered_twice():
    class Alone(Stub):
        def __init__(self):
            super().__init__()
            self.inside = []

        def __deepcopy__(self, memo):
            raise TypeError("it cannot be copied")

        def score(self, samples):
            self.inside.append(len(self.inside))
            assert len(self.inside) == 1
            try:
                return super().score(samples)
            finally:
                self.inside.pop()

    judge = Alone()
    lane = Lane(judge, LaneConfig(timeout_s=0.1))
    assert [s.state for s in results(lane, ask("slow", 1))] == ["failed", "failed"]
    with pytest.raises(JudgeBusy, match="1 calls have not returned"):
        lane.submit(ask(2))
    judge.release.set()
    waiting_until(lambda: not lane.trouble())
    assert results(lane, ask(2))[0].value == 2.0
    lane.close(5.0)


def test_a_judge_that_hangs_is_given_up_and_not_ready():
    judge = Stub()
    with served({"stub": judge}, lane=LaneConfig(timeout_s=0.05)) as server:
        answer = post(server, body(*(f"slow {i}" for i in range(8)))).json()
        assert {score["state"] for score in answer["scores"]} == {"failed"}
        assert len(judge.calls) == LEFT_BEHIND
        ready = httpx.get(f"{server.url}/readyz")
        assert ready.status_code == 503 and "not returned" in ready.json()["judges"]["stub"]
        assert post(server, body(1)).status_code == 503
        judge.release.set()
        waiting_until(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)


class Faulty:
    """Breaks in the way it is told."""

    card = JudgeCard(name="faulty", revision="1", preprocessing="none")

    def __init__(self, answer):
        self.answer = answer

    def score(self, samples):
        return [self.answer() for _ in samples]


def leave():
    raise SystemExit(3)


@pytest.mark.parametrize(
    "answer",
    [leave, lambda: 0.5, lambda: Score(value=1.0, parts={"x": "text"})],
    ids=["leaves", "a number", "words as a part"],
)
def test_whatever_a_judge_does_is_failed_and_no_number(answer):
    with served({"faulty": Faulty(answer)}) as server:
        for _ in range(2):
            (score,) = post(server, body(1), name="faulty").json()["scores"]
            assert (score["value"], score["state"]) == (None, "failed") and score["reason"]


# --- the same sample, the same answer -------------------------------------------------------------


def test_one_sample_is_never_answered_in_two_ways():
    judge = Stub(pause_s=0.02)  # its "count" differs from call to call
    with served({"stub": judge}, lane=LaneConfig(queue=1000)) as server:
        with ThreadPoolExecutor(16) as pool:
            asked = [body(f"count {i % 4}", "count 9") for i in range(64)]
            answers = list(pool.map(lambda content: post(server, content).json(), asked))
        by_prompt = {}
        for content, answer in zip(asked, answers, strict=True):
            for item, score in zip(content["samples"], answer["scores"], strict=True):
                by_prompt.setdefault(item["prompt"], set()).add(score["value"])
        assert all(len(values) == 1 for values in by_prompt.values())
        assert server.lane().counts["ok"] == 5 and server.lane().counts["again"] == 123


def test_every_byte_of_a_sample_counts():
    lane = Lane(Stub(), LaneConfig())
    (first,) = ask("count")
    changed = first.image.copy()
    changed[2, 7, 7] = 1
    fields = {"image": first.image, "prompt": "count", "category": "objects"}
    others = [
        fields | {"image": changed},
        fields | {"image": first.image.reshape(3, 4, 16)},
        fields | {"prompt": "count "},
        fields | {"category": "text"},
        fields | {"sources": (first.image,)},
        fields | {"target": ""},
        fields | {"columns": {"a": 1}},
        fields | {"columns": {"a": 1.0}},
        fields | {"columns": {"a": True}},
    ]
    samples = [first, *(type(first)(**other) for other in others)]
    values = [score.value for score in results(lane, samples)]
    assert len(set(values)) == len(samples)
    assert [score.value for score in results(lane, samples[::-1])][::-1] == values
    lane.close(5.0)


def test_failures_are_asked_anew():
    class Recovers(Stub):
        def _one(self, prompt):
            if next(self.seen) <= 3:  # once, once again, and alone
                raise ConnectionError("not yet")
            return Score(value=7.0)

    lane = Lane(Recovers(), LaneConfig())
    assert results(lane, ask("x"))[0].state == "failed"
    assert results(lane, ask("x"))[0].value == 7.0
    lane.close(5.0)


def test_the_cache_is_bounded_and_keeps_what_was_used_last():
    lane = Lane(Stub(), LaneConfig(cache=2, max_wait_ms=0.0))
    one, two = (results(lane, ask(p))[0].value for p in ("count 1", "count 2"))
    assert results(lane, ask("count 1"))[0].value == one
    results(lane, ask("count 3"))
    assert results(lane, ask("count 1"))[0].value == one
    assert results(lane, ask("count 2"))[0].value not in (one, two)
    lane.close(5.0)


# --- the end --------------------------------------------------------------------------------------


def test_a_server_answers_what_it_has_taken_before_it_stops():
    judge = Stub(pause_s=0.3)
    with served({"stub": judge}) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server, body(1, 2))
        waiting_until(lambda: judge.calls)
        server.stop()
        assert [s["value"] for s in answer.result().json()["scores"]] == [1.0, 2.0]
        with pytest.raises(httpx.ConnectError):
            post(server, body(3))


def test_closing_waits_a_bounded_time_and_refuses_the_rest():
    judge = Stub()
    lane = Lane(judge, LaneConfig(max_batch=1))
    futures = lane.submit(ask("slow", 1))
    waiting_until(lambda: judge.calls)
    began = time.monotonic()
    lane.close(0.1)
    assert time.monotonic() - began < 1
    for future in futures:
        with pytest.raises(JudgeBusy, match="stopping"):
            future.result(timeout=1)
    with pytest.raises(JudgeBusy, match="stopping"):
        lane.submit(ask(2))
    judge.release.set()
    lane._thread.join(5)
    assert not lane._thread.is_alive()


def test_closing_answers_what_waits():
    lane = Lane(Stub(), LaneConfig(max_wait_ms=5000.0))
    futures = lane.submit(ask(1, 2))
    lane.close(5.0)
    assert [future.result(timeout=0).value for future in futures] == [1.0, 2.0]
    assert not lane._thread.is_alive()


def test_a_sample_survives_the_wire():
    item = encode_sample(scenes(4)[3])
    assert json.loads(item.model_dump_json())["columns"]["words"] == ["é", None, {"deep": True}]
