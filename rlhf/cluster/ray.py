"""The same verbs on Ray actors.

Groups go to whichever rollout worker is free; a finished group is judged at once, so judging
overlaps with sampling. Results depend on seeds and groups alone, not on who computed what, nor how
often: workers and judges that die, hang or lose their node are replaced and their groups asked
again (`crew.py`). A learner holds what nobody else knows: its loss ends the cluster (LearnerLost).
Every wait is bounded. Ray's transport is cloudpickle: run it on a cluster you trust.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import ObjectRef, exceptions

from rewards.types import JudgeCard, Scores, failed
from rlhf.cluster.actors import LearnerActor, RewardActor, RolloutActor
from rlhf.cluster.base import Judged, Recipe, assemble_scores
from rlhf.cluster.crew import GONE, Call, Crew, Lost, answer, drive
from rlhf.cluster.placement import Placement, cpus_of
from rlhf.distributed import Ranks
from rlhf.errors import ClusterError, LearnerLost, StaleRollouts
from rlhf.rollout import Request
from rlhf.types import Advantages, GroupRef, StepReport, Version

TRIES = 3  # that a group may be sampled and lost
CONNECT_SECONDS = 10.0  # for a running Ray to accept a connection


def connect(address: str | None, cpus: int) -> bool:
    """Join a running Ray, or start one here with room for our actors. True if it was started.

    Without `address`, RAY_ADDRESS is joined if it is set, as it is in a job of a cluster.

    Raises:
        ClusterError: nobody is there to be joined.
    """
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    spin = os.environ.get("GOMP_SPINCOUNT", "1000")  # see docs/threads.md
    env = {"env_vars": {"TOKENIZERS_PARALLELISM": "false", "GOMP_SPINCOUNT": spin}}
    if address:
        _join(address, runtime_env=env, **quiet)
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 starves threads that share their cores
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, cpus),
        include_dashboard=False,
        runtime_env=env,
        **quiet,
    )
    return True


def _join(address: str, **settings: Any) -> None:
    """`ray.init`, which alone would ask a port that nobody listens at for many minutes."""
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, **settings)
    except (OSError, RuntimeError, ValueError, exceptions.RayError) as error:
        raise ClusterError(
            f"cluster.address={address}: {error}: write HOST:PORT of a running Ray's head, such as"
            " 10.0.0.1:6379, and if it asks for a token, set RAY_AUTH_MODE=token and"
            " RAY_AUTH_TOKEN"
        ) from error


def shutdown() -> None:
    """Leave Ray, and end it if it was started here."""
    ray.shutdown()


@dataclass(slots=True, kw_only=True)
class _Group:
    """A group that lives in the cluster: how to make it, and what there is of it."""

    ref: GroupRef
    request: ObjectRef
    rollouts: ObjectRef | None = None
    sampled: int = 0  # times
    asks: list[tuple[str, ...] | None]  # judges whose answers are out; None: all of them in one
    judged: Judged


class RayCluster:
    """Rollout, reward and learner actors. Create it inside or outside a running Ray."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, c = recipe, recipe.cluster
        self._started = connect(c.address, cpus_of(c))
        self._groups: dict[str, _Group] = {}
        self._handovers: dict[Version, ObjectRef] = {}
        self._crews: tuple[Crew, ...] = ()
        self._learners: list[Any] = []
        self._place: Placement | None = None
        try:
            self._place = place = Placement(c)
            self._learners = [self._learner(place, rank) for rank in range(c.learners)]
            self.workers = Crew(
                "rollout worker",
                _spawner(RolloutActor, place, "rollout", c.rollout_threads),
                recipe,
                c.rollout_workers,
                seconds=c.timeout_seconds,
                patience=c.timeout_seconds,
            )
            self.judges = Crew(
                "reward worker",
                _spawner(RewardActor, place, "reward", 1),
                recipe,
                c.reward_workers,
                seconds=c.judge_seconds,
                patience=c.timeout_seconds,
                tries=1 + recipe.judge_retries,
            )
            self._crews = (self.workers, self.judges)
            self._cards = self._open()
        except BaseException:
            self.close()
            raise

    def _learner(self, place: Placement, rank: int) -> Any:
        c = self.recipe.cluster
        body = ray.remote(LearnerActor).options(**place.options("learner", rank))
        return body.remote(c.learner_threads, rank, c.learners, c.timeout_seconds)

    def _open(self) -> tuple[JudgeCard, ...]:
        """Start everyone; the cards of the judges."""
        if len(self._learners) > 1:
            host, port = self._ask(self._learners[:1], "address")[0]
            self._ask(self._learners, "join", host, port)
        self._pids = self._ask(self._learners, "start", self.recipe)
        cards: list[tuple[JudgeCard, ...]] = []
        self.judges.put(Call(method="cards", args=(), then=cards.append))
        self._drive(lambda: bool(cards) and all(crew.started for crew in self._crews))
        return cards[0]

    @property
    def processes(self) -> dict[str, list[int]]:
        """Their ids by kind of actor, as each node counts them."""
        crews = {"rollout": self.workers, "reward": self.judges}
        return {k: list(c.pids.values()) for k, c in crews.items()} | {"learner": self._pids}

    # --- waiting ----------------------------------------------------------------------------------

    def _drive(self, until: Callable[[], bool], others: Sequence[ObjectRef] = ()) -> None:
        drive(self._crews, until, others, self.recipe.cluster.timeout_seconds)

    def _ask(self, learners: Sequence[Any], method: str, *args: Any) -> list[Any]:
        """Answers of a method of learners, all at the same time; the crews work on meanwhile.

        Raises:
            LearnerLost: one of them died, or none answered in time. And what the method raises.
        """
        return self._learnt([getattr(a, method).remote(*args) for a in learners], method)

    def _learnt(self, futures: Sequence[ObjectRef], method: str) -> list[Any]:
        try:
            self._drive(lambda: True, futures)
        except Exception as error:
            if not isinstance(error, TimeoutError) and not any(map(_gone, futures)):
                raise
            raise LearnerLost(
                f"learner, {method}: {str(error).strip().splitlines()[0]}: raise"
                " cluster.timeout_seconds if it was at work; continue with --resume"
            ) from error
        return [answer(future) for future in futures]

    # --- the verbs --------------------------------------------------------------------------------

    def cards(self) -> tuple[JudgeCard, ...]:
        return self._cards

    def publish(self, slot: str) -> Version:
        """Workers take the weights with the first group that asks for them."""
        version, handover = self._learners[0].publish.options(num_returns=2).remote(slot)
        found: Version = self._learnt([version], f"hand-over of {slot}")[0]
        used = {group.ref.version for group in self._groups.values()}
        self._handovers = {v: h for v, h in self._handovers.items() if v in used}
        self._handovers[found] = handover
        return found

    def begin(self, request: Request, version: Version) -> None:
        if version not in self._handovers:
            raise StaleRollouts(
                f"expected a version that was published last or is in use, got {version}: publish"
                " before rollout"
            )
        shared = ray.put(request)
        for ref in request.refs(version):
            held = self._groups.get(ref.id)
            if held is None or held.ref.version != version:
                group = _Group(ref=ref, request=shared, asks=[None], judged=Judged(scores={}))
                self._groups[ref.id] = group
                self._sample(group)
        for crew in self._crews:
            crew.dispatch()

    def rollout(self, request: Request, version: Version) -> list[GroupRef]:
        self.begin(request, version)
        refs = request.refs(version)
        self._sampled(refs)
        return refs

    def score(self, refs: Sequence[GroupRef]) -> Scores:
        groups = [self._groups[r.id] for r in refs]
        self._drive(lambda: not any(g.asks for g in groups))
        return assemble_scores(self._cards, [g.judged for g in groups])

    def update(self, refs: Sequence[GroupRef], advantages: Advantages) -> StepReport:
        world = len(self._learners)
        numbers = range(len(refs))
        shares = [Ranks(rank=rank, world=world).share(numbers) for rank in range(world)]
        owner = {i: self._learners[rank] for rank, share in enumerate(shares) for i in share}
        number = {ref.id: i for i, ref in enumerate(refs)}

        def take(group: _Group) -> ObjectRef:
            i = number[group.ref.id]
            return owner[i].take.remote(i, group.rollouts)

        self._using(refs, take)
        return self._ask(self._learners, "update", advantages)[0]

    def pixels(self, refs: Sequence[GroupRef]) -> list[np.ndarray]:
        found = self._using(refs, lambda group: group.rollouts)
        return [rollouts.pixels.numpy() for rollouts in found]

    def release(self, refs: Sequence[GroupRef]) -> None:
        for ref in refs:
            self._groups.pop(ref.id, None)

    def save(
        self, folder: Path, step: int, keep_last: int, keep_best: int, metric: float | None
    ) -> None:
        what = (folder.absolute(), step, keep_last, keep_best, metric)
        self._ask(self._learners, "save", *what)

    def load(self, path: Path) -> int:
        return self._ask(self._learners, "load", path.absolute())[0]

    def export(self, slot: str, folder: Path) -> None:
        self._ask(self._learners[:1], "export", slot, folder.absolute())

    def close(self) -> None:
        """End our actors, and Ray if we started it."""
        self._groups.clear()
        self._handovers.clear()
        for crew in self._crews:
            crew.close()
        for learner in self._learners:
            ray.kill(learner)
        if self._place is not None:
            self._place.remove()
        if self._started:
            shutdown()

    # --- a group's way through the crews ----------------------------------------------------------

    def _sample(self, group: _Group) -> None:
        """Have a group sampled, or sampled again, and judged as far as it is not."""
        group.rollouts, group.sampled = None, group.sampled + 1
        if group.sampled > TRIES:
            raise ClusterError(
                f"group {group.ref.id} was sampled {TRIES} times and lost each time: look at the"
                " nodes, then continue with --resume"
            )

        def then(body: ObjectRef) -> None:
            group.rollouts = body
            for names in group.asks:
                self._judge(group, names, body)

        def lost() -> None:
            raise LearnerLost(
                "the weights that rollouts ask for went with the learner's node; continue with"
                " --resume"
            )

        args = (group.ref, group.request, [self._handovers[group.ref.version]])
        self.workers.put(Call(method="rollout", args=args, then=then, lost=lost, kept=True))

    def _judge(self, group: _Group, names: tuple[str, ...] | None, body: ObjectRef) -> None:
        """Have a group judged: by everyone in one call, and where that was tried often enough, once
        by each alone, so that only the judges at fault fail.
        """
        alone = [(card.name,) for card in self._cards]

        def then(judged: Judged) -> None:
            if names in group.asks:
                group.asks.remove(names)
                group.judged = Judged(
                    scores={**group.judged.scores, **judged.scores},
                    figures={**group.judged.figures, **judged.figures},
                    seconds={**group.judged.seconds, **judged.seconds},
                )

        def lost() -> None:
            if group.rollouts is body:
                self._sample(group)

        def give_up(reason: str) -> None:
            if names is None and len(alone) > 1:
                group.asks = [*alone]
                for one in alone:
                    self._judge(group, one, body)
            else:
                answers = (failed(f"its process: {reason}"),) * len(group.ref.seeds)
                then(Judged(scores={name: answers for name in names or alone[0]}))

        tries = 0 if names is None else self.judges.tries - 1
        self.judges.put(
            Call(
                method="score",
                args=(body, names),
                then=then,
                lost=lost,
                give_up=give_up,
                tries=tries,
            )
        )

    def _sampled(self, refs: Sequence[GroupRef]) -> None:
        groups = [self._groups[r.id] for r in refs]
        self._drive(lambda: all(g.rollouts is not None for g in groups))

    def _using(self, refs: Sequence[GroupRef], send: Callable[[_Group], Any]) -> list[Any]:
        """Answers to what `send` asks of each group. Those that a node took along are sampled
        again, with the same seeds and so the same outcome.
        """
        answers: dict[str, Any] = {}
        while left := [ref for ref in refs if ref.id not in answers]:
            self._sampled(left)
            sent = {ref.id: send(self._groups[ref.id]) for ref in left}
            for id, future in sent.items():
                try:
                    answers[id] = self._learnt([future], "groups")[0]
                except Lost:
                    self._sample(self._groups[id])
        return [answers[ref.id] for ref in refs]


def _gone(future: ObjectRef) -> bool:
    """Whether the actor that was asked has died. Another one may have noticed before Ray did."""
    try:
        answer(future, timeout=5.0)
    except GONE:
        return True
    except Exception:  # what else it raised is known
        return False
    return False


def _spawner(body: type, place: Placement, kind: Any, threads: int) -> Callable[[int], Any]:
    """A function of the seat that makes an actor there."""
    return lambda seat: ray.remote(body).options(**place.options(kind, seat)).remote(threads)
