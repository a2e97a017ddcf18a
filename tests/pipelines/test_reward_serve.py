"""`rlhf reward serve` as a process: docs/serving.md shows what works, a signal ends it with 0."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from pipelines import cli
from pipelines.reward_serve import ServeConfig
from rewards.client import RemoteJudge
from rewards.images import save_png
from rewards.scenes.judge import OracleJudge
from rlhf import config as configs
from tests.rewards.serving import scenes

ROOT = Path(__file__).parents[2]
SHOWN = re.findall(r"```sh\n# (\w+)\n(.*?)```", (ROOT / "docs/serving.md").read_text(), flags=re.S)


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(command, port, **environment):
    """The command on this port, as soon as it is ready."""
    command = command.replace("8000", str(port))
    command = command.replace("rlhf ", f"{sys.executable} -m pipelines.cli ", 1)
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command.strip()} --json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200:
                return process
        except httpx.HTTPError:
            time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_what_the_page_shows_works_and_a_signal_ends_it(port, tmp_path, sent):
    (_, command), (_, asked) = SHOWN
    samples = scenes(3)
    save_png(tmp_path / "picture.png", samples[0].image)
    process = start(command, port)
    try:
        done = subprocess.run(
            ["bash", "-ec", asked.replace("8000", str(port))],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        ready, cards, answer = re.findall(r"\{.*?\}(?=\{\"|$)", done.stdout.strip())
        assert json.loads(ready)["ready"] and "oracle/fidelity" in cards
        assert json.loads(answer)["scores"][0]["state"] == "na"  # it came without a target
        judge = RemoteJudge(f"http://127.0.0.1:{port}/fidelity")
        assert judge.score(samples) == OracleJudge("fidelity").score(samples)
    finally:
        process.send_signal(sent)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in err
    assert f"http://127.0.0.1:{port}/fidelity  oracle/fidelity revision 1" in err
    metrics = json.loads(out)["metrics"]
    assert metrics["serve/fidelity/ok"]["value"] == 3 and metrics["serve/fidelity/na"]["value"] == 1


def test_a_taken_port_and_a_missing_token_are_said(port, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", port)), pytest.raises(SystemExit) as ended:
        cli.main(["reward", "serve", f"port={port}"])
    assert ended.value.code == 1 and "in use" in capsys.readouterr().err
    monkeypatch.delenv("RLHF_REWARD_TOKEN", raising=False)
    for extra in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["reward", "serve", "host=0.0.0.0", *extra])
        assert ended.value.code == 2 and "expected a token" in capsys.readouterr().err


def test_the_plan_says_where_and_for_whom(capsys, monkeypatch):
    monkeypatch.setenv("RLHF_REWARD_TOKEN", "very-secret")
    cli.main(["reward", "serve", "host=0.0.0.0", "judges={a: oracle/text}", "--dry-run"])
    out = capsys.readouterr().out
    assert "http://0.0.0.0:8000/a  oracle/text" in out and "with a token" in out
    assert "very-secret" not in out


@pytest.mark.parametrize("wrong", ["threads=0", "port=70000", "lane.queue=0", "max_samples=999"])
def test_impossible_settings_are_refused_before_anything_loads(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["reward", "serve", wrong, "--dry-run"])
    assert ended.value.code == 2 and wrong.split("=")[0].split(".")[-1] in capsys.readouterr().err


def test_the_shipped_configuration_is_within_its_limits():
    assert configs.load(ServeConfig, "reward/serve", [], "reward").server().token is None
    assert np.isfinite(configs.load(ServeConfig, None, [], "reward").lane.timeout_s)
