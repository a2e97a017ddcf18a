"""What can go wrong in rewards, named after the boundary that was crossed.

RewardError
    + RewardConfigError (ValueError)   a judge's name, card or setting is wrong
    + JudgeError (RuntimeError)        a judge failed, or returned something that is not a score
        + JudgeBusy                    its queue is full, or it is being stopped: ask again later
    + DataError (ValueError)           judgements of people do not fit the schema, or a split leaks
    + ImageError (ValueError)          pixels have the wrong layout, dtype or size, or a file is no
    picture

A message says what was expected, what was got and what to do. None has arguments of its own but the
message, so each survives pickling between processes.
"""


class RewardError(Exception):
    """Root of what this distribution raises on purpose; `rlhf.errors.AlignError` extends it."""


class RewardConfigError(RewardError, ValueError):
    """A judge was named, described or set up wrongly."""


class JudgeError(RewardError, RuntimeError):
    """A judge failed, or returned something that is not a score."""


class JudgeBusy(JudgeError):
    """A judge takes no more samples for now; asking again later is right."""


class DataError(RewardError, ValueError):
    """Judgements that do not fit the schema, or splits that share prompts or pictures."""


class ImageError(RewardError, ValueError):
    """Pixels of the wrong layout, dtype or size, or a file that is not a picture."""
