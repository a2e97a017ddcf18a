"""The learner of an alignment run: rollouts and advantages in, new weights out.

Guidance of the objective is `train_guidance`, 1 by default: the unconditional branch is not
evaluated at all. That of the base which a KL holds it near is `reference_guidance`. The micro-batch
is the group. All draws are keyed by (seed, iteration, update, group).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from rewards import images
from rlhf import checkpoint, kernels, noise, weights
from rlhf.distributed import ALONE, Ranks
from rlhf.errors import ConfigError, ReplayMismatch, StaleRollouts
from rlhf.learner import Learner, LearnerConfig
from rlhf.losses import (
    LossConfig,
    LossTerms,
    Noised,
    Transitions,
    added,
    keep_live,
    noised,
    penalty,
    summarise,
    transition_log_prob,
    transition_weight,
    velocity_kl,
    weighted,
)
from rlhf.policies.base import Condition, Policy
from rlhf.schedule import Schedule
from rlhf.types import Advantages, Rollouts, StepReport, Trajectory, Version
from rlhf.windows import emphasised

DIAGNOSED = 4  # samples: three forwards of each


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentConfig:
    """What the learner needs to know of a run. `ema`: see `rlhf.plan.Config`."""

    seed: int = 0
    train_guidance: float = 1.0
    reference_guidance: float = 1.0
    ema: float = 0.0
    loss: LossConfig = field(default_factory=LossConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    staleness: int = 0  # updates that rollouts may be older than the weights they train

    def guidance_of(self, slot: str) -> float:
        """Guidance of a slot's field in the objective."""
        return self.reference_guidance if slot == "reference" else self.train_guidance


class AlignmentLearner:
    """Owns the policy's slots. `behaviour` is what rollouts use; it starts equal to `train`.

    With staleness, `behaviour/<step>` are what it was after earlier updates. With several ranks
    `update`, `save` and `load` are called on all of them, and figures are those of the whole batch.
    """

    def __init__(self, policy: Policy, config: AlignmentConfig, ranks: Ranks = ALONE) -> None:
        self.policy, self.config, self.ranks = policy, config, ranks
        self.learner = Learner(policy.slots.parameters, config.learner, ranks)
        self.iteration = 0
        self._replayed: dict[int, tuple[Tensor, Tensor | None]] = {}  # see `_old`, by group
        policy.slots.copy("train", "behaviour")
        if config.ema > 0:
            policy.slots.copy("train", "ema")

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
        updates = range(self.config.loss.updates_per_rollout if not last else 0)
        for update in updates:
            terms: list[LossTerms] = []

            def objective(item: tuple[Rollouts, Tensor, Tensor], update=update, terms=terms):
                term = self.terms(item[0], item[1], item[2], update)
                terms.append(term)
                return term.loss, {}

            outcome = self.learner.step(batch, objective)
            self._average(outcome.skipped)
            if update in (updates[0], updates[-1]):  # no one looks at the others
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

    def _average(self, skipped: bool) -> None:
        """One step of the running average; the first ones count for more (as in diffusers)."""
        if self.config.ema > 0 and not skipped:
            steps = self.learner.steps
            self.policy.slots.lag("ema", min(self.config.ema, (1 + steps) / (10 + steps)))

    def _follow(self) -> None:
        loss = self.config.loss
        if loss.loss.lagged:
            self.policy.slots.lag("behaviour", min(loss.lag_max, loss.lag_rate * self.iteration))
        else:
            self.policy.slots.copy("train", "behaviour")

    # --- the loss of one group --------------------------------------------------------------------

    def terms(
        self, rollouts: Rollouts, advantage_G: Tensor, weight_G: Tensor, update: int
    ) -> LossTerms:
        """The loss of one group in one update of an iteration, with gradient. `weight_G`: each
        sample's share of the batch, 0 where it is not live.

        Raises:
            ReplayMismatch: in update 0 the ratio is not 1. ConfigError: no trajectory was stored.
        """
        if self.config.loss.loss.form is None:
            return self._forward_process(rollouts, advantage_G, weight_G, update)
        return self._ratio(rollouts, advantage_G, weight_G, update)

    def _conditions(self, rollouts: Rollouts, guided: bool) -> list[Condition]:
        prompt = rollouts.ref.prompt
        sources = [images.load_image(p) for p in prompt.sources]
        texts = (prompt.text, prompt.negative) if guided else (prompt.text,)
        return [self.policy.encode(text, sources) for text in texts]

    def _velocity(self, x: Tensor, sigma: Tensor, rollouts: Rollouts, slot: str) -> Tensor:
        """The field of a slot: v_c, or the guided one where its guidance says so."""
        guidance = self.config.guidance_of(slot)
        conditions = self._conditions(rollouts, guidance > 1)
        fields = [self._branch(x, sigma, rollouts, condition, slot) for condition in conditions]
        return fields[0] if len(fields) == 1 else kernels.guide(fields[0], fields[1], guidance)

    def _branch(
        self, x: Tensor, sigma: Tensor, rollouts: Rollouts, condition: Condition, slot: str
    ) -> Tensor:
        """The velocity of a slot under one condition, its prefix shared as in the rollouts."""
        geometry = rollouts.geometry
        size = (geometry.height, geometry.width)
        prefix = self.policy.prefix(condition, slot, once=True) if geometry.cached_prefix else None
        return self.policy.velocity(x, sigma, condition, size=size, prefix=prefix, slot=slot)

    def _forward_process(self, rollouts: Rollouts, advantage_G, weight_G, update: int) -> LossTerms:
        loss, key = self.config.loss, (self.config.seed, self.iteration, update, rollouts.ref.group)
        rows = noise.generator(21, *key)
        x0 = keep_live(rollouts.x0_GNC, weight_G)
        grid = torch.tensor(rollouts.schedule.sigmas[:-1])
        low, high = (int(round(f * len(grid))) for f in loss.sigma_span)
        low = min(low, len(grid) - 1)
        levels = range(low, max(high, low + 1))
        sigma = grid[self._levels(levels, len(grid), len(x0), rows)]
        eps = torch.randn(x0.shape, generator=rows)
        x = noised(x0, eps, sigma)
        with torch.no_grad():
            v_old = self._velocity(x, sigma, rollouts, self._sampled_by(rollouts.ref.version))
            others = [self._velocity(x, sigma, rollouts, slot) for slot, _ in loss.penalties]
        v = self._velocity(x, sigma, rollouts, "train")
        seen = Noised(v_theta=v, v_old=v_old, x_s=x, x0=x0, eps=eps, sigma_G=sigma)
        terms = loss.loss.function(seen, advantage_G, weight_G, loss)
        return self._held(_with_sigma(terms, sigma, weight_G), v, others, weight_G)

    def _levels(self, levels: range, steps: int, count: int, rows: torch.Generator) -> Tensor:
        """Grid positions, one for each sample."""
        emphasis = self.config.loss.emphasis
        if emphasis == 0:
            return torch.randint(levels.start, levels.stop, (count,), generator=rows)
        weights = emphasised(levels, steps, emphasis)
        return levels.start + torch.multinomial(weights, count, replacement=True, generator=rows)

    def _held(self, terms: LossTerms, v: Tensor, others: list[Tensor], weight_B) -> LossTerms:
        """With the KL to each slot that the weights are held near; rows of `v` weigh `weight_B`."""
        pairs = zip(self.config.loss.penalties, others, strict=True)
        near = [penalty(slot, velocity_kl(v, o, weight_B), c) for (slot, c), o in pairs]
        return added([terms, *near]) if near else terms

    def _ratio(self, rollouts: Rollouts, advantage_G, weight_G, update: int) -> LossTerms:
        loss, t, grid = self.config.loss, rollouts.trajectory, rollouts.schedule
        if t is None:
            raise ConfigError(
                f"loss {loss.name} needs the trajectory, the rollouts hold none: use kernel"
                " flow-sde"
            )
        x, after = (keep_live(a, weight_G, axis=1) for a in (t.x_KGNC, t.next_KGNC))
        t = replace(
            t,
            x_KGNC=x,
            next_KGNC=after,
            shift_KGNC=None if t.shift_KGNC is None else keep_live(t.shift_KGNC, weight_G, axis=1),
        )
        with torch.no_grad():
            others = [self._fields(rollouts, t, slot) for slot, _ in loss.penalties]
            old_logp, v_old = self._old(rollouts, t, update)
        v = self._fields(rollouts, t, "train")
        logp, factors = self._log_probs(t, v, grid), [kernels.kl_factor(grid, i) for i in t.index_K]
        old_logp = keep_live(old_logp, weight_G, axis=1)
        if update == 0 and rollouts.ref.version.step == self.iteration:
            self._check_first(rollouts, logp, old_logp, weight_G)
        kl_old = None
        if v_old is not None:
            d = v - keep_live(v_old, weight_G, axis=1)
            kl_old = torch.tensor(factors)[:, None] * d.square().flatten(2).mean(dim=2)
        steps = Transitions(
            logp_KG=logp,
            old_logp_KG=old_logp,
            kl_old_KG=kl_old,
            q_K=torch.tensor([grid.coefficients(i).q for i in t.index_K]),
            h_K=torch.tensor([grid.sigmas[i] - grid.sigmas[i + 1] for i in t.index_K]),
        )
        terms = loss.loss.function(steps, advantage_G, weight_G, loss)
        mean = sum(grid.sigmas[i] for i in t.index_K) / len(t.index_K)
        terms = _with_sigma(terms, torch.full_like(weight_G, mean), weight_G)
        exact = loss.kl_form == "gaussian"
        rows = transition_weight(weight_G, factors if exact else [1.0] * len(factors))
        return self._held(terms, v.flatten(0, 1), [o.flatten(0, 1) for o in others], rows)

    def _check_first(self, rollouts: Rollouts, logp: Tensor, old: Tensor, weight_G) -> None:
        """Raise ReplayMismatch unless the first ratio is 1."""
        gap = keep_live(logp.detach() - old, weight_G, axis=1)
        deviation, limit = float(gap.abs().max()), self.config.loss.replay_tolerance
        if not deviation <= limit:
            raise ReplayMismatch(
                f"before the first update the log-probs of group {rollouts.ref.group} differ by"
                f" {deviation:.2e} (limit {limit:.0e}): rollout and learner do not compute the"
                " same policy; use loss.old_logp=replay, or the same dtype, cache mode and weights"
                " on both sides"
            )

    def _old(self, rollouts: Rollouts, t: Trajectory, update: int) -> tuple[Tensor, Tensor | None]:
        """Log-probs and fields of the weights that sampled: as recorded, or computed here once."""
        loss = self.config.loss
        if loss.old_logp == "rollout":
            return t.logp_KG, t.velocity_KGNC
        if update == 0:
            v = self._fields(rollouts, t, self._sampled_by(rollouts.ref.version))
            logp = self._log_probs(t, v, rollouts.schedule)
            needed = "velocity" in loss.loss.requires
            self._replayed[rollouts.ref.group] = logp, v if needed else None
        return self._replayed[rollouts.ref.group]

    def _fields(self, rollouts: Rollouts, t: Trajectory, slot: str) -> Tensor:
        """(K, G, N, C) velocities: all trained steps of the group in one call."""
        k, g = t.x_KGNC.shape[:2]
        sigma = torch.tensor([rollouts.schedule.sigmas[i] for i in t.index_K]).repeat_interleave(g)
        return self._velocity(t.x_KGNC.flatten(0, 1), sigma, rollouts, slot).unflatten(0, (k, g))

    def _log_probs(self, t: Trajectory, v: Tensor, grid: Schedule) -> Tensor:
        """(K, G) log-probs of the recorded transitions under velocities."""
        form = self.config.loss.loss.form or "plain"
        shifts = [None] * len(v) if t.shift_KGNC is None else t.shift_KGNC
        rows = zip(v, t.x_KGNC, t.next_KGNC, t.index_K, shifts, strict=True)
        logp = [transition_log_prob(w, x, after, grid, i, form, s) for w, x, after, i, s in rows]
        return torch.stack(logp)

    @torch.no_grad()
    def _diagnostics(self, rollouts: Rollouts) -> dict[str, float]:
        """How far train went from the reference, and how much of it points along guidance (some
        samples of one group).
        """
        x0 = rollouts.x0_GNC[:DIAGNOSED]
        if not torch.isfinite(x0).all():
            return {}
        rows = noise.generator(22, self.config.seed, self.iteration)
        sigma = torch.full((len(x0),), 0.7)
        x = noised(x0, torch.randn(x0.shape, generator=rows), sigma)
        condition, empty = self._conditions(rollouts, guided=True)
        fields = (("train", condition), ("reference", condition), ("reference", empty))
        v, ref, v_u = (self._branch(x, sigma, rollouts, c, slot) for slot, c in fields)
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
        if self.config.ema > 0 and "slots/ema" not in state.tensors:
            self.policy.slots.copy("train", "ema")
        self.learner.load_state(state.tensors["optimiser"], state.meta["learner"])
        self.iteration = int(state.meta["iteration"])
        return self.iteration


def _with_sigma(terms: LossTerms, sigma_G: Tensor, weight_G: Tensor) -> LossTerms:
    """With `trained/sigma`, the mean noise level that is trained, over live samples."""
    return replace(terms, metrics={**terms.metrics, "trained/sigma": weighted(sigma_G, weight_G)})
