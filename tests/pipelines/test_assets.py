"""`rlhf assets` lists what lies in the asset folders, and works where nothing does."""

import hashlib
import json
import re
from pathlib import Path

import rlhf
from pipelines import assets, cli


def test_nothing_shipped_is_no_error(tmp_path):
    assert assets.entries((tmp_path / "none", tmp_path)) == {}
    assert "no models" in assets.summarise({})


def test_folders_and_files_are_listed_with_their_cards(tmp_path):
    model = tmp_path / "scenes"
    (model / "transformer").mkdir(parents=True)
    (model / "transformer" / "w.safetensors").write_bytes(b"x" * 2**20)
    (model / "README.md").write_text("---\nresolution: 64\ncommand: rlhf pretrain\n---\n# scenes\n")
    (tmp_path / "judge.safetensors").write_bytes(b"abc")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no weights")
    found = assets.entries((tmp_path,))
    assert list(found) == ["judge", "scenes"]
    assert found["scenes"]["resolution"] == 64 and 1.0 <= found["scenes"]["megabytes"] < 1.01
    assert found["judge"]["sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert found["judge"]["resolution"] is None
    assert set(found["scenes"]) == {"path", "resolution", "megabytes", "sha256"}
    text = assets.summarise(found)
    assert "64 px" in text and "command: rlhf pretrain" in text
    before = found["scenes"]["sha256"]
    (model / "transformer" / "w.safetensors").write_bytes(b"y" * 2**20)
    assert assets.entries((tmp_path,))["scenes"]["sha256"] != before


def test_the_command_prints_the_table(capsys):
    assert cli.main(["assets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == assets.entries()


def test_what_ships_names_no_folder_of_the_machine_that_made_it():
    root = Path(rlhf.__file__).parent / "assets"
    texts = {p: p.read_text(encoding="utf-8") for p in root.rglob("*.json")}
    assert texts and [str(p) for p, text in texts.items() if re.search(r'": "/\w', text)] == []
