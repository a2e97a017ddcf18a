"""One judge behind a bounded queue: batches of one size, a time limit, and no two answers for one
sample.

    submit      takes samples or raises JudgeBusy at once; never waits
    the lane    a thread that collects up to `max_batch` samples of one size, or what has come after
                `max_wait_ms`, and has the judge score them in a second thread
    overrun     a call past `timeout_s` is left behind in its thread. If it was a batch, its samples
                are asked one by one, so that only the slow one fails. A judge is never entered
                twice: while a call is left behind, the next ones go to a copy of the judge.
    again       a sample that is being judged is waited for, one that was judged is answered from
                the cache. Failures are forgotten, so that they are asked anew.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue

from rewards.errors import JudgeBusy, RewardConfigError
from rewards.judge import Judge, run_judge
from rewards.types import Sample, Score, failed
from rewards.wire import digest

LEFT_BEHIND = 4  # calls that may be out at once before a judge is called stuck
Size = tuple[tuple[int, ...], ...]  # shapes of the picture and of its sources


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneConfig:
    """How one judge is asked.

    Raises:
        RewardConfigError: a number below its least.
    """

    max_batch: int = 16  # samples of one call
    max_wait_ms: float = 5.0  # that a sample waits for others of its size
    queue: int = 256  # samples that may wait; more are refused
    timeout_s: float = 60.0  # that one call may take, of a batch or of one sample
    cache: int = 4096  # answers that are remembered

    def __post_init__(self) -> None:
        if min(self.max_batch, self.queue) < 1 or min(self.max_wait_ms, self.cache) < 0:
            raise RewardConfigError(
                "lane: expected max_batch and queue of at least 1, max_wait_ms and cache of at "
                f"least 0, got {self.max_batch}, {self.queue}, {self.max_wait_ms}, {self.cache}"
            )
        if not self.timeout_s > 0:
            raise RewardConfigError(f"lane.timeout_s: expected seconds above 0: {self.timeout_s}")


@dataclass(frozen=True, slots=True)
class _Job:
    key: str
    sample: Sample
    future: Future[Score]
    since: float  # monotonic seconds

    @property
    def size(self) -> Size:
        return tuple(picture.shape for picture in (self.sample.image, *self.sample.sources))


class _Runner(threading.Thread):
    """Runs one judge, one call at a time."""

    def __init__(self, judge: Judge) -> None:
        super().__init__(name=f"judge {judge.card.name}", daemon=True)
        self.judge = judge
        self.calls: SimpleQueue[tuple[list[Sample], Future[list[Score]]] | None] = SimpleQueue()
        self.start()

    def run(self) -> None:
        while (call := self.calls.get()) is not None:
            samples, answer = call
            try:
                answer.set_result(run_judge(self.judge, samples))
            except BaseException as error:  # a judge that calls sys.exit does not end the server
                reason = f"{type(error).__name__}: {error}"
                answer.set_result([failed(reason)] * len(samples))

    def ask(self, samples: list[Sample]) -> Future[list[Score]]:
        answer: Future[list[Score]] = Future()
        self.calls.put((samples, answer))
        return answer


class Lane:
    """See the module docstring. Safe to use from many threads."""

    def __init__(self, judge: Judge, config: LaneConfig) -> None:
        self.card, self.config = judge.card, config
        self.counts: Counter[str] = Counter()  # samples by state, "again" and "refused"; "calls"
        self._judge = judge
        self._changed = threading.Condition()
        self._waiting: dict[Size, deque[_Job]] = {}
        self._open: dict[str, Future[Score]] = {}  # waiting or being judged
        self._known: OrderedDict[str, Score] = OrderedDict()  # the latest used last
        self._closing = False
        self._runner: _Runner | None = None
        self._behind: list[_Runner] = []
        self._most_behind = LEFT_BEHIND
        self._thread = threading.Thread(
            target=self._work, name=f"lane {judge.card.name}", daemon=True
        )
        self._thread.start()

    # --- asking -----------------------------------------------------------------------------------

    def submit(self, samples: Sequence[Sample]) -> list[Future[Score]]:
        """One future per sample, in order. All are taken, or none.

        Raises:
            JudgeBusy: the queue has no room, the judge is stuck, or the lane is closing.
        """
        keys = [digest(self.card, sample) for sample in samples]
        with self._changed:
            fresh = {key for key in keys if key not in self._open and key not in self._known}
            trouble = self.trouble()
            if not trouble and len(fresh) + self.waiting > self.config.queue:
                trouble = (
                    f"{self.waiting} samples are waiting and the queue holds {self.config.queue}"
                )
            if trouble:
                self.counts["refused"] += len(samples)
                raise JudgeBusy(f"judge {self.card.name!r}: {trouble}: ask again later")
            pairs = zip(keys, samples, strict=True)
            futures = [self._take_in(key, sample) for key, sample in pairs]
            self._changed.notify_all()
        return futures

    def _take_in(self, key: str, sample: Sample) -> Future[Score]:
        if key in self._open:
            self.counts["again"] += 1
            return self._open[key]
        future: Future[Score] = Future()
        future.set_running_or_notify_cancel()  # who no longer waits must not cancel it for others
        if key in self._known:
            self.counts["again"] += 1
            self._known.move_to_end(key)
            future.set_result(self._known[key])
            return future
        job = _Job(key, sample, future, time.monotonic())
        self._open[key] = future
        self._waiting.setdefault(job.size, deque()).append(job)
        return future

    @property
    def waiting(self) -> int:
        """Samples in the queue."""
        return sum(map(len, self._waiting.values()))

    def trouble(self) -> str:
        """Why no samples are taken, empty if they are."""
        if self._closing:
            return "the server is stopping"
        if not self._thread.is_alive():
            return "its worker has ended"
        out = sum(runner.is_alive() for runner in self._behind)
        if self._runner is None and out >= self._most_behind:
            return f"{out} calls have not returned"
        return ""

    def close(self, wait_s: float) -> None:
        """Take no more, answer what is there for at most `wait_s` seconds, refuse the rest."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(wait_s)
        with self._changed:
            self._waiting.clear()
            for future in self._open.values():
                future.set_exception(JudgeBusy(f"judge {self.card.name!r}: the server is stopping"))
            self._open.clear()
            self._changed.notify_all()

    # --- answering, in the lane's thread ----------------------------------------------------------

    def _work(self) -> None:
        while batch := self._next():
            scores = self._call([job.sample for job in batch])
            if scores is None and len(batch) > 1:
                for job in batch:
                    self._settle([job], self._call([job.sample]))
            else:
                self._settle(batch, scores)
        if self._runner is not None:
            self._runner.calls.put(None)

    def _next(self) -> list[_Job]:
        """The next batch, the longest waiting first; empty when closed and done."""
        most, patience = self.config.max_batch, self.config.max_wait_ms / 1000
        with self._changed:
            while True:
                now = time.monotonic()
                ready = [
                    jobs
                    for jobs in self._waiting.values()
                    if len(jobs) >= most or self._closing or now - jobs[0].since >= patience
                ]
                if ready:
                    jobs = min(ready, key=lambda jobs: jobs[0].since)
                    batch = [jobs.popleft() for _ in range(min(most, len(jobs)))]
                    self._waiting = {size: jobs for size, jobs in self._waiting.items() if jobs}
                    return batch
                if self._closing:
                    return []
                first = min((jobs[0].since for jobs in self._waiting.values()), default=None)
                self._changed.wait(None if first is None else first + patience - now)

    def _call(self, samples: list[Sample]) -> list[Score] | None:
        """The judge's scores; None if they are not there in time."""
        runner = self._free_runner()
        if runner is None:
            return None
        self.counts["calls"] += 1
        try:
            return runner.ask(samples).result(timeout=self.config.timeout_s)
        except TimeoutError:
            runner.calls.put(None)
            self._behind.append(runner)
            self._runner = None
            return None

    def _free_runner(self) -> _Runner | None:
        self._behind = [runner for runner in self._behind if runner.is_alive()]
        if self._runner is None and len(self._behind) < self._most_behind:
            try:
                judge = copy.deepcopy(self._judge) if self._behind else self._judge
            except Exception:  # the boundary to a judge's code: there can be no copy
                self._most_behind = 1
                return None
            self._runner = _Runner(judge)
        return self._runner

    def _settle(self, batch: Sequence[_Job], scores: Sequence[Score] | None) -> None:
        """Answer who waits, and remember what is no failure."""
        late = failed(f"timeout: no answer within {self.config.timeout_s:g} s")
        with self._changed:
            for job, score in zip(batch, scores or [late] * len(batch), strict=True):
                self.counts[score.state] += 1
                if self._open.pop(job.key, None) is None:  # closed meanwhile
                    continue
                if score.state != "failed":
                    self._known[job.key] = score
                job.future.set_result(score)
            while len(self._known) > self.config.cache:
                self._known.popitem(last=False)
