"""Real servers on free ports, and judges that do what a sample's prompt says."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import contextmanager

import numpy as np

from rewards.scenes import world
from rewards.scenes.render import render
from rewards.server import ServerConfig, listen, make_app, make_server
from rewards.types import JudgeCard, Sample, Score


class Stub:
    """Answers the prompt as a number; "slow" waits for `release`, "raise" raises, "count" is
    answered with the number of samples judged so far.
    """

    def __init__(self, name: str = "stub", revision: str = "1", pause_s: float = 0.0):
        self.card = JudgeCard(name=name, revision=revision, preprocessing="none", high=1e9)
        self.release, self.calls, self.pause_s = threading.Event(), [], pause_s
        self.seen = itertools.count(1)

    def __deepcopy__(self, memo):
        copied = Stub(self.card.name, self.card.revision, self.pause_s)
        copied.release, copied.calls, copied.seen = self.release, self.calls, self.seen
        return copied

    def score(self, samples):
        self.calls.append([s.image.shape[1:] for s in samples])
        time.sleep(self.pause_s)
        return [self._one(sample.prompt) for sample in samples]

    def _one(self, prompt):
        if prompt.startswith("slow"):
            self.release.wait(20)
            return Score(value=1.0)
        if prompt.startswith("raise"):
            raise ValueError("this sample is at fault")
        if prompt.startswith("count"):
            return Score(value=float(next(self.seen)))
        return Score(value=float(prompt), parts={"twice": 2 * float(prompt)}, flags=("seen",))


class Served:
    """A server in a thread; `stop` and `start` are a restart on the same port."""

    def __init__(self, judges, **config):
        self.judges, self.given = judges, config
        self.port = config.pop("port", 0)
        self.start()

    def start(self):
        self.config = ServerConfig(port=self.port, **self.given)
        listener = listen(self.config)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.app = make_app(self.judges, self.config)
        self.server = make_server(self.app, self.config)
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def stop(self, at_once=False):
        self.server.should_exit, self.server.force_exit = True, at_once
        self.thread.join(20)

    def lane(self, name="stub"):
        return self.app.state.desk.lanes[name]


@contextmanager
def served(judges=None, **config):
    server = Served(judges or {"stub": Stub()}, **config)
    try:
        yield server
    finally:
        server.stop()


def ask(*prompts, size=8, **fields):
    """Samples with these prompts."""
    image = np.zeros((3, size, size), np.uint8)
    return [Sample(image=image, prompt=str(p), category="objects", **fields) for p in prompts]


def scenes(count: int) -> list[Sample]:
    """Noisy pictures of all categories at two sizes, edits with their sources."""
    rng, out = np.random.default_rng(0), []
    for i in range(count):
        category, size = ("objects", "portraits", "text", "edits")[i % 4], (64, 96)[i // 4 % 2]
        spec = world.draw(category, i)
        edit = isinstance(spec, world.Edit)
        picture = render(spec.target if edit else spec, size)
        out.append(
            Sample(
                image=np.clip(picture + rng.normal(0, 20, picture.shape), 0, 255).astype(np.uint8),
                prompt=world.terse(spec),
                category=category,
                sources=(render(spec.source, 64),) if edit else (),
                target=world.dump(spec),
                columns={"weight": 0.1, "words": ["é", None, {"deep": True}]},
            )
        )
    return out
