"""The same object in several processes, for work that is no alignment run: pictures, timings.

`Pool` builds it once per Ray actor, `Here` once in this process; both have the same two verbs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from rewards.errors import RewardError
from rlhf.cluster.base import threads
from rlhf.errors import ClusterError


@runtime_checkable
class Workers(Protocol):
    """One or more builds of an object."""

    def each(self, method: str, *args: Any) -> list[Any]:
        """Call a method once on every worker, all at the same time."""
        ...

    def map(self, method: str, items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """(item, result) of a method of one argument, in the order in which they are done."""
        ...

    def close(self) -> None: ...


class Here:
    """One worker, this process."""

    def __init__(self, build: Callable[[], Any], count: int = 1) -> None:
        self.count = count
        self.built = build()

    def each(self, method: str, *args: Any) -> list[Any]:
        with threads(self.count):
            return [getattr(self.built, method)(*args)]

    def map(self, method: str, items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        for item in items:
            yield item, self.each(method, item)[0]

    def close(self) -> None:
        pass


class Pool:
    """`workers` Ray actors with `count` threads each. `build` is sent to them, so keep it small.

    `address` joins a running Ray. Waits are bounded by `timeout` seconds.
    """

    def __init__(
        self,
        build: Callable[[], Any],
        workers: int,
        count: int = 1,
        timeout: float = 600.0,
        address: str | None = None,
    ) -> None:
        import ray

        from rlhf.cluster.actors import AnyActor
        from rlhf.cluster.ray import connect

        self._ray, self._timeout = ray, timeout
        self._started = connect(address, workers)
        actor = ray.remote(AnyActor).options(num_cpus=0)
        self._actors = [actor.remote(count) for _ in range(workers)]
        try:
            self._get([a.start.remote(build) for a in self._actors])
        except BaseException:
            self.close()
            raise

    def _get(self, refs: Sequence[Any]) -> list[Any]:
        with self._failures():
            return self._ray.get(list(refs), timeout=self._timeout)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """What a worker raised comes back as itself; a dead or silent one as ClusterError."""
        errors = self._ray.exceptions
        try:
            yield
        except errors.RayTaskError as error:
            known = isinstance(error.cause, RewardError)
            raise (error.cause if known else error.as_instanceof_cause()) from None
        except (errors.GetTimeoutError, errors.RayActorError) as error:
            raise ClusterError(
                f"expected an answer within {self._timeout:.0f} s, got {error}: use fewer workers"
            ) from error

    def each(self, method: str, *args: Any) -> list[Any]:
        return self._get([a.call.remote(method, *args) for a in self._actors])

    def map(self, method: str, items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        todo, idle, running = list(reversed(items)), list(self._actors), {}
        while todo or running:
            while todo and idle:
                item, actor = todo.pop(), idle.pop()
                running[actor.call.remote(method, item)] = (item, actor)
            done, _ = self._ray.wait(list(running), timeout=self._timeout)
            if not done:
                raise ClusterError(f"expected an answer within {self._timeout:.0f} s, got none")
            item, actor = running.pop(done[0])
            idle.append(actor)
            yield item, self._get(done)[0]

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()
