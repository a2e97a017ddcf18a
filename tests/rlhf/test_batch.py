"""Groups that taught nothing are replaced by those of further prompts, the same on resume."""

import json
from dataclasses import replace

import pytest
import torch

from pipelines.cli import main
from rewards.types import JudgeCard, Score, Scores
from rlhf import config
from rlhf.advantage import group_advantages
from rlhf.batch import joined, judged, refilled
from rlhf.cluster.local import LocalCluster
from rlhf.loop import align
from rlhf.plan import Config, Plan
from rlhf.prompts import further
from rlhf.rollout import Request
from rlhf.types import GroupRef, Prompt, Version
from tests.rlhf.test_cluster import Watch
from tests.rlhf.test_resume import rows
from tests.rlhf.tiny import arguments, judge_spec, recipe, sampler

CARD = JudgeCard(name="taste", revision="1", preprocessing="none")
VERSION = Version(slot="behaviour", step=0, checksum="0")


def prompts(count, sources=("a", "b")):
    return [
        Prompt(id=f"{sources[i % len(sources)]}#{i}", text=f"{i}", category=sources[i % 2])
        for i in range(count)
    ]


class Fake(LocalCluster):
    """A cluster without pictures: the judge tells the members of some prompts apart."""

    def __init__(self, lively):
        self.lively, self.asked, self.released = lively, [], []

    def rollout(self, request, version):
        refs = request.refs(version)
        self.asked += [ref.id for ref in refs]
        return refs

    def score(self, refs):
        groups = []
        for ref in refs:
            steps = [k / 10 if ref.prompt.id in self.lively else 0.0 for k in range(3)]
            groups.append(tuple(Score(value=v) for v in steps))
        return Scores(judges=(CARD,), table={"taste": tuple(groups)}, seconds={"taste": 1.0})

    def release(self, refs):
        self.released += [ref.id for ref in refs]


def planned(every, refill, **changes):
    made = replace(Config(), group_size=3, refill=refill, judges=("taste",), **changes)
    return Plan.of(made, every, (CARD,))


def first_batch(cluster, plan, chosen):
    request = Request(
        iteration=1, prompts=tuple(chosen), seeds=((1, 2, 3),) * len(chosen), sampler=sampler()
    )
    refs = cluster.rollout(request, VERSION)
    return judged(plan, request, refs, cluster.score(refs))


def test_flat_groups_are_replaced_by_prompts_of_their_own_source_until_they_teach():
    every = prompts(40)
    cluster = Fake({p.id for p in every[10:]})  # the first ten are flat
    plan = planned(every, 3)
    before = first_batch(cluster, plan, [every[0], every[11], every[1], every[13]])
    assert before.advantages.live_PG.any(dim=1).tolist() == [False, True, False, True]
    after = refilled(cluster, plan, before, VERSION)
    assert after.advantages.live_PG.all() and len(after.refs) == 4
    assert [r.prompt.source for r in after.refs] == ["a", "b", "b", "b"]
    assert after.refs[1] == before.refs[1] and after.refs[3] == before.refs[3]
    assert len({r.prompt.id for r in after.sampled}) == len(after.sampled)
    assert len({r.id for r in after.sampled}) == len({r.group for r in after.sampled})
    assert len({s for r in after.sampled[4:] for s in r.seeds}) == 3 * (len(after.sampled) - 4)
    assert set(cluster.released) == {r.id for r in after.sampled} - {r.id for r in after.refs}
    added = len(after.sampled) - 4
    assert after.metrics["refill/groups"] == added and after.metrics["samples"] == 3 * (4 + added)
    assert after.metrics["advantage/live"] == pytest.approx(4 / (4 + added))  # of all sampled
    assert after.metrics["advantage/flat"] == pytest.approx(added / (4 + added))


def test_rounds_are_bounded_and_nothing_is_drawn_where_all_groups_teach():
    every = prompts(40)
    dead, plan = Fake(set()), planned(every, 2)
    after = refilled(dead, plan, first_batch(dead, plan, every[:4]), VERSION)
    assert len(after.sampled) == 12 and len(after.refs) == 4  # two rounds of four
    assert not after.advantages.live_PG.any()
    lively = Fake({p.id for p in every})
    after = refilled(lively, plan, first_batch(lively, plan, every[:4]), VERSION)
    assert len(after.sampled) == 4 and after.metrics["refill/groups"] == 0


def test_prompts_that_have_run_out_end_it():
    every = prompts(6)
    cluster, plan = Fake(set()), planned(every, 9)
    after = refilled(cluster, plan, first_batch(cluster, plan, every[:4]), VERSION)
    assert len(after.sampled) == 6 and len(after.refs) == 4
    assert {r.prompt.id for r in after.sampled} == {p.id for p in every}


def test_what_is_drawn_is_a_function_of_seed_iteration_and_round():
    every = prompts(40)
    draw = lambda *key: [p.id for p in further(every, every[:8], {"a#0"}, *key)]  # noqa: E731
    assert draw(0, 1, 1) == draw(0, 1, 1) and "a#0" not in draw(0, 1, 1)
    assert len({tuple(draw(*key)) for key in ((0, 1, 1), (1, 1, 1), (0, 2, 1), (0, 1, 2))}) == 4
    found = further(every[:4], every[:4], {"a#0", "b#1", "b#3"}, 0)
    assert [None if p is None else p.id for p in found] == ["a#2", None, None, None]


@pytest.mark.parametrize("scheme", ["mo-grpo", "gdpo", "weighted"])
def test_the_trained_groups_have_the_advantages_they_have_without_the_others(scheme):
    every = prompts(40)
    cluster = Fake({p.id for p in every[10:]})
    plan = planned(every, 3, scheme=scheme)
    chosen = [every[0], every[11], every[1]]
    after = refilled(cluster, plan, first_batch(cluster, plan, chosen), VERSION)
    assert len(after.sampled) > 3
    alone, _ = group_advantages(cluster.score(after.refs), plan.weights, ["a"] * 3, scheme=scheme)
    assert torch.equal(after.advantages.value_PG, alone.value_PG)
    assert torch.equal(after.advantages.live_PG, alone.live_PG)


def test_joined_scores_keep_their_order_and_add_their_seconds():
    cluster = Fake({"a#0"})
    refs = [
        GroupRef(id=p.id, iteration=1, group=i, prompt=p, seeds=(1, 2, 3), version=VERSION)
        for i, p in enumerate(prompts(2))
    ]
    both = joined(cluster.score(refs[:1]), cluster.score(refs[1:]))
    assert both.table["taste"] == cluster.score(refs).table["taste"]
    assert both.seconds == {"taste": 2.0}


def test_a_run_that_is_stopped_refills_with_the_same_prompts(tiny_base, tmp_path):
    lines = [{"prompt": f"a red circle {i}", "wanted": i % 3 == 0} for i in range(9)]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, lines)))
    more = (
        *(f"prompts.source={tmp_path / 'some.jsonl'}", "refill=2", "evaluation.every=0"),
        f"judges=[{judge_spec('red_where_wanted')},{judge_spec('constant')}]",
    )
    whole, parts = ((tmp_path / name) for name in ("whole", "parts"))
    for folder in (whole, parts):
        folder.mkdir()
    assert main(arguments(tiny_base, whole, *more)) == 0
    assert main(arguments(tiny_base, parts, *more, "iterations=2")) == 0
    run = parts / "runs" / "tiny"
    (run / "result.json").unlink()
    assert main(["align", "--resume", str(run), "iterations=4"]) == 0
    ran = [rows(folder / "runs" / "tiny") for folder in (whole, parts)]
    known = [[{k: v for k, v in r.items() if "heldout" not in k} for r in one] for one in ran]
    assert known[0] == known[1] and len(known[0]) == 4
    assert sum(row["refill/groups"] for row in known[0]) > 0
    for row in known[0]:
        assert row["samples"] == 4 * (2 + row["refill/groups"])
        assert row["nfe"] == row["samples"] * 3 * 2  # steps, branches
        assert row["reward_calls"] == 2 * row["samples"]


def test_a_learner_is_given_the_refilled_groups_and_the_others_are_forgotten(tiny_base):
    cluster = LocalCluster(recipe(tiny_base, judges=("red_where_wanted",)))
    given, update = [], cluster.update

    def spy(refs, advantages):
        given.append(([ref.prompt.columns["wanted"] for ref in refs], advantages.live_PG))
        assert set(cluster._held) == {ref.id for ref in refs}
        return update(refs, advantages)

    cluster.update = spy
    made = config.load(Config, None, ["group_size=3", "prompts_per_iteration=4"], "align")
    made = replace(made, iterations=2, refill=9, rollout=sampler(), judges=("x",))
    every = [
        Prompt(id=f"t#{i}", text=f"a {i}", category="c", columns={"wanted": i > 3})
        for i in range(8)
    ]
    watch = Watch(cluster)
    align(cluster, Plan.of(made, every, cluster.cards()), watch)
    assert [wanted for wanted, _ in given] == [[True] * 4] * 2
    assert all(live.all() for _, live in given) and not cluster._held
    assert sum(row["refill/groups"] for row in watch.rows) > 0
