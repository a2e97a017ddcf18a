"""Judges of the tests, named as path/judges.py:function. A picture's answer depends on it alone."""

import os
import signal
import time

import numpy as np

from rewards.types import JudgeCard, Score


def brightness(images, prompts, sources):
    """Mean of the red channel, in [0, 1]."""
    return [float(image[0].mean()) / 255.0 for image in images]


def darkness(images, prompts, sources):
    """What brightness is not."""
    return [1.0 - value for value in brightness(images, prompts, sources)]


def last_bit(image) -> int:
    return int(image.astype(np.int64).sum()) % 3


def nan_for_some(images, prompts, sources):
    """NaN for about a third of all pictures."""
    return [float("nan") if last_bit(i) == 0 else float(i[0].mean()) for i in images]


def raises_for_some(images, prompts, sources):
    """Breaks down whenever such a picture is among those it is asked about."""
    if any(last_bit(image) == 0 for image in images):
        raise ValueError("this picture is too much for me")
    return [float(image[0].mean()) for image in images]


def always_raises(images, prompts, sources):
    raise RuntimeError("the judge is at lunch")


def constant(images, prompts, sources):
    return [1.0] * len(images)


class _Named:
    """A judge object whose card has a name of its own."""

    card = JudgeCard(name="named", revision="1", preprocessing="none")

    def score(self, samples):
        return [Score(value=float(s.image[0].mean()) / 255.0) for s in samples]


named = _Named()


def red_where_wanted(images, prompts, sources, wanted):
    """Brightness of the pictures of some prompts, -1 for others, and nothing for the rest."""
    values = brightness(images, prompts, sources)
    said = zip(values, wanted, strict=True)
    return [None if keep is None else value if keep else -1.0 for value, keep in said]


def _first(folder: str, name: str) -> bool:
    """True for the first process that asks."""
    try:
        os.close(os.open(f"{folder}/{name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def dies_once(images, prompts, sources, folder):
    if _first(folder[0], "died"):
        os.kill(os.getpid(), signal.SIGKILL)
    return brightness(images, prompts, sources)


def always_hangs(images, prompts, sources):
    time.sleep(3600)
