"""Numbered, independent pieces of work through Ray Data.

Its actor pool starts workers as there is room for them, on any node, and replaces those that die;
what they were at is done again. Results are to lie on storage that all nodes see, or be small.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from rewards.errors import RewardError
from rlhf.errors import ClusterError


def flow(
    build: Callable[[], Any],
    method: str,
    numbers: Sequence[int],
    *,
    workers: int,
    threads: int = 1,
    timeout: float = 3600.0,
    address: str | None = None,
) -> Iterator[tuple[int, Any]]:
    """(number, result) of a method of what `build` makes, in the order in which they are done.

    At most `workers` processes of `threads` threads each build it once. `address` joins a running
    Ray. The method's own RewardError (and so every error of ours) comes back as it is.

    Raises:
        ClusterError: no progress for `timeout` seconds, or the method raised an error not ours.
    """
    import ray.data

    from rlhf.cluster.ray import connect

    started = connect(address, workers)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = timeout
        pieces = ray.data.from_items(
            [{"number": n} for n in numbers], override_num_blocks=len(numbers)
        )
        done = pieces.map(
            cast(Any, _Worker),
            fn_constructor_kwargs={"build": build, "method": method, "threads": threads},
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
            num_cpus=1,
        )
        for row in _rows(done, timeout):
            number, (result, error) = int(row["number"]), pickle.loads(row["answer"])
            if error is not None:
                raise error
            yield number, result
    finally:
        if started:
            ray.shutdown()


def _rows(done: Any, timeout: float) -> Iterator[dict[str, Any]]:
    from ray.data.exceptions import ExecutionTimeoutError

    rows = iter(done.iter_rows())
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except ExecutionTimeoutError as error:
            raise ClusterError(
                f"expected a result within {timeout:.0f} s, got none: a piece hangs, kills every"
                " worker that tries it, or takes longer; then raise timeout_seconds"
            ) from error
        except Exception as error:
            raise ClusterError(f"a worker failed: {error}") from error
        yield row


class _Worker:
    """In a process of its own."""

    def __init__(self, build: Callable[[], Any], method: str, threads: int) -> None:
        from rewards.compat import ensure_torchvision

        ensure_torchvision()
        import torch

        torch.set_num_threads(threads)
        self.build, self.method = build, method
        self.built: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from ray import cloudpickle

        number = int(row["number"])
        return {"number": number, "answer": cloudpickle.dumps(self._answer(number))}

    def _answer(self, number: int) -> tuple[Any, RewardError | None]:
        """Our own errors are an answer: they are not retried."""
        try:
            if self.built is None:
                self.built = self.build()
            return getattr(self.built, self.method)(number), None
        except RewardError as error:
            return None, error
