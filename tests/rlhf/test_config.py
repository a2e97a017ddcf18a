from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from rlhf import config
from rlhf.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Learner:
    lr: float = 1e-3
    steps: int = 4
    amp: bool = False
    kind: Literal["on", "off"] = "on"
    note: str | None = None

    def check(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"expected lr > 0, got {self.lr}")


@dataclass(frozen=True, slots=True)
class Judge:
    weight: float = 1.0
    name: str = "oracle"


@dataclass(frozen=True, slots=True)
class Config:
    path: str = "scenes"
    learner: Learner = field(default_factory=lambda: Learner(lr=5.0))
    window: tuple[int, int] = (0, 3)
    tags: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=lambda: {"a": 1.0})
    table: dict[str, dict[str, float]] = field(default_factory=lambda: {"*": {"a": 1.0}})
    judges: dict[str, Judge] = field(default_factory=dict)
    teacher: Learner | None = None
    seed: int | Literal["random"] = 0

    def check(self) -> None:
        if self.window[0] > self.window[1]:
            raise ConfigError(f"expected window to be ordered, got {self.window}")


@dataclass(frozen=True)
class Needy:
    prompts: str
    n: int = 1


def write(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text)
    return path


def test_defaults_file_and_overrides_stack(tmp_path):
    path = write(tmp_path, "learner: {steps: 7, lr: 1e-4}\njudges: {x: {weight: 2}}\n")
    got = config.load(Config, path, ["learner.amp=true", "judges.x.name=q", "judges.y.weight=3"])
    assert got.learner == Learner(lr=1e-4, steps=7, amp=True)
    assert got.judges == {"x": Judge(2.0, "q"), "y": Judge(3.0)}
    assert isinstance(got.judges["x"].weight, float)
    assert got.window == (0, 3) and got.teacher is None


def test_a_sparse_file_keeps_the_defaults_of_the_instance_it_refines(tmp_path):
    assert config.load(Config, write(tmp_path, "learner: {steps: 7}")).learner.lr == 5.0


def test_file_mapping_replaces_and_override_merges(tmp_path):
    assert config.load(Config, write(tmp_path, "weights: {b: 2}")).weights == {"b": 2.0}
    assert config.load(Config, None, ["weights.b=2"]).weights == {"a": 1.0, "b": 2.0}
    assert config.load(Config, None, ["table.*.b=2"]).table == {"*": {"a": 1.0, "b": 2.0}}


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("path=007", "path", "007"),
        ("path=1e-4", "path", "1e-4"),
        ("path=null", "path", "null"),
        ("path='a b'", "path", "a b"),
        ("window=[1,2]", "window", (1, 2)),
        ("tags=[a, b]", "tags", ("a", "b")),
        ("seed=random", "seed", "random"),
        ("seed=3", "seed", 3),
        ("teacher.steps=9", "teacher", Learner(steps=9)),
        ("weights={z: 1}", "weights", {"z": 1.0}),
    ],
)
def test_override_values(override, key, value):
    got = getattr(config.load(Config, None, [override]), key)
    assert got == value and type(got) is type(value)


def test_yaml_reads_numbers_and_words_as_people_write_them(tmp_path):
    text = "path: no\nlearner: {lr: 1e-4, kind: off}\ntags: [2026-01-01, '1e-4']\n"
    got = config.load(Config, write(tmp_path, text))
    assert got.path == "no" and got.learner.lr == 1e-4 and got.learner.kind == "off"
    assert got.tags == ("2026-01-01", "1e-4")
    assert config.load(Config, write(tmp_path, "learner: {lr: '1e-4'}")).learner.lr == 1e-4


@pytest.mark.parametrize(
    "override, message",
    [
        ("lerner.lr=1", "no key 'lerner': did you mean 'learner'"),
        ("learner.stesp=1", "no key 'learner.stesp': did you mean 'learner.steps'"),
        ("lr=1", "no key 'lr': did you mean 'learner.lr'"),
        ("judges.x.wieght=1", "no key 'judges.x.wieght': did you mean 'judges.x.weight'"),
        ("learner.steps=true", "'learner.steps' expects int, got True.*write learner.steps=4"),
        ("learner.steps=1.0", "'learner.steps' expects int, got 1.0"),
        ("learner.steps='3'", "'learner.steps' expects int, got '3'"),
        ("learner.amp=1", "'learner.amp' expects bool, got 1"),
        ("learner.lr=true", "'learner.lr' expects float, got True"),
        ("learner.lr=fast", "'learner.lr' expects float, got 'fast'"),
        ("learner.kind=onn", "'learner.kind' expects one of 'on', 'off', got 'onn'.*mean 'on'"),
        ("window=[1]", "'window' expects .int, int., got .1.*write window=.4,4."),
        ("window=[1,x]", "'window' expects"),
        ("weights.a=x", "'weights.a' expects float"),
        ("seed=often", "'seed' expects int or one of 'random', got 'often'"),
        ("learner=3", "'learner' expects a mapping with lr, steps"),
        ("path.x=3", "'path' is a plain value"),
        ("learner.lr=-1", "'learner': expected lr > 0, got -1.0"),
        ("teacher.lr=-1", "'teacher': expected lr > 0"),
        ("window=[3,1]", "expected window to be ordered"),
        ("learner.lr", "form key.sub=value, got 'learner.lr'"),
        ("=3", "form key.sub=value"),
        ("path=[", "not valid YAML"),
    ],
)
def test_refusals_name_the_key_and_say_what_to_write(override, message):
    with pytest.raises(ConfigError, match=message):
        config.load(Config, None, [override])


@pytest.mark.parametrize(
    "text, message",
    [
        ("path: a\npath: b\n", "'path' appears twice"),
        ("- a\n", "expected a mapping"),
        ("path: [", "not valid YAML"),
        ("learner: {lr: yes}", "expects float, got 'yes'"),
        ("path: 3", "'path' expects str, got 3.*some.yaml"),
    ],
)
def test_bad_files_are_refused_with_their_name(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        config.load(Config, write(tmp_path, text))


def test_missing_required_field_can_come_from_file_or_override(tmp_path):
    with pytest.raises(ConfigError, match="'prompts' has no default.*write prompts=text"):
        config.load(Needy, None)
    assert config.load(Needy, write(tmp_path, "n: 2"), ["prompts=a"]) == Needy("a", 2)


def test_resolved_form_reads_back_equal(tmp_path):
    overrides = ["path=1e-4", "tags=['on','2026-01-01','5']", "teacher.note=x", "learner.lr=3e-7"]
    first = config.load(Config, None, [*overrides, "judges.a.weight=.5", "seed=random"])
    config.save_yaml(first, tmp_path / "c.yaml")
    assert config.load(Config, tmp_path / "c.yaml") == first
    assert config.build(Config, config.to_dict(first)) == first


def test_unknown_names_and_paths_are_refused():
    with pytest.raises(ConfigError, match="no configuration is called 'nowhere'"):
        config.load(Config, "nowhere", program="align")
    with pytest.raises(ConfigError, match="does not exist"):
        config.load(Config, "nowhere.yaml", program="align")


def test_keys_are_dotted():
    assert {"path", "learner.lr", "teacher.steps", "judges"} <= set(config.keys(Config))
