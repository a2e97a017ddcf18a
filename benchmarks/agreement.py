"""How much the gradient of one group says about that of the next, for every kind of loss.

    python -m benchmarks.agreement
    python -m benchmarks.agreement --arms nft grpo --groups 96
    python -m benchmarks.agreement --arms edits-instruction edits-consistency edits-both --across

One group is one prompt with its pictures. Its gradient over all weights of the embedded base,
before any update, is a little of what better pictures need and a lot of the noise that happened to
be drawn. What two groups have in common is the first: `agreement/<arm>` is the mean cosine between
the gradients of two groups of different prompts, with a 95% interval from leaving one group out at
a time. At an agreement c, the sum of 1 / c groups is half signal: the fewer groups, the fewer
pictures a run needs. A forward-process loss is averaged over six draws of noise and level, as in an
iteration of `align/hybrid`; a ratio loss, whose noise is that of the rollout, has one gradient.

Agreement is a direction in common, not a gain: what guidance does to every picture counts as well
(`grpo` beside `grpo-recentred`, `nft` beside `nft-unguided`). With `--across`,
`agreement/<arm>/<arm>` is the mean cosine between a group's gradient in one arm and that of another
group in the other: below 0, what the two ask for takes from each other. Writes
benchmarks/results/<name>.json, agreement.json unless --name gives another.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from benchmarks.curves import RESULTS
from rlhf import config
from rlhf.advantage import group_advantages
from rlhf.cluster.base import (
    assemble_scores,
    make_learner,
    make_reward_worker,
    make_rollout_worker,
)
from rlhf.files import atomic_write_text, json_text
from rlhf.plan import Config, Plan
from rlhf.prompts import load_prompts
from rlhf.run import machine, report

UNGUIDED = ("align/grpo", "rollout.guidance=1.0")
SHARED = (*UNGUIDED, "rollout.shared_noise=true")
EDITS = ("align/hybrid", "prompts.source=scenes/edits@train")
ARMS: Mapping[str, tuple[str, ...]] = {
    "nft": ("align/hybrid",),
    "nft-unguided": ("align/unguided",),
    "awm": ("align/awm",),
    "grpo": ("align/grpo",),
    "grpo-guidance-3": ("align/grpo", "rollout.guidance=3.0"),
    "grpo-steps-1-2": ("align/grpo", "rollout.window=[1,3]"),
    "grpo-recentred": ("align/grpo", "loss.name=grpo-recentred"),
    "grpo-unguided": UNGUIDED,
    "guard-unguided": ("align/guard", "rollout.guidance=1.0"),
    "unguided-cps": (*UNGUIDED, "rollout.kernel=cps", "rollout.noise_level=0.8"),
    "unguided-shared-noise": SHARED,
    "unguided-shared-step-2": (*SHARED, "rollout.window=[2,3]"),
    "unguided-shared-more-noise": (*SHARED, "rollout.noise_level=1.2"),
    "edits-instruction": (*EDITS, "judges=[oracle/instruction]"),
    "edits-consistency": (*EDITS, "judges=[oracle/consistency]"),
    "edits-both": (*EDITS, "judges=[oracle/instruction,oracle/consistency]"),
}
DRAWS = 6  # of noise and level for each group of a forward-process loss


def gradients(c: Config) -> Float[Tensor, "p d"]:
    """One row for each group of the first iteration: the gradient of its loss, every sample of
    weight 1 / G, over all trained weights.
    """
    recipe, plan = c.recipe(), Plan.of(c, load_prompts(c.prompts))
    worker, judges, learner = (
        make(recipe) for make in (make_rollout_worker, make_reward_worker, make_learner)
    )
    handover = learner.publish("behaviour")
    worker.bind(handover)
    request = plan.request(1)
    refs = request.refs(handover.version)
    groups = [worker.rollout(ref, request) for ref in track(refs, "rollouts", transient=True)]
    scores = assemble_scores(judges.cards(), [judges.score(group) for group in groups])
    categories = [ref.prompt.category for ref in refs]
    known = plan.weights, categories, plan.required, plan.advantage_clip
    advantages, _ = group_advantages(scores, *known, plan.scheme, plan.watch)
    parameters = list(learner.learner.parameters.values())
    rows = []
    for i, group in enumerate(track(groups, "gradients", transient=True)):
        weight = advantages.live_PG[i].float() / c.group_size
        total = torch.zeros(sum(p.numel() for p in parameters))
        for update in range(DRAWS if c.loss.loss.form is None else 1):
            loss = learner.terms(group, advantages.value_PG[i], weight, update).loss
            total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        rows.append(total)
    return torch.stack(rows)


def agreement(
    rows: Float[Tensor, "p d"], others: Float[Tensor, "p d"] | None = None
) -> dict[str, float | int]:
    """Mean cosine of two rows, and mean +- 1.96 standard errors by the jackknife over rows.

    With `others`, that of one of `rows` and one of `others` which is not of the same group.

    A pair shares a row with many others, so pairs are not independent observations: rows are. Where
    nothing is in common the interval is too wide, by up to a factor of sqrt(2).
    Rows of zeros (a group without a live sample) are left out. Raises ValueError for fewer than 3.
    """
    others = rows if others is None else others
    live = (rows.norm(dim=1) > 0) & (others.norm(dim=1) > 0)
    units, beside = (part[live] / part[live].norm(dim=1, keepdim=True) for part in (rows, others))
    n = len(units)
    if n < 3:
        raise ValueError(f"expected at least 3 groups with a gradient, got {n}: raise --groups")
    cosines = (units @ beside.T).double()
    cosines = (cosines + cosines.T) / 2
    cosines.fill_diagonal_(0)
    total, own = cosines.sum(), cosines.sum(dim=1)
    mean = total / (n * (n - 1))
    without = (total - 2 * own) / ((n - 1) * (n - 2))
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    spread = 1.96 * float(error)
    return {"value": float(mean), "low": float(mean) - spread, "high": float(mean) + spread, "n": n}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value, as for rlhf align")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument("--groups", type=int, default=48)
    parser.add_argument("--across", action="store_true", help="arms with each other as well")
    parser.add_argument("--name", default="agreement")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked, began = parser.parse_args(argv), time.monotonic()
    torch.set_num_threads(1)
    metrics = {}
    kept: dict[str, Tensor] = {}

    def found(name: str, *rows: Tensor) -> None:
        it = metrics[f"agreement/{name}"] = agreement(*rows)
        print(f"{name:36s} {it['value']:+.4f} [{it['low']:+.4f}, {it['high']:+.4f}]")

    for arm in asked.arms:
        base, *own = ARMS[arm]
        shape = ["cluster.kind=local", f"prompts_per_iteration={asked.groups}"]
        c = config.load(Config, base, [*shape, *own, *asked.overrides], "align")
        rows = gradients(c)
        found(arm, rows)
        for other, its in kept.items():
            found(f"{other}/{arm}", its, rows)
        if asked.across:
            kept[arm] = rows
    result = report(
        "benchmarks.agreement",
        time.monotonic() - began,
        metrics,
        groups=asked.groups,
        arms={arm: list(ARMS[arm]) for arm in asked.arms},
        machine=machine(),
    )
    atomic_write_text(asked.out / f"{asked.name}.json", json_text(result))


if __name__ == "__main__":
    main()
