"""A served judge is the judge; a server that is gone, late or another one gives no numbers."""

import math
import pickle
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import numpy as np
import pytest

from rewards.client import RemoteJudge
from rewards.errors import JudgeError, RewardConfigError
from rewards.judge import FunctionJudge, Judge, run_judge
from rewards.lane import LaneConfig
from rewards.scenes.judge import OracleJudge
from rewards.scenes.oracle import AXES
from rewards.types import Score
from tests.rewards.serving import Served, Stub, ask, scenes, served

QUICK = {"retries": 2, "timeout_s": 5.0, "patience_s": 5.0}


def brightness(images, prompts, sources, weight=None):
    return [float(image.mean()) * w for image, w in zip(images, weight, strict=True)]


@pytest.fixture(scope="module")
def oracle():
    judges = {axis: OracleJudge(axis) for axis in AXES}
    with served(judges | {"bright": FunctionJudge(brightness, "bright")}) as server:
        yield server


@pytest.mark.parametrize("name", [*AXES, "bright"])
def test_scores_and_card_are_the_same_here_and_there(oracle, name):
    here, there = oracle.judges[name], RemoteJudge(f"{oracle.url}/{name}", batch=5)
    assert isinstance(there, Judge) and there.card == here.card
    samples = scenes(16)
    assert run_judge(there, samples) == run_judge(here, samples)  # to the bit
    assert any(score.state == "ok" for score in there.score(samples))
    assert there.score([]) == [] and not there.troubles


def test_a_remote_judge_travels_between_processes(oracle):
    judge = RemoteJudge(f"{oracle.url}/fidelity")
    first = judge.score(scenes(2))
    assert pickle.loads(pickle.dumps(judge)).score(scenes(2)) == first


def test_what_is_not_finite_in_the_parts_arrives_as_it_is():
    class Odd(Stub):
        def _one(self, prompt):
            return Score(value=-0.0, parts={"a": math.nan, "b": -math.inf, "c": np.float32(0.1)})

    with served({"stub": Odd()}) as server:
        (score,) = RemoteJudge(f"{server.url}/stub").score(ask(1))
    assert math.isnan(score.parts["a"]) and score.parts["b"] == -math.inf
    assert score.parts["c"] == np.float32(0.1) and str(score.value) == "-0.0"


@pytest.mark.parametrize(
    "value", [(1, 2), {1}, np.float32(1), np.float64(1), math.nan, {"a": {2: 3}}, [b"x"], "\ud800"]
)
def test_what_json_cannot_carry_is_not_sent_and_the_others_are(value):
    with served() as server:
        judge = RemoteJudge(f"{server.url}/stub")
        scores = judge.score([*ask(1), *ask(2, columns={"x": value}), *ask(3)])
    assert [score.value for score in scores] == [1.0, None, 3.0]
    assert scores[1].state == "failed" and "not sent: " in scores[1].reason


def test_a_picture_of_another_kind_is_not_sent():
    with served() as server:
        judge = RemoteJudge(f"{server.url}/stub")
        wrong = ask(2)[0]
        object.__setattr__(wrong, "image", np.zeros((3, 8, 8), np.float32))
        scores = judge.score([*ask(1), wrong])
    assert [score.state for score in scores] == ["ok", "failed"] and "uint8" in scores[1].reason


def test_a_request_that_is_too_large_is_split():
    with served(max_samples=3) as server:
        judge = RemoteJudge(f"{server.url}/stub", batch=64)
        assert [score.value for score in judge.score(ask(*range(20)))] == list(range(20))


def test_the_token_comes_from_the_argument_or_the_environment(monkeypatch):
    with served(token="secret") as server:
        with pytest.raises(JudgeError, match="refused with 401"):
            RemoteJudge(f"{server.url}/stub")
        assert RemoteJudge(f"{server.url}/stub", token="secret").score(ask(1))[0].value == 1.0
        monkeypatch.setenv("RLHF_REWARD_TOKEN", "secret")
        judge = RemoteJudge(f"{server.url}/stub")
        assert judge.score(ask(1))[0].value == 1.0 and "secret" not in repr(judge)


def test_a_refusal_fails_only_the_sample_at_fault():
    with served(max_side=16) as server:
        judge = RemoteJudge(f"{server.url}/stub")
        with pytest.raises(JudgeError, match=r"422: samples\[1\].image: expected sides"):
            judge.score([*ask(1), *ask(2, size=17)])
        scores = run_judge(judge, [*ask(1), *ask(2, size=17), *ask(3)])
    assert [score.value for score in scores] == [1.0, None, 3.0]


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000/x", "ftp://h/x", "http://h", "http://h/", "http://h:p/x", "http://u:p@h/x"],
)
def test_an_address_has_one_form(url):
    with pytest.raises(RewardConfigError, match="expected a judge's address"):
        RemoteJudge(url)


def test_a_name_the_server_does_not_have():
    with served() as server:
        with pytest.raises(RewardConfigError, match=f"write {server.url}/stub"):
            RemoteJudge(f"{server.url}/other")


# --- servers that are busy, late, gone or others --------------------------------------------------


def test_a_dead_server_is_an_error_within_bounds():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/stub"
    began = time.monotonic()
    with pytest.raises(JudgeError, match="ConnectError.*start the server"):
        RemoteJudge(url, **QUICK)
    assert time.monotonic() - began < 2


def test_a_server_that_dies_fails_the_rest_within_bounds():
    server = Served({"stub": Stub()})
    judge = RemoteJudge(f"{server.url}/stub", batch=2, **QUICK)
    assert judge.score(ask(1))[0].value == 1.0
    server.stop()
    began = time.monotonic()
    scores = run_judge(judge, ask(*range(20)))
    assert time.monotonic() - began < 2  # not once per sample
    assert {(score.value, score.state) for score in scores} == {(None, "failed")}
    assert "expected an answer" in scores[0].reason


def test_a_server_that_is_silent_or_trickles_is_given_up_in_time():
    for trickle in (False, True):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            done, peers = threading.Event(), []

            def talk(listener=listener, trickle=trickle, done=done, peers=peers):
                while not done.is_set():
                    peer, _ = listener.accept()
                    peers.append(peer)
                    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" * trickle)
                    while trickle and not done.wait(0.05):
                        try:
                            peer.sendall(b" ")
                        except OSError:
                            break

            threading.Thread(target=talk, daemon=True).start()
            began = time.monotonic()
            with pytest.raises(JudgeError, match="ReadTimeout"):
                RemoteJudge(f"http://127.0.0.1:{port}/stub", patience_s=1.0, timeout_s=0.3)
            assert time.monotonic() - began < 1.5
            done.set()
            for peer in peers:
                peer.close()


class Page(BaseHTTPRequestHandler):
    """Something else on the port."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"scores": [{"value": 0.5, "state": "ok"}]}')

    do_POST = do_GET

    def log_message(self, *_):
        pass


def test_something_else_on_the_port_gives_no_scores():
    with served() as server, HTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        judge = RemoteJudge(f"{server.url}/stub", **QUICK)
        judge._base = f"http://127.0.0.1:{page.server_port}"
        with pytest.raises(JudgeError, match="expected scores, got judge: Field required"):
            judge.score(ask(1))
        with pytest.raises(JudgeError, match="is this the address of `rlhf reward serve`"):
            RemoteJudge(f"{judge._base}/stub", **QUICK)
        page.shutdown()


def test_a_busy_server_is_asked_until_it_has_room():
    judge = Stub(pause_s=0.05)
    lane = LaneConfig(queue=2, max_batch=1)
    with served({"stub": judge}, lane=lane, max_samples=2) as server:
        clients = [RemoteJudge(f"{server.url}/stub", batch=2, retries=0) for _ in range(3)]
        asks = [ask(10 * i, 10 * i + 1) for i in range(3)]
        with ThreadPoolExecutor(3) as pool:
            scores = list(pool.map(RemoteJudge.score, clients, asks))
    assert [[s.value for s in two] for two in scores] == [[10 * i, 10 * i + 1] for i in range(3)]
    assert sum((client.troubles for client in clients), Counter())["503"] > 0


def test_a_lost_answer_is_asked_again_and_is_the_same():
    judge = Stub()
    with served({"stub": judge}) as server:
        client = RemoteJudge(f"{server.url}/stub", timeout_s=0.3)
        timer = threading.Timer(0.7, judge.release.set)
        timer.start()
        assert client.score(ask("slow"))[0].value == 1.0
        assert client.troubles["ReadTimeout"] >= 1 and server.lane().counts["ok"] == 1


def test_a_restart_in_the_middle_loses_nothing():
    server = Served({"stub": Stub(pause_s=0.01)})
    judge, out = RemoteJudge(f"{server.url}/stub", batch=2), []
    samples = ask(*range(100))
    asking = threading.Thread(target=lambda: out.extend(judge.score(samples)))
    asking.start()
    time.sleep(0.1)
    server.stop(at_once=True)
    server.start()
    asking.join(20)
    server.stop()
    assert [score.value for score in out] == list(range(100))
    assert judge.troubles.total() > 0


@pytest.mark.parametrize(
    "other",
    [
        Stub(revision="2"),
        Stub(name="else"),
        FunctionJudge(brightness, "stub"),
    ],
    ids=["revision", "name", "all"],
)
def test_another_judge_after_a_restart_gives_no_scores(other):
    server = Served({"stub": Stub()})
    judge = RemoteJudge(f"{server.url}/stub", **QUICK)
    judge.score(ask(1))
    server.stop()
    server.judges = {"stub": other}
    server.start()
    with pytest.raises(JudgeError, match="expected the judge this run began with"):
        judge.score(ask(1, 2))
    assert {s.state for s in run_judge(judge, ask(1, 2))} == {"failed"}
    server.stop()


def test_a_changed_scale_is_another_judge_too():
    server = Served({"stub": Stub()})
    judge = RemoteJudge(f"{server.url}/stub", **QUICK)
    server.stop()
    server.judges["stub"].card = replace(judge.card, high=2.0)
    server.start()
    with pytest.raises(JudgeError, match="high was 1000000000.0 and is 2.0"):
        judge.score(ask(1))
    server.stop()


@pytest.mark.slow
def test_sixty_four_clients_get_every_score():
    judge, lane = Stub(pause_s=0.002), LaneConfig(queue=64)
    with served({"stub": judge}, lane=lane) as server:
        end, lost = time.monotonic() + 20, []

        def client(i):
            remote, number = RemoteJudge(f"{server.url}/stub", batch=8), 0
            while time.monotonic() < end:
                values = [i * 10**6 + number + k for k in range(1 + number % 8)]
                scores = remote.score(ask(*values, size=(8, 16, 24)[number % 3]))
                lost.extend(s for s, v in zip(scores, values, strict=True) if s.value != v)
                number += len(values)
            return number

        with ThreadPoolExecutor(64) as pool:
            asked = list(pool.map(client, range(64)))
        assert not lost and min(asked) > 0
        assert server.lane().counts["ok"] == sum(asked)
        assert httpx.get(f"{server.url}/readyz").status_code == 200
