"""What students and teachers begin with: a base, a LoRA run, a full run, in every combination."""

import shutil

import pytest
import torch

from rlhf import weights
from rlhf.distill.bundles import Bundles, field_of
from rlhf.distill.student import start_from, write_model
from rlhf.distill.teachers import TeacherConfig, open_teachers
from rlhf.errors import CheckpointError, ConfigError
from rlhf.policies.open import Opening, open_policy
from rlhf.types import Prompt
from tests.pipelines.conftest import make_run
from tests.rlhf.tiny import make_policy, shake, stock_pipeline

SIZE = (64, 64)
KINDS = ("lora", "full")


@pytest.fixture(scope="module")
def other_base(tiny_base, tmp_path_factory):
    """A base of the same shapes and other weights."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(tiny_base, folder)
    policy = make_policy(tiny_base, train="full")
    shake(policy, seed=5, size=0.02)
    policy.transformer.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def runs(tiny_base, other_base, tmp_path_factory):
    """Runs of `rlhf align` by name: two of the base, and a LoRA of the other one."""
    root = tmp_path_factory.mktemp("runs")
    made = {kind: make_run(tiny_base, root, kind, train=kind) for kind in KINDS}
    return made | {"stranger": make_run(other_base, root, "stranger")}


@pytest.fixture(scope="module")
def bundle(tiny_base):
    prompts = [Prompt(id="t#0", text="a red circle", category="objects")]
    policy = make_policy(tiny_base)
    return Bundles(prompts, policy, SIZE, per=1, copies=2, noises=1, seed=0, parts=1).at(1)[0]


def said(policy, bundle, slot="train"):
    """A velocity of a slot."""
    return field_of(policy, bundle, slot)(bundle.noises(policy), 0.6)


def close(a, b):
    return torch.allclose(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("run", ["lora", "full", "stranger"])
@pytest.mark.parametrize("train", KINDS)
def test_a_student_begins_with_a_run_and_becomes_a_model(
    tiny_base, runs, bundle, tmp_path, train, run
):
    """A student of all weights or of a LoRA, whatever the run trained, of whatever base."""
    student = make_policy(tiny_base, train)
    base = said(student, bundle)
    moved = start_from(student, str(runs[run].root), "train")
    opened = open_policy(Opening(model=str(runs[run].root))).policy
    begun = said(student, bundle)
    assert close(begun, said(opened, bundle)) and not close(begun, base)
    assert moved == (train == "lora" and run != "lora")
    teachers = open_teachers(student, {"base": TeacherConfig(guidance=1.0)}, apart=moved)
    x = bundle.noises(student)
    assert close(teachers.every["base"].field(bundle)(x, 0.6), base)
    assert (teachers.every["base"].policy is student) == (not moved)
    shake(student, seed=9)
    write_model(student, str(tiny_base), tmp_path / "model", None, "float32")
    made = open_policy(Opening(model=str(tmp_path / "model"))).policy
    assert close(said(made, bundle), said(student, bundle))
    assert not close(said(made, bundle), begun)
    stock = stock_pipeline(tiny_base).transformer.state_dict()
    assert made.transformer.state_dict().keys() == stock.keys()


@pytest.mark.parametrize("start", [None, "full"])
@pytest.mark.parametrize("teacher", ["base", *KINDS])
@pytest.mark.parametrize("train", KINDS)
def test_every_teacher_says_what_its_run_says(tiny_base, runs, bundle, train, teacher, start):
    """A run laid out like the student is a slot of it, any other has weights of its own."""
    student = make_policy(tiny_base, train)
    moved = start is not None and start_from(student, str(runs[start].root), "train")
    model = str(tiny_base if teacher == "base" else runs[teacher].root)
    (found,) = open_teachers(
        student, {"one": TeacherConfig(model=model, guidance=1.0)}, apart=moved
    ).every.values()
    shared = not moved and teacher in ("base", train)
    assert (found.policy is student) == shared
    slots = {"base": "reference"}
    assert found.slot == (slots.get(teacher, "teacher/one") if shared else "train")
    x, before = bundle.noises(student), found.checksum()
    heard = found.field(bundle)(x, 0.6)
    assert close(heard, said(open_policy(Opening(model=model)).policy, bundle))
    shake(student)
    assert torch.equal(found.field(bundle)(x, 0.6), heard) and found.checksum() == before
    if not shared:
        assert "reference" not in found.policy.slots.names  # its base is not kept twice


@pytest.mark.parametrize("train", KINDS)
def test_a_start_leaves_the_reference_where_weights_are_laid_out_alike(tiny_base, runs, train):
    student = make_policy(tiny_base, train)
    reference = weights.checksum(student.slots.tensors("reference"))
    start_from(student, str(runs[train].root), "train")
    assert weights.checksum(student.slots.tensors("reference")) == reference


def test_a_start_of_another_architecture_or_slot_is_refused(tiny_base, tiny_sd3, runs, tmp_path):
    run = make_run(tiny_sd3, tmp_path, "sd3")
    with pytest.raises(CheckpointError, match="name a run of the same base"):
        start_from(make_policy(tiny_base), str(run.root), "train")
    with pytest.raises(ConfigError, match="start_slot: expected one of .*, got 'best'"):
        start_from(make_policy(tiny_base), str(runs["lora"].root), "best")
