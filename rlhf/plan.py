"""The configuration of an alignment run, and its iterations as requests.

`rlhf align` runs it and `rlhf bench step` times it; see `rlhf.loop` for the iteration itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rewards.types import JudgeCard
from rlhf.advantage import Scheme
from rlhf.alignment import AlignmentConfig
from rlhf.cluster.base import ClusterConfig, Recipe
from rlhf.coefficients import TABLE
from rlhf.errors import ConfigError
from rlhf.evaluation import Protocol
from rlhf.learner import LearnerConfig
from rlhf.losses import Choice, LossConfig, check_choice
from rlhf.losses.table import WHOLE
from rlhf.monitor import MonitorConfig
from rlhf.policies.config import PolicyConfig
from rlhf.policies.families import check_pictures, describe
from rlhf.prompts import PromptSet, batch_of, further
from rlhf.rollout import Noisy, Request, seeds_of
from rlhf.sampling import Sampler
from rlhf.schedule import build
from rlhf.types import GroupRef, Prompt
from rlhf.weighing import check_judges, or_equal, read_weights
from rlhf.windows import Windows, drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Held-out prompts, measured before, every `every` iterations (0 = never) and after."""

    prompts: PromptSet = field(
        default_factory=lambda: PromptSet(source="scenes/objects/2@align-heldout", count=64)
    )
    per_prompt: int = 4
    every: int = 15
    steps: int = 20
    guidance: float | None = None  # None: that of the rollouts
    settings: tuple[str, ...] = ("guided", "w1")
    slot: Literal["train", "ema"] = "train"  # whose pictures, and what the run exports
    seed: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint every `every` iterations; the newest `keep_last` and best `keep_best` stay."""

    every: int = 10
    keep_last: int = 2
    keep_best: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One alignment run. `weights`: category -> judge -> weight, "*" for every other category.

    `watch` names judges that score every picture and have no say. See `rlhf.advantage` for
    `scheme`. With `staleness` above 0 samples are made while earlier ones train, on weights that
    are that many updates older. `ema`: slot `ema` keeps this share of itself at every update; 0 =
    there is none. `refill`: rounds in which groups without a live sample are replaced by those of
    further prompts. With `reference_guidance` above 1 the base that `loss.kl` holds the weights
    near is the guided one: the unguided policy takes its guidance in.
    """

    name: str = "align"
    runs: str = "runs"
    seed: int = 0
    iterations: int = 40
    prompts_per_iteration: int = 12
    group_size: int = 8
    refill: int = 0
    staleness: int = 0
    prompts: PromptSet = field(default_factory=PromptSet)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: Sampler = field(default_factory=lambda: Sampler(guidance=3.0))
    windows: Windows = field(default_factory=Windows)
    train_guidance: float = 1.0
    reference_guidance: float = 1.0
    loss: LossConfig = field(default_factory=LossConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    ema: float = 0.0
    judges: tuple[str, ...] = ("oracle/fidelity",)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    weights_from: str | None = None  # a YAML file of weights, in their place
    required: tuple[str, ...] = ()
    scheme: Scheme = "mo-grpo"
    watch: tuple[str, ...] = ()
    judge_retries: int = 1
    advantage_clip: float = 5.0
    max_failed_share: float = 0.2
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def check(self) -> None:
        """Refuse what cannot be trained, and say what to write instead."""
        if self.group_size < 2:
            raise ConfigError(
                "group_size: expected at least 2 (a group of one has no advantage), got"
                f" {self.group_size}"
            )
        if self.train_guidance not in (1.0, self.rollout.guidance):
            raise ConfigError(
                "train_guidance: expected 1 (hybrid) or rollout.guidance"
                f" ({self.rollout.guidance}), got"
                f" {self.train_guidance}: the old log-prob must belong to the field that is trained"
            )
        if self.reference_guidance < 1 or (self.reference_guidance > 1 and self.loss.kl <= 0):
            raise ConfigError(
                "reference_guidance: expected 1, or more with loss.kl above 0, whose reference it"
                f" guides, got {self.reference_guidance} and loss.kl={self.loss.kl}"
            )
        self._check_loss()
        self._check_numbers()
        self._check_cluster()
        if not self.judges:
            raise ConfigError(
                "judges: expected at least one, such as oracle/fidelity or my_rewards.py:brightness"
            )
        if self.weights and self.weights_from:
            raise ConfigError("write weights or weights_from: two answers to one question")
        if both := sorted(set(self.judges) & set(self.watch)):
            raise ConfigError(
                f"watch: expected judges that have no say, got {both}, which judges names too:"
                " take them out of one of the two"
            )

    def _choice(self, own_grid: bool = False) -> Choice:
        loss = self.loss
        return Choice(
            loss=loss.loss,
            kernel=self.rollout.kernel,
            kl_form=loss.kl_form if loss.penalties else None,
            replayed=loss.old_logp == "replay",
            own_grid=own_grid,
            shared_noise=self.rollout.shared_noise,
            moving=self.windows.kind != "fixed",
            subset=bool(loss.trained_steps or self.rollout.trained),
            span=loss.sigma_span != WHOLE,
            emphasis=loss.emphasis > 0,
            drawn=loss.trained_steps > 0,
        )

    def _check_loss(self) -> None:
        check_choice(self._choice())
        self._check_windows()
        loss, (start, stop) = self.loss.loss, self.rollout.window
        if loss.form is not None and stop <= start:
            raise ConfigError(
                f"loss.name {loss.name} needs stored stochastic steps, got"
                f" rollout.window={list(self.rollout.window)}:"
                " write for example rollout.window=[0,4]"
            )
        tail = TABLE[self.rollout.kernel].tail
        if loss.form is not None and stop > self.rollout.steps - tail:
            last = "last" if tail == 1 else f"last {tail}"
            raise ConfigError(
                f"rollout.window: expected to stop before the {last} of {self.rollout.steps} steps,"
                f" got {stop}:"
                " its noise is too small to train on"
            )
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema: expected a decay from 0 (none) to below 1, got {self.ema}")
        if self.ema == 0 and (self.loss.kl_ema > 0 or self.evaluation.slot == "ema"):
            raise ConfigError(
                "loss.kl_ema and evaluation.slot=ema: expected a running average of the weights,"
                " got none: write ema=0.99"
            )

    def _check_windows(self) -> None:
        self.windows.check_in(self.rollout.window)
        start, stop = self.windows.middle(self.rollout.window)
        stated, count = self.rollout.trained, self.loss.trained_steps
        if stated and (self.windows.kind != "fixed" or count):
            raise ConfigError(
                f"rollout.trained={list(stated)}: expected a fixed window and loss.trained_steps=0,"
                " which draws them: two answers to one question"
            )
        if count and not count < stop - start:
            raise ConfigError(
                f"loss.trained_steps: expected less than the {stop - start} steps of a window, got"
                f" {count}: write 0 to train all of them"
            )

    def _check_cluster(self) -> None:
        c = self.cluster
        if self.staleness < 0:
            raise ConfigError(f"staleness: expected 0 or more, got {self.staleness}")
        if self.staleness and (c.kind, c.layout) != ("ray", "disaggregated"):
            raise ConfigError(
                f"staleness={self.staleness} samples while it trains, expected actors with cores of"
                f" their own, got cluster.kind={c.kind} and cluster.layout={c.layout}: write"
                " cluster.kind=ray cluster.layout=disaggregated, or staleness=0"
            )
        if self.staleness and self.refill:
            raise ConfigError(
                f"refill={self.refill} samples again on the weights of the batch, which staleness="
                f"{self.staleness} has left behind: write refill=0 or staleness=0"
            )
        if c.learners > self.prompts_per_iteration:
            raise ConfigError(
                f"cluster.learners: expected at most one for each of {self.prompts_per_iteration}"
                f" prompts of an iteration, got {c.learners}"
            )
        if c.learners > 1 and self.learner.parallel != "ddp":
            raise ConfigError(
                f"learner.parallel: expected ddp, got {self.learner.parallel}: slots of weights are"
                " not sharded in alignment"
            )

    def _check_numbers(self) -> None:
        counts = {
            "iterations": self.iterations,
            "prompts_per_iteration": self.prompts_per_iteration,
            "evaluation.per_prompt": self.evaluation.per_prompt,
            "checkpoints.every": self.checkpoints.every,
            "checkpoints.keep_last": self.checkpoints.keep_last,
        }
        for key, value in counts.items():
            if value < 1:
                raise ConfigError(f"{key}: expected at least 1, got {value}")
        if self.refill < 0:
            raise ConfigError(f"refill: expected 0 rounds or more, got {self.refill}")
        if not 0 <= self.max_failed_share <= 1:
            raise ConfigError(
                f"max_failed_share: expected a share from 0 to 1, got {self.max_failed_share}"
            )
        if not self.advantage_clip > 0:
            raise ConfigError(
                f"advantage_clip: expected a positive number, got {self.advantage_clip}: 5 is usual"
            )
        updates = self.iterations * self.loss.updates_per_rollout
        if 0 < self.learner.total_steps < updates:
            raise ConfigError(
                f"learner.total_steps: expected at least the {updates} updates of {self.iterations}"
                f" iterations, got {self.learner.total_steps}: the rate would stay at its lowest; 0"
                " keeps it constant"
            )
        self.prompts.check_batch(self.prompts_per_iteration)
        protocol = self.protocol()
        protocol.check()
        protocol.sampler.check()

    def check_model(self, prompts: Sequence[Prompt] = ()) -> None:
        """Raise ConfigError for a base that is not there, pictures and grids it cannot give (the
        sizes of `prompts` and of what they edit included), or a loss that is not defined for it.
        """
        base = describe(self.policy.model)
        check_choice(self._choice(own_grid=base.own_grid))
        at = "rollout.height and rollout.width"
        sizes = check_pictures(base, prompts, self.rollout.size, at)
        for sampler in (self.rollout, self.protocol().sampler):
            level = sampler.noise_level if sampler.kernel != "ode" else 0.0
            for size in sizes:
                sigmas = base.family.grid(sampler.steps, size, base.parts)
                build(sigmas, sampler.kernel, level, sampler.window, sampler.trained)

    def resolved(self) -> Config:
        """With the weights of the file in their place. Raises ConfigError."""
        return read_weights(self)

    def judge_weights(self, names: Sequence[str]) -> Mapping[str, Mapping[str, float]]:
        """`weights`, or equal weights of the judges of these names."""
        return or_equal(self.resolved().weights, names)

    def recipe(self) -> Recipe:
        """What the cluster's workers are built from."""
        return Recipe(
            policy=self.policy,
            alignment=AlignmentConfig(
                seed=self.seed,
                train_guidance=self.train_guidance,
                reference_guidance=self.reference_guidance,
                ema=self.ema,
                loss=self.loss,
                learner=self.learner,
                staleness=self.staleness,
            ),
            judges=(*self.judges, *self.watch),
            judge_retries=self.judge_retries,
            statistics=self.monitor.pictures,
            cluster=self.cluster,
        )

    def noisy(self, iteration: int, group: int) -> Noisy:
        """The stochastic steps of a group, and those that are trained."""
        key = self.seed, iteration, group
        window, count = self.windows.at(self.rollout.window, *key), self.loss.trained_steps
        if not count:
            return Noisy(window=window, trained=self.rollout.trained)
        steps = drawn(window, self.rollout.steps, count, self.loss.emphasis, *key)
        return Noisy(window=window, trained=steps)

    def usual_sampler(self) -> Sampler:
        """The rollouts' sampler with a window as groups have, for counting work."""
        window = self.windows.middle(self.rollout.window)
        first = tuple(range(window[0], window[0] + self.loss.trained_steps))
        return replace(self.rollout, window=window, trained=self.rollout.trained or first)

    def protocol(self) -> Protocol:
        """How held-out pictures are made."""
        e = self.evaluation
        sampler = replace(
            self.rollout,
            steps=e.steps,
            kernel="ode",
            window=(0, 0),
            trained=(),
            shared_noise=False,
            guidance=self.rollout.guidance if e.guidance is None else e.guidance,
        )
        settings = tuple(s for s in e.settings if s != "w1" or sampler.guidance > 1) or ("guided",)
        return Protocol(sampler=sampler, per_prompt=e.per_prompt, settings=settings, seed=e.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The iterations of a configuration; see `rlhf.loop.Plan`."""

    config: Config
    prompts: Sequence[Prompt]
    iterations: int
    weights: Mapping[str, Mapping[str, float]]
    required: Sequence[str]
    advantage_clip: float
    max_failed_share: float
    scheme: Scheme
    watch: Sequence[str]
    refill: int
    staleness: int

    @staticmethod
    def of(
        config: Config, prompts: Sequence[Prompt], cards: Sequence[JudgeCard] | None = None
    ) -> Plan:
        """The plan of a configuration, checked against the judges where their cards are known.

        Raises:
            ConfigError: judges of one name, or weights and required judges that name none.
        """
        names = [*config.judges, *config.watch] if cards is None else [c.name for c in cards]
        judges, watch = names[: len(config.judges)], names[len(config.judges) :]
        if cards is not None and len(set(names)) != len(config.judges) + len(config.watch):
            raise ConfigError(
                f"judges and watch: expected each once, got {[*config.judges, *config.watch]} with"
                f" the names {names}"
            )
        weights = config.judge_weights(judges)
        if cards is not None:
            check_judges(config.required, weights, judges, {p.category for p in prompts})
        return Plan(
            config=config,
            prompts=prompts,
            iterations=config.iterations,
            weights=weights,
            required=config.required,
            advantage_clip=config.advantage_clip,
            max_failed_share=config.max_failed_share,
            scheme=config.scheme,
            watch=watch,
            refill=config.refill,
            staleness=config.staleness,
        )

    def request(self, iteration: int) -> Request:
        """The groups of an iteration, a function of (seed, iteration) alone."""
        c = self.config
        chosen = batch_of(
            self.prompts, c.prompts_per_iteration, iteration, c.seed, c.prompts.shares()
        )
        return self._request(iteration, chosen, 0)

    def further(
        self, iteration: int, round: int, sampled: Sequence[GroupRef], flat: Sequence[int]
    ) -> tuple[Request, Sequence[int]]:
        """See `rlhf.batch.Terms`. Prompts of the same sources that the iteration has not had."""
        used = {ref.prompt.id for ref in sampled}
        gone = [sampled[place].prompt for place in flat]
        found = further(self.prompts, gone, used, self.config.seed, iteration, round)
        pairs = [(place, p) for place, p in zip(flat, found, strict=True) if p is not None]
        request = self._request(iteration, tuple(p for _, p in pairs), len(sampled))
        return request, [place for place, _ in pairs]

    def _request(self, iteration: int, prompts: tuple[Prompt, ...], first: int) -> Request:
        c = self.config
        groups = range(first, first + len(prompts))
        return Request(
            iteration=iteration,
            prompts=prompts,
            seeds=seeds_of(c.seed, iteration, len(prompts), c.group_size, first),
            sampler=c.rollout,
            store=c.loss.loss.requires,
            train_guidance=c.train_guidance,
            noisy=tuple(c.noisy(iteration, g) for g in groups),
            first=first,
        )
