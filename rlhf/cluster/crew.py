"""Actors of one kind that can be replaced, and the calls that wait for one of them.

A call has the same answer from any of them at any time, so it is simply asked again: when its actor
died, lost its node, or did not answer in time. The actor is killed and another hired in its seat;
meanwhile the rest go on. Nothing here runs by itself: `drive` works the crews until something is
done.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef, exceptions

from rewards.errors import RewardError
from rlhf.errors import ClusterError

log = logging.getLogger(__name__)
GONE = (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError)
START = "start"
READY = "__ray_ready__"  # every actor has it


class Lost(Exception):
    """An argument of a call went with the node it lay on."""


def answer(future: ObjectRef, timeout: float = 60.0) -> Any:
    """The answer of a call that has come back: errors of ours as themselves, others with their
    remote traceback.

    Raises:
        RayActorError and the like (GONE): the actor died. Lost: an argument did.
    """
    try:
        return ray.get(future, timeout=timeout)
    except exceptions.ObjectLostError as error:
        raise Lost(str(error)) from error
    except exceptions.RayTaskError as error:
        cause = error.cause
        while isinstance(cause, exceptions.RayTaskError):
            cause = cause.cause  # that of the task whose result was needed
        if isinstance(cause, (exceptions.ObjectLostError, *GONE)):
            raise Lost(str(cause)) from error
        raise (cause if isinstance(cause, RewardError) else error.as_instanceof_cause()) from None


@dataclass(slots=True, kw_only=True)
class Call:
    """A method, its arguments, and what follows.

    `then` gets the answer; of a `kept` call, the handle of what stays in the cluster. `lost` is
    called when an argument is lost, `give_up` with the reason when no actor answered.
    """

    method: str
    args: tuple[Any, ...]
    then: Callable[[Any], None]
    lost: Callable[[], None] | None = None
    give_up: Callable[[str], None] | None = None
    kept: bool = False
    tries: int = 0


@dataclass(slots=True)
class _Task:
    actor: Any
    seat: int
    call: Call
    body: ObjectRef | None
    deadline: float


class Crew:
    """`spawn(seat)` makes an actor; its method `start` is called with `recipe` before any other.

    A call may take `seconds`, a start `patience`; a call is given up after `tries` actors.
    """

    def __init__(
        self,
        what: str,
        spawn: Callable[[int], Any],
        recipe: Any,
        size: int,
        *,
        seconds: float,
        patience: float,
        tries: int = 3,
    ) -> None:
        self.what, self.size, self.tries = what, size, tries
        self._spawn, self._recipe = spawn, recipe
        self._seconds, self._patience = seconds, patience
        self._todo: deque[Call] = deque()
        self._idle: deque[tuple[Any, int]] = deque()  # who has waited longest is next
        self._busy: dict[ObjectRef, _Task] = {}
        self.pids: dict[int, int] = {}  # by seat, of those that have started
        for seat in range(size):
            self._hire(seat)

    @property
    def actors(self) -> list[Any]:
        return [a for a, _ in self._idle] + [t.actor for t in self._busy.values()]

    @property
    def started(self) -> bool:
        """Everyone is at work or ready for it."""
        return not any(t.call.method == START for t in self._busy.values())

    @property
    def futures(self) -> list[ObjectRef]:
        return list(self._busy)

    @property
    def deadline(self) -> float:
        """The first one of the calls that are out."""
        return min((t.deadline for t in self._busy.values()), default=float("inf"))

    def put(self, call: Call, first: bool = False) -> None:
        """Add a call to those that wait, at their end or before them."""
        (self._todo.appendleft if first else self._todo.append)(call)

    def dispatch(self) -> None:
        """Give waiting calls to idle actors. Raises ClusterError if there is none left at all."""
        while self._todo and self._idle:
            actor, seat = self._idle.popleft()
            self._send(actor, seat, self._todo.popleft(), self._seconds)
        if self._todo and not self._busy:
            raise ClusterError(
                f"no {self.what} is left of {self.size}, and none could be started in"
                f" {self._patience:.0f} s: look at the nodes, then continue with --resume"
            )

    def settle(self, future: ObjectRef) -> None:
        """Take in a call that has come back. Raises what it raised."""
        task = self._busy.pop(future)
        call = task.call
        try:
            value = answer(future)
        except GONE as error:
            self._bury(task, str(error).strip().splitlines()[0])
        except Exception as error:
            self._idle.append((task.actor, task.seat))
            if not isinstance(error, Lost) or call.lost is None:
                raise
            call.lost()
        else:
            self._idle.append((task.actor, task.seat))
            call.then(task.body if call.kept else value)

    def expire(self) -> None:
        """Kill actors that are past the deadline of their call."""
        now = time.monotonic()
        for future in [f for f, t in self._busy.items() if t.deadline <= now]:
            task = self._busy.pop(future)
            self._bury(task, f"no answer within {self._limit(task.call):.0f} s", late=True)

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self._todo.clear()
        self._idle.clear()
        self._busy.clear()

    def _limit(self, call: Call) -> float:
        return self._patience if call.method == START else self._seconds

    def _hire(self, seat: int, tries: int = 0) -> None:
        started = functools.partial(self.pids.__setitem__, seat)
        call = Call(method=START, args=(self._recipe,), then=started, tries=tries)
        self._send(self._spawn(seat), seat, call, self._patience)

    def _send(self, actor: Any, seat: int, call: Call, seconds: float) -> None:
        method = getattr(actor, call.method)
        future, body = (
            method.options(num_returns=2).remote(*call.args)
            if call.kept
            else (method.remote(*call.args), None)
        )
        self._busy[future] = _Task(actor, seat, call, body, time.monotonic() + seconds)

    def _bury(self, task: _Task, reason: str, late: bool = False) -> None:
        """Replace the actor of a task, and ask its call again unless that was tried often enough.

        A seat in which no actor starts in time stays empty: there is no room for it.
        """
        ray.kill(task.actor)
        self.pids.pop(task.seat, None)
        call = task.call
        call.tries += 1
        if call.method == START and (late or call.tries >= self.tries):
            log.warning("a %s could not be started: %s", self.what, reason)
            return
        log.warning("a %s is replaced during %s: %s", self.what, call.method, reason)
        self._hire(task.seat, call.tries if call.method == START else 0)
        if call.method in (START, READY):
            return
        self._look_after_idle()
        if call.tries < self.tries:
            self.put(call, first=True)
        elif call.give_up is not None:
            call.give_up(reason)
        else:
            raise ClusterError(
                f"{self.what}: {call.tries} actors in a row were lost over one call, the last one:"
                f" {reason}: look at their logs, then continue with --resume"
            )

    def _look_after_idle(self) -> None:
        """Ask those without work for a sign of life: where one died, others may have, and each
        would cost a call one of its tries.
        """
        while self._idle:
            actor, seat = self._idle.popleft()
            sign = Call(method=READY, args=(), then=lambda _: None)
            self._send(actor, seat, sign, self._seconds)


def drive(
    crews: Sequence[Crew],
    until: Callable[[], bool],
    others: Sequence[ObjectRef] = (),
    seconds: float = 600.0,
) -> None:
    """Work the crews until `until()` and, within `seconds`, all `others` have come back.

    Raises:
        TimeoutError: they did not. ClusterError: a crew is lost, or there is nothing to wait for.
        And what calls and `others` raise.
    """
    waiting, end = list(others), time.monotonic() + seconds
    while waiting or not until():
        for crew in crews:
            crew.dispatch()
        at = {future: crew for crew in crews for future in crew.futures}
        if not waiting and not at:
            raise ClusterError("nothing is under way that the wait could end with")
        limit = min([crew.deadline for crew in crews] + [end] * bool(waiting))
        out = [*waiting, *at]
        ray.wait(out, timeout=max(limit - time.monotonic(), 0), fetch_local=False)
        ready, _ = ray.wait(out, num_returns=len(out), timeout=0, fetch_local=False)  # every one
        for future in ready:
            if future in at:
                at[future].settle(future)
            else:
                waiting.remove(future)
                answer(future)
        for crew in crews:
            crew.expire()
        if waiting and time.monotonic() >= end:
            raise TimeoutError(f"no answer within {seconds:.0f} s")
