"""The learner of an alignment run: rollouts and advantages in, new weights out.

Guidance of the objective is `train_guidance`, 1 by default: the unconditional branch is not
evaluated at all. The micro-batch is the group. All draws are keyed by (seed, iteration, update,
group).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rewards import images
from rlhf import checkpoint, noise, weights
from rlhf.distributed import ALONE, Ranks
from rlhf.errors import ConfigError, ReplayMismatch, StaleRollouts
from rlhf.learner import Learner, LearnerConfig
from rlhf.losses import (
    LOSSES,
    Loss,
    LossTerms,
    grpo,
    keep_live,
    nft,
    noised,
    summarise,
    transition_log_prob,
)
from rlhf.policies.base import Condition, Policy
from rlhf.types import Advantages, Rollouts, StepReport, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Which loss, and how often one batch of rollouts is used.

    `behaviour_lag`: after iteration i the behaviour slot keeps min(lag_max, lag_rate * i) of itself
    (NFT); for ratio losses it becomes `train`. `sigma_span` is the part of the grid that NFT draws
    from, 0 = noise end.
    """

    name: str = "nft"
    updates_per_rollout: int = 6
    clip_low: float = 1e-4
    clip_high: float = 1e-4
    beta: float = 1.0
    adv_max: float = 2.0
    kl: float = 0.0
    lag_max: float = 0.7
    lag_rate: float = 0.02
    sigma_span: tuple[float, float] = (0.0, 1.0)
    old_logp: Literal["rollout", "replay"] = "rollout"
    replay_tolerance: float = 1e-6

    def check(self) -> None:
        if self.name not in LOSSES:
            raise ConfigError(f"loss.name: expected one of {', '.join(LOSSES)}, got '{self.name}'")
        if self.updates_per_rollout < 1:
            raise ConfigError(
                f"loss.updates_per_rollout: expected at least 1, got {self.updates_per_rollout}"
            )
        if not 0 <= self.sigma_span[0] < self.sigma_span[1] <= 1:
            raise ConfigError(
                f"loss.sigma_span: expected 0 <= low < high <= 1, got {self.sigma_span}"
            )
        if min(self.beta, self.adv_max, self.clip_low, self.clip_high) <= 0:
            raise ConfigError("loss: expected beta, adv_max, clip_low and clip_high above 0")
        if not (0 <= self.lag_max < 1 and self.lag_rate >= 0):
            raise ConfigError(
                f"loss: expected 0 <= lag_max < 1 and lag_rate >= 0, got {self.lag_max} and"
                f" {self.lag_rate}"
            )
        if self.kl < 0 or (self.kl > 0 and self.loss.form is not None):
            raise ConfigError(
                f"loss.kl: expected 0 (or more with loss.name=nft), got {self.kl} with {self.name}"
            )

    @property
    def loss(self) -> Loss:
        return LOSSES[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentConfig:
    """What the learner needs to know of a run."""

    seed: int = 0
    train_guidance: float = 1.0
    reference_guidance: float = 1.0
    loss: LossConfig = field(default_factory=LossConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    staleness: int = 0  # updates that rollouts may be older than the weights they train


class AlignmentLearner:
    """Owns the policy's slots. `behaviour` is what rollouts use; it starts equal to `train`.

    With staleness, `behaviour/<step>` are what it was after earlier updates. With several ranks
    `update`, `save` and `load` are called on all of them, and figures are those of the whole batch.
    """

    def __init__(self, policy: Policy, config: AlignmentConfig, ranks: Ranks = ALONE) -> None:
        self.policy, self.config, self.ranks = policy, config, ranks
        self.learner = Learner(policy.slots.parameters, config.learner, ranks)
        self.iteration = 0
        self._replayed: dict[int, Tensor] = {}  # old log-probs by group, for old_logp=replay
        policy.slots.copy("train", "behaviour")

    # --- the verbs --------------------------------------------------------------------------------

    def publish(self, slot: str) -> weights.Handover:
        """A slot for the rollout workers, with its checksum and probe."""
        _, _, step = slot.partition("behaviour/")
        if step and slot not in self.policy.slots.names:
            raise ConfigError(
                f"the weights that samples were made with after update {step} are not there: the"
                " checkpoint was written at a smaller staleness: resume with that one"
            )
        return weights.prepare(self.policy, slot, int(step) if step else self.iteration)

    def update(self, rollouts: Sequence[Rollouts | None], advantages: Advantages) -> StepReport:
        """`updates_per_rollout` optimiser steps on one batch of rollouts, then the behaviour slot
        follows. A group that another rank computes may be None.

        Without a single live sample there is nothing to learn from: no step is taken, so that
        neither the optimiser's momentum nor weight decay moves a weight.

        Raises:
            StaleRollouts: rollouts that were sampled neither by the current behaviour slot nor by
                one at most `staleness` updates older.
            ReplayMismatch: the first ratio is not 1.
        """
        self._check_versions(rollouts)
        total = max(int(advantages.live_PG.sum()), 1)
        weight_PG = advantages.live_PG.float() / total
        batch = list(zip(rollouts, advantages.value_PG, weight_PG, strict=True))
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        if not advantages.live_PG.any():
            first = last = {"loss": 0.0, "grad_norm": 0.0}
        for update in range(self.config.loss.updates_per_rollout if not last else 0):
            terms: list[LossTerms] = []

            def objective(item: tuple[Rollouts, Tensor, Tensor], update=update, terms=terms):
                term = self._terms(item[0], item[1], item[2], update)
                terms.append(term)
                return term.loss, {}

            outcome = self.learner.step(batch, objective)
            last = self._summary(terms) | {"grad_norm": outcome.grad_norm}
            first = first or last
        self._replayed.clear()
        self._remember()
        self.iteration += 1
        self._follow()
        if "ratio/max_dev" in first:
            last["ratio/first_max_dev"] = first["ratio/max_dev"]
        if rollouts[0] is not None:
            last |= self._diagnostics(rollouts[0])
        return StepReport(iteration=self.iteration, metrics=last)

    def _summary(self, terms: Sequence[LossTerms]) -> dict[str, float]:
        """Metrics of an update, over the micro-batches of all ranks in their order."""
        plain = [replace(term, loss=term.loss.detach()) for term in terms]
        return summarise([term for part in self.ranks.gather(plain) for term in part])

    def _check_versions(self, rollouts: Sequence[Rollouts | None]) -> None:
        known: dict[int, str] = {}
        for version in (one.ref.version for one in rollouts if one is not None):
            slot, age = self._sampled_by(version), self.iteration - version.step
            fits = version.slot.startswith("behaviour") and 0 <= age <= self.config.staleness
            if fits and version.step not in known and slot in self.policy.slots.names:
                known[version.step] = weights.checksum(self.policy.slots.tensors(slot))
            if not fits or known.get(version.step) != version.checksum:
                raise StaleRollouts(
                    f"expected rollouts of the behaviour slot after update {self.iteration}, or at"
                    f" most {self.config.staleness} before, got {version}: publish before rollout"
                )

    def _sampled_by(self, version: Version) -> str:
        """The slot that holds what rollouts were sampled with."""
        current = version.step == self.iteration
        return "behaviour" if current else f"behaviour/{version.step}"

    def _remember(self) -> None:
        """Keep what samples under way were made with: `behaviour` of the last `staleness` steps."""
        slots, oldest = self.policy.slots, self.iteration + 1 - self.config.staleness
        if self.config.staleness:
            slots.copy("behaviour", f"behaviour/{self.iteration}")
        for name in slots.names:
            if name.startswith("behaviour/") and int(name.partition("/")[2]) < oldest:
                slots.drop(name)

    def _follow(self) -> None:
        loss = self.config.loss
        if loss.loss.form is None:
            self.policy.slots.lag("behaviour", min(loss.lag_max, loss.lag_rate * self.iteration))
        else:
            self.policy.slots.copy("train", "behaviour")

    # --- the loss of one group --------------------------------------------------------------------

    def _terms(
        self, rollouts: Rollouts, advantage_G: Tensor, weight_G: Tensor, update: int
    ) -> LossTerms:
        if self.config.loss.loss.form is None:
            return self._forward_process(rollouts, advantage_G, weight_G, update)
        return self._ratio(rollouts, advantage_G, weight_G, update)

    def _conditions(self, rollouts: Rollouts) -> tuple[Condition, Condition | None]:
        prompt = rollouts.ref.prompt
        sources = [images.load_image(p) for p in prompt.sources]
        condition = self.policy.encode(prompt.text, sources)
        guided = self.config.train_guidance > 1
        return condition, self.policy.encode(prompt.negative, sources) if guided else None

    def _velocity(self, x: Tensor, sigma: Tensor, rollouts: Rollouts, slot: str) -> Tensor:
        """The field that is trained: v_c, or the guided one where `train_guidance` says so."""
        size = (rollouts.geometry.height, rollouts.geometry.width)
        fields = []
        for condition in self._conditions(rollouts):
            if condition is not None:
                prefix = (
                    self.policy.prefix(condition, slot) if rollouts.geometry.cached_prefix else None
                )
                fields.append(
                    self.policy.velocity(x, sigma, condition, size=size, prefix=prefix, slot=slot)
                )
        if len(fields) == 1:
            return fields[0]
        return fields[1] + self.config.train_guidance * (fields[0] - fields[1])

    def _forward_process(self, rollouts: Rollouts, advantage_G, weight_G, update: int) -> LossTerms:
        loss, key = self.config.loss, (self.config.seed, self.iteration, update, rollouts.ref.group)
        rows = noise.generator(21, *key)
        x0 = keep_live(rollouts.x0_GNC, weight_G)
        grid = torch.tensor(rollouts.schedule.sigmas[:-1])
        low, high = (int(round(f * len(grid))) for f in loss.sigma_span)
        low = min(low, len(grid) - 1)
        sigma = grid[torch.randint(low, max(high, low + 1), (len(x0),), generator=rows)]
        x = noised(x0, torch.randn(x0.shape, generator=rows), sigma)
        with torch.no_grad():
            v_old = self._velocity(x, sigma, rollouts, self._sampled_by(rollouts.ref.version))
            v_ref = self._velocity(x, sigma, rollouts, "reference") if loss.kl > 0 else None
        v_theta = self._velocity(x, sigma, rollouts, "train")
        return nft(
            v_theta,
            v_old,
            x,
            x0,
            sigma,
            advantage_G,
            weight_G,
            loss.beta,
            loss.adv_max,
            v_ref,
            loss.kl,
        )

    def _ratio(self, rollouts: Rollouts, advantage_G, weight_G, update: int) -> LossTerms:
        loss, t = self.config.loss, rollouts.trajectory
        if t is None:
            raise ConfigError(
                f"loss {loss.name} needs the trajectory, the rollouts hold none: use kernel"
                " flow-sde"
            )
        x, after = (keep_live(a, weight_G, axis=1) for a in (t.x_KGNC, t.next_KGNC))
        shift = None if t.shift_KGNC is None else keep_live(t.shift_KGNC, weight_G, axis=1)
        logp = self._log_probs(rollouts, x, after, shift, "train")
        old = t.logp_KG
        if loss.old_logp == "replay":
            if update == 0:
                with torch.no_grad():
                    old_slot = self._sampled_by(rollouts.ref.version)
                    replayed = self._log_probs(rollouts, x, after, shift, old_slot)
                self._replayed[rollouts.ref.group] = replayed
            old = self._replayed[rollouts.ref.group]
        terms = grpo(
            logp,
            keep_live(old, weight_G, axis=1),
            advantage_G,
            weight_G,
            loss.clip_low,
            loss.clip_high,
        )
        deviation = float(terms.maxima["ratio/max_dev"])
        fresh = rollouts.ref.version.step == self.iteration
        if update == 0 and fresh and not deviation <= loss.replay_tolerance:
            raise ReplayMismatch(
                f"before the first update the log-probs of group {rollouts.ref.group} differ by"
                f" {deviation:.2e}"
                f" (limit {loss.replay_tolerance:.0e}): rollout and learner do not compute the"
                " same policy; use"
                " loss.old_logp=replay, or the same dtype, cache mode and weights on both sides"
            )
        return terms

    def _log_probs(self, rollouts: Rollouts, x, after, shift, slot: str) -> Tensor:
        """(K, G): all trained steps of the group in one call."""
        t, grid = rollouts.trajectory, rollouts.schedule
        assert t is not None
        k, g = x.shape[:2]
        sigma = torch.tensor([grid.sigmas[i] for i in t.index_K]).repeat_interleave(g)
        v = self._velocity(x.flatten(0, 1), sigma, rollouts, slot).unflatten(0, (k, g))
        form = self.config.loss.loss.form or "plain"
        return torch.stack(
            [
                transition_log_prob(
                    v[j], x[j], after[j], grid, i, form, None if shift is None else shift[j]
                )
                for j, i in enumerate(t.index_K)
            ]
        )

    @torch.no_grad()
    def _diagnostics(self, rollouts: Rollouts) -> dict[str, float]:
        """How far train went from the reference, and how much of it points along guidance (one
        group).
        """
        x0 = rollouts.x0_GNC
        if not torch.isfinite(x0).all():
            return {}
        rows = noise.generator(22, self.config.seed, self.iteration)
        sigma = torch.full((len(x0),), 0.7)
        x = noised(x0, torch.randn(x0.shape, generator=rows), sigma)
        size = (rollouts.geometry.height, rollouts.geometry.width)
        prompt = rollouts.ref.prompt
        condition = self.policy.encode(prompt.text, [images.load_image(p) for p in prompt.sources])
        empty = self.policy.encode(prompt.negative, [images.load_image(p) for p in prompt.sources])
        v, ref = (
            self.policy.velocity(x, sigma, condition, size=size, slot=s)
            for s in ("train", "reference")
        )
        v_u = self.policy.velocity(x, sigma, empty, size=size, slot="reference")
        moved, along = (v - ref).flatten(1), (ref - v_u).flatten(1)
        return {
            "norm/velocity_ratio": float(v.norm() / ref.norm()),
            "kl/velocity": float((v - ref).square().mean()),
            "guidance/cosine": float(
                torch.cosine_similarity(moved, along, dim=1, eps=1e-12).mean()
            ),
            "guidance/gap": float(along.square().mean().sqrt()),
        }

    # --- state ------------------------------------------------------------------------------------

    def save(
        self, folder: Path, step: int, keep_last: int, keep_best: int, metric: float | None
    ) -> None:
        """A checkpoint of every slot, the optimiser and the counters; the first rank writes it.
        Raises CheckpointError.
        """
        optimiser, counters = self.learner.state()
        if not self.ranks.is_first:
            return
        slots = self.policy.slots
        tensors = {f"slots/{s.replace('/', '.')}": slots.tensors(s) for s in slots.names}
        state = checkpoint.State(
            tensors={**tensors, "optimiser": optimiser},
            meta={"learner": counters, "iteration": self.iteration},
        )
        checkpoint.save(
            folder, step, state, keep_last=keep_last, keep_best=keep_best, metric=metric
        )

    def load(self, path: Path) -> int:
        """Continue from a checkpoint; its iteration. Raises CheckpointError."""
        state = checkpoint.load(path)
        for name, tensors in state.tensors.items():
            if name.startswith("slots/"):
                self.policy.slots.load(name.removeprefix("slots/").replace(".", "/"), tensors)
        self.learner.load_state(state.tensors["optimiser"], state.meta["learner"])
        self.iteration = int(state.meta["iteration"])
        return self.iteration
