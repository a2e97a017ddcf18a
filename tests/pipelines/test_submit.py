"""`rlhf submit` against a Ray head with token authentication, started here."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipelines.submit import Config
from rlhf.errors import ClusterError, ConfigError
from tests.rlhf.tiny import arguments

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-the-tests-and-no-other-use"


def environment(token: str, **more: str) -> dict[str, str]:
    mine = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": token}
    others = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    return {**others, **mine, **more}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def submit(address: str, command: str, token: str = TOKEN) -> subprocess.CompletedProcess:
    words = ["submit", command, f"address={address}", "--json"]
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *words],
        env=environment(token),
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def head():
    """The address of the dashboard of a Ray head with few resources."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets' paths are to be short
    gcs, dashboard, agent, client = free_ports(4)
    ports = {"port": gcs, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent}
    ports["ray-client-server-port"] = client
    limits = ["--num-cpus=3", f"--object-store-memory={80_000_000}", f"--temp-dir={folder}"]
    words = [f"--{name}={port}" for name, port in ports.items()] + limits
    code = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "start", "--head", "--block", *words],
        env=environment(TOKEN, RAY_AUTH_MODE="token"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", dashboard), 1).close()
                break
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.2)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_submitted_with_the_token_ends_as_one_started_here(tiny_base, tmp_path, head):
    settings = ("cluster.kind=ray", "cluster.rollout_workers=1", "iterations=1")
    command = arguments(tiny_base, tmp_path, *settings)
    done = submit(head, shlex.join(command))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "SUCCEEDED" and result["job"] in done.stderr
    assert "1/1  reward" in done.stderr  # what the job printed
    assert (tmp_path / "runs" / "tiny" / "result.json").is_file()
    again = submit(head, shlex.join(command))
    assert again.returncode == 1 and "ended as FAILED" in again.stderr
    assert "exists: write another name" in " ".join(again.stderr.split())


@pytest.mark.ray
@pytest.mark.slow
def test_a_wrong_token_and_a_wrong_address_are_errors_with_advice(head):
    wrong = submit(head, "assets", token="another")
    assert wrong.returncode == 1 and "RAY_AUTH_TOKEN" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    nobody = submit(f"http://127.0.0.1:{free_ports(1)[0]}", "assets")
    assert nobody.returncode == 1 and "address=http://head:8265" in " ".join(nobody.stderr.split())


def test_a_cluster_that_never_answers_is_given_up_in_time():
    from rlhf.cluster.jobs import Jobs

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(ClusterError, match="no answer within 1 s.*RAY_AUTH_TOKEN"):
            Jobs(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=1.0)
        assert time.monotonic() - began < 15  # ray is imported, too


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"command": ""}, "the words after `rlhf`"),
        ({"command": "rlhf align"}, "the words after `rlhf`"),
        ({"command": "align 'name"}, "No closing quotation"),
        ({"command": "align", "address": "head:8265"}, "write http://head:8265"),
        ({"command": "align", "request_seconds": 0.0}, "60 is usual"),
    ],
)
def test_what_cannot_be_submitted_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Config(**settings).check()
    assert Config(command="align 'name=a b'").words[-2:] == ["align", "name=a b"]
