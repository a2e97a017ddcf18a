import importlib
import subprocess
import sys

import pytest

from rewards import compat


def test_libraries_that_import_torchvision_work_after_ours():
    """A fresh process, since here the import has happened."""
    code = "import rewards, torchvision.transforms.v2; print(rewards.compat.ensure_torchvision())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("unneeded", "works", "mended")


def test_equal_builds_import_nothing(monkeypatch):
    monkeypatch.setattr(compat, "_build", lambda name: "cpu")
    monkeypatch.setattr(importlib, "import_module", _refuse)
    assert compat.ensure_torchvision() == "unneeded"


def test_an_absent_torchvision_is_fine(monkeypatch):
    monkeypatch.setattr(compat, "_build", {"torch": "cpu", "torchvision": None}.get)
    assert compat.ensure_torchvision() == "absent"


def test_other_errors_are_not_swallowed(monkeypatch):
    monkeypatch.setattr(compat, "_build", {"torch": "cpu", "torchvision": ""}.get)
    monkeypatch.setattr(compat, "_kept", [])
    monkeypatch.setattr(importlib, "import_module", _refuse)
    with pytest.raises(RuntimeError, match="another reason"):
        compat.ensure_torchvision()


def _refuse(name):
    raise RuntimeError("another reason")
