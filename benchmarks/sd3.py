"""One iteration on a tiny Stable Diffusion 3, in forwards.

    python -m benchmarks.sd3 --out benchmarks/results/sd3.json

5 layers of width 128, 77 text and 64 picture tokens, a group of 8, 10 flow-SDE steps at guidance
4.5, LoRA of rank 32 on attention, float32, one thread, one update of the ratio loss without KL. An
iteration is the hand-over of weights, the guided rollout and the unguided update; decoding is left
out. The unit is one conditional forward of the whole group through the transformer with its
adapters, nothing around it, timed between the iterations of the same run. `plain` is the same
forward without adapters. `needed` is what the rollout's forwards and the update's forward and
backward take bare (`rlhf.bare`); `other` is everything else, of which the learner's diagnostics are
three forwards of half a group.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf import noise
from rlhf.alignment import AlignmentConfig, AlignmentLearner, LossConfig
from rlhf.bare import Bare, captured, work_of
from rlhf.files import atomic_write_text, json_text
from rlhf.learner import LearnerConfig
from rlhf.models.tiny_sd3 import random_sd3_pipeline
from rlhf.policies.config import Lora, PolicyConfig
from rlhf.policies.families import load_policy
from rlhf.policies.pipeline import PipelinePolicy
from rlhf.rollout import Request, RolloutWorker, seeds_of
from rlhf.run import machine, report
from rlhf.sampling import Sampler
from rlhf.types import Advantages, Prompt

GROUP, SIZE, FORWARDS = 8, 128, 4  # samples, px, forwards timed for the unit in each round
BARS = {(0, 9): 46.0, (0, 3): 31.0}  # window of trained steps -> units an iteration may take
PROMPT = Prompt(id="sd3#0", text="a red circle left of a blue square", category="general")


def make_base(folder: Path) -> Path:
    """The tiny checkpoint."""
    random_sd3_pipeline(layers=5, heads=2, head_dim=64, t5=False).save_pretrained(folder)
    return folder


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@dataclass
class Study:
    """A learner, a worker with a policy of its own, and what was timed, in seconds by name."""

    base: Path
    window: tuple[int, int]
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        lora = Lora(rank=32, alpha=64)
        policy = PolicyConfig(model=str(self.base), lora=lora, t5_tokens=0)
        alignment = AlignmentConfig(
            loss=LossConfig(name="grpo", updates_per_rollout=1), learner=LearnerConfig(lr=3e-4)
        )
        self.trained, self.sampling = load_policy(policy), load_policy(policy)
        self.learner = AlignmentLearner(self.trained, alignment)
        self.worker = RolloutWorker(self.sampling)
        self.sampler = Sampler(
            guidance=4.5,
            kernel="flow-sde",
            window=self.window,
            height=SIZE,
            width=SIZE,
            cached_prefix=False,  # there is none
        )
        work = work_of(1, GROUP, self.sampler, alignment)
        self.bare, self.counts = Bare(self.trained, work, self.sampler), work.counts()
        self.decoding = 0.0
        self._time_decoding(self.sampling)

    def _time_decoding(self, policy: Any) -> None:
        inner = policy.decode

        def decode(*args: Any) -> Any:
            out: list[Any] = []
            self.decoding += seconds(lambda: out.append(inner(*args)))
            return out[0]

        policy.decode = decode

    def round(self, number: int) -> None:
        """The unit, the bare work and an iteration, one after the other."""
        self._unit(self.sampling)
        self.times["bare rollout"].append(self.bare.rollout([PROMPT]))
        self.times["bare update"].append(self.bare.train([PROMPT]))
        self._iteration(number)

    @torch.no_grad()
    def _unit(self, policy: PipelinePolicy) -> None:
        shape, size = policy.latent_shape(self.sampler.size), self.sampler.size
        x = torch.stack([noise.initial_noise(i, shape) for i in range(GROUP)])
        with captured(policy.transformer) as calls:
            policy.velocity(x, torch.full((GROUP,), 0.5), policy.encode(PROMPT.text), size=size)
        forward = lambda: policy.transformer(**calls[0])  # noqa: E731
        self.times["unit"].append(statistics.median(seconds(forward) for _ in range(FORWARDS)))
        policy.transformer.disable_adapters()
        self.times["plain"].append(statistics.median(seconds(forward) for _ in range(FORWARDS)))
        policy.transformer.enable_adapters()

    def _iteration(self, number: int) -> None:
        asked = Request(
            iteration=number,
            prompts=(PROMPT,),
            seeds=seeds_of(0, number, 1, GROUP),
            sampler=self.sampler,
            store=self.learner.config.loss.loss.requires,
        )
        value = torch.linspace(-1.5, 1.5, GROUP)[None]
        live = torch.ones((1, GROUP), dtype=torch.bool)
        made: list[Any] = []

        def hand_over() -> None:
            made.append(self.learner.publish("behaviour"))
            self.worker.bind(made[0])

        def rollout() -> None:
            made.append(self.worker.rollout(asked.refs(made[0].version)[0], asked))

        def update() -> None:
            self.learner.update(made[1:], Advantages(value_PG=value, live_PG=live))

        self.decoding = 0.0
        taken = {f.__name__: seconds(f) for f in (hand_over, rollout, update)}
        taken["rollout"] -= self.decoding
        self.times["decoding"].append(self.decoding)
        for name, value_s in taken.items():
            self.times[name.replace("_", "-")].append(value_s)
        self.times["iteration"].append(sum(taken.values()))

    def figures(self) -> dict[str, float]:
        """In units of the same round, the median of the rounds after the first."""
        t = self.times
        t["needed"] = [a + b for a, b in zip(t["bare rollout"], t["bare update"], strict=True)]
        t["other"] = [a - b for a, b in zip(t["iteration"], t["needed"], strict=True)]

        def middle(name: str, unit: str = "unit") -> float:
            ratios = [a / b for a, b in zip(t[name], t[unit], strict=True)]
            return statistics.median(ratios[1:])

        return {name: middle(name) for name in t if name != "unit"} | {
            "iteration in plain forwards": middle("iteration", "plain"),
            "seconds of a unit": statistics.median(t["unit"][1:]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="rounds that count")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {options.repeats}")
    torch.set_num_threads(1)
    began, metrics = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="sd3-") as folder:
        base = make_base(Path(folder))
        for window, bar in BARS.items():
            study = Study(base, window)
            for number in range(options.repeats + 1):
                study.round(number)
            name = f"{window[1] - window[0]} trained steps"
            found = study.figures() | {"bar": bar} | study.counts
            metrics |= {f"{name}/{k}": {"value": v} for k, v in found.items()}
            print(f"{name}: {found['iteration']:.1f} units, bar {bar:.0f}", flush=True)
            for key, value in found.items():
                print(f"    {key:<30} {value:10.3f}")
    result = report(
        "benchmarks.sd3",
        time.monotonic() - began,
        metrics,
        command=f"python -m benchmarks.sd3 --repeats {options.repeats}",
        machine=machine(),
    )
    if options.out:
        atomic_write_text(options.out, json_text(result))


if __name__ == "__main__":
    main()
