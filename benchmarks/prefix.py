"""What sharing the prompt's keys and values within a group wins, and what the CPU's operations do.

    taskset -c 0 python -m benchmarks.prefix --out benchmarks/results/prefix.json
    python -m benchmarks.prefix --only parts        # sharing, parts, attention or compile

The embedded base, one thread, a group of 16, tokens of the condition + of the target; 104 is an
edit: 40 of text and 64 of a source. `whole` computes the condition in every row, `shared` once,
in training with gradient and in one pass with the targets. Each timing is taken in turn with the
one that it is compared with; ratios are medians over the turns. Predicted, from the tokens that go
through the blocks:

    G (P + T) / (P + G T)      G rows, P tokens of the condition, T of the target

float32 trains all weights, bfloat16 adapters. `--out` adds to the figures that the file holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf import noise
from rlhf.files import atomic_write_text, json_text
from rlhf.policies import on_cpu, qwen_image21
from rlhf.policies.base import Condition
from rlhf.policies.config import PolicyConfig
from rlhf.policies.families import load_policy
from rlhf.policies.qwen_image21 import QwenImage21Policy, tokens_of
from rlhf.run import machine

GROUP = 16
CHOICES = {"float32": PolicyConfig(train="full"), "bfloat16": PolicyConfig(dtype="bfloat16")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A prompt of 40 tokens, perhaps a source picture, and the size of what is made of them."""

    size: tuple[int, int]
    source: tuple[int, int] | None = None
    text: int = 40

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens of the condition and of the target."""
        return self.text + (tokens_of(self.source) if self.source else 0), tokens_of(self.size)

    @property
    def predicted(self) -> float:
        condition, target = self.counts
        return GROUP * (condition + target) / (condition + GROUP * target)

    def condition(self, width: int) -> Condition:
        """Random embeddings; a source's slots are in the middle of the text."""
        draw = noise.generator(41)
        if self.source is None:
            embeds = torch.randn(1, self.text, width, generator=draw)
            return Condition(embeds_PLD=embeds, image_slots_L=torch.zeros(self.text).bool())
        tokens = tokens_of(self.source)
        slots = torch.zeros(self.text + tokens // 4).bool()
        slots[self.text // 2 : self.text // 2 + tokens // 4] = True
        return Condition(
            embeds_PLD=torch.randn(1, len(slots), width, generator=draw),
            image_slots_L=slots,
            sources_PMC=torch.randn(1, tokens, 64, generator=draw),
            source_shapes=((1, self.source[0] // 16, self.source[1] // 16),),
        )


LAYOUTS = {
    "40+16": Layout(size=(64, 64)),
    "40+64": Layout(size=(128, 128)),
    "104+64": Layout(size=(128, 128), source=(128, 128)),
}


class Call:
    """The velocities of a group, and in training their gradients. `how` the condition is computed:
    in every row ("whole"), by a call before ("shared") or along with the targets ("one pass").
    """

    def __init__(self, policy: QwenImage21Policy, layout: Layout, how: str, training: bool) -> None:
        self.policy, self.how, self.training = policy, how, training
        self.condition = layout.condition(policy.transformer.config.context_in_dim)
        self.size = layout.size
        draw = noise.generator(42)
        self.x = torch.randn(GROUP, *policy.latent_shape(layout.size), generator=draw)
        self.sigma = torch.linspace(0.95, 0.1, GROUP)

    def __call__(self) -> Tensor:
        with torch.set_grad_enabled(self.training):
            once, whole = self.how == "one pass", self.how == "whole"
            prefix = None if whole else self.policy.prefix(self.condition, once=once)
            v = self.policy.velocity(
                self.x, self.sigma, self.condition, size=self.size, prefix=prefix
            )
            if self.training:
                for parameter in self.policy.slots.parameters.values():
                    parameter.grad = None
                v.square().mean().backward()
        return v.detach()

    def gradient(self) -> Tensor:
        """All gradients of the last call, one after the other."""
        grads = [p.grad for p in self.policy.slots.parameters.values() if p.grad is not None]
        return torch.cat([g.flatten() for g in grads])


def in_turn(arms: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each arm, `repeats` times in turn; a first round is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats + 1):
        for name, arm in arms.items():
            began = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(over: list[float], under: list[float]) -> float:
    """Median over the turns."""
    return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 3)


def milliseconds(values: list[float]) -> float:
    return round(1e3 * statistics.median(values), 2)


def sharing(repeats: int) -> dict[str, Any]:
    """Whole against shared, by precision, layout and direction, with what was predicted."""
    out: dict[str, Any] = {}
    for precision, config in CHOICES.items():
        policy = load_policy(config)
        for (name, layout), training in ((i, t) for i in LAYOUTS.items() for t in (False, True)):
            arms = {"whole": Call(policy, layout, "whole", training)}
            arms["shared"] = Call(policy, layout, "one pass" if training else "shared", training)
            seconds = in_turn(arms, repeats)
            speed = ratio(seconds["whole"], seconds["shared"])
            entry = {
                "whole_ms": milliseconds(seconds["whole"]),
                "shared_ms": milliseconds(seconds["shared"]),
                "speed_up": speed,
                "predicted": round(layout.predicted, 3),
                "of_predicted": round(speed / layout.predicted, 3),
                "velocity_gap": _gap(*(arm() for arm in arms.values())),
            }
            if training:
                entry["gradient_gap"] = _gap(*(arm.gradient() for arm in _ran(arms)))
            direction = "forward+backward" if training else "forward"
            out[f"{precision} {name} {direction}"] = entry
            print(f"{precision} {name} {direction}: {entry}", flush=True)
    return out


def _ran(arms: Mapping[str, Call]):
    for arm in arms.values():
        arm()
        yield arm


def _gap(one: Tensor, other: Tensor) -> float:
    """Largest difference, in units of the largest value."""
    return float((one - other).abs().max() / one.abs().max())


# --- the parts ------------------------------------------------------------------------------------

STEPS: dict[str, tuple[str, ...]] = {
    "stock": (),
    "no tokens of the condition": ("positions",),
    "modulation by rows": ("positions", "modulation"),
    "attention": ("positions", "modulation", "attention"),
    "linear by oneDNN": ("positions", "modulation", "attention", "linear"),
    "one pass in training": ("positions", "modulation", "attention", "linear", "one pass"),
}


class Built:
    """A policy with some of the parts in place."""

    def __init__(self, config: PolicyConfig, parts: tuple[str, ...]) -> None:
        kept = {name: part for name, part in on_cpu.PARTS.items() if name in parts}
        with mock.patch.object(on_cpu, "PARTS", kept):
            self.policy = load_policy(config)
        self.positions, self.one_pass = "positions" in parts, "one pass" in parts

    def call(self, layout: Layout, training: bool) -> Callable[[], Any]:
        how = "one pass" if self.one_pass and training else "shared"
        call = Call(self.policy, layout, how, training)

        def run() -> Tensor:
            with ExitStack() as stack:
                if not self.positions:  # the cached call as it was: it is given all tokens
                    same = mock.patch.object(qwen_image21, "_elsewhere", lambda c: c)
                    stack.enter_context(same)
                return call()

        return run


def parts(repeats: int) -> dict[str, Any]:
    """Shared calls of a group with one part more at a time, each against the one before."""
    out: dict[str, Any] = {}
    for precision, config in CHOICES.items():
        built = {name: Built(config, chosen) for name, chosen in STEPS.items()}
        for (name, layout), training in ((i, t) for i in LAYOUTS.items() for t in (False, True)):
            arms = {step: one.call(layout, training) for step, one in built.items()}
            seconds = in_turn(arms, repeats)
            steps = list(STEPS)
            entry = {step: {"ms": milliseconds(seconds[step])} for step in steps}
            for before, after in zip(steps, steps[1:], strict=False):
                entry[after]["faster_by"] = ratio(seconds[before], seconds[after])
            entry["all"] = {"faster_by": ratio(seconds["stock"], seconds[steps[-1]])}
            direction = "forward+backward" if training else "forward"
            out[f"{precision} {name} {direction}"] = entry
            print(f"{precision} {name} {direction}: {entry}", flush=True)
    return out


# --- attention alone ------------------------------------------------------------------------------


def attention(repeats: int) -> dict[str, Any]:
    """torch's fused attention against products, of one layer (6 heads of 32), milliseconds."""
    out: dict[str, Any] = {}
    for precision in CHOICES:
        for name, layout in LAYOUTS.items():
            condition, target = layout.counts
            draw = noise.generator(43)
            q, k, v = (
                torch.randn(GROUP, 6, n, 32, generator=draw)
                .to(getattr(torch, precision))
                .requires_grad_()
                for n in (target, condition + target, condition + target)
            )
            arms = {
                f"{kind} {direction}": _attention_arm(kind, direction == "backward", (q, k, v))
                for direction in ("forward", "backward")
                for kind in ("fused", "products")
            }
            seconds = in_turn(arms, 5 * repeats)
            out[f"{precision} {name}"] = {n: milliseconds(s) for n, s in seconds.items()}
            print(f"{precision} {name}: {out[f'{precision} {name}']}", flush=True)
    return out


def _attention_arm(kind: str, backward: bool, qkv: tuple[Tensor, ...]) -> Callable[[], Any]:
    q, k, v = qkv

    def run() -> None:
        with torch.set_grad_enabled(backward), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            if kind == "fused":
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            else:
                out = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(-1) @ v
            if backward:
                torch.autograd.grad(out.square().mean(), qkv)

    return run


# --- torch.compile --------------------------------------------------------------------------------


def compile(repeats: int) -> dict[str, Any]:
    """Blocks by torch.compile (any shapes) against the stock ones as they are, 5 steps of a rollout
    and a training call. Needs a C++ compiler.
    """
    policy = Built(CHOICES["float32"], ("positions", "modulation")).policy
    blocks = list(policy.transformer.transformer_blocks)
    plain = [block.forward for block in blocks]
    compiled = [torch.compile(block.forward, dynamic=True) for block in blocks]
    train = Call(policy, LAYOUTS["40+16"], "shared", True)
    still = Call(policy, LAYOUTS["40+16"], "shared", False)

    def rollout() -> None:
        with torch.no_grad():
            prefix = policy.prefix(still.condition)
            for _ in range(5):
                policy.velocity(
                    still.x, still.sigma, still.condition, size=still.size, prefix=prefix
                )

    def by(forwards: list[Any], work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            for block, forward in zip(blocks, forwards, strict=True):
                block.forward = forward
            work()

        return run

    out: dict[str, Any] = {}
    for name, work in (("rollout", rollout), ("training", train)):
        began = time.perf_counter()
        by(compiled, work)()
        waited = round(time.perf_counter() - began, 1)
        seconds = in_turn({"plain": by(plain, work), "compiled": by(compiled, work)}, repeats)
        out[name] = {arm: milliseconds(s) for arm, s in seconds.items()}
        out[name] |= {
            "faster_by": ratio(seconds["plain"], seconds["compiled"]),
            "compiling_s": waited,
        }
        print(f"{name}: {out[name]}", flush=True)
    return out


MEASURES = {"sharing": sharing, "parts": parts, "attention": attention, "compile": compile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    for name in args.only:
        figures[name] = MEASURES[name](args.repeats)
    figures["command"] = "taskset -c 0 python -m benchmarks.prefix"
    figures["machine"] = machine()
    if args.out:
        atomic_write_text(args.out, json_text(figures))


if __name__ == "__main__":
    main()
