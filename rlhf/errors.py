"""What can go wrong in rlhf, named after the boundary that was crossed.

RewardError (rewards.errors)
    + AlignError
        + ConfigError (ValueError)        a file or flag is wrong
        + PromptError (ValueError)        a prompt set is wrong
        + DataError (ValueError)          a data set cannot be read, or too much of it is broken
        + CheckpointError (RuntimeError)  a checkpoint could not be written or read
        + StaleRollouts (ValueError)      rollouts and learner disagree on the policy version
        + HandoverError (RuntimeError)    published weights are not the learner's weights
        + ReplayMismatch (RuntimeError)   training does not reproduce the rollout's log-probs
        + ClusterError (RuntimeError)     a worker died or did not answer in time
            + LearnerLost                 a learner died, and what it had learnt since a checkpoint
        + TooManyFailures (RuntimeError)  judges failed for more samples than the run allows
        + RewardHacked (RuntimeError)     an alarm of the monitor stopped the run
        + Interrupted (RuntimeError)      a signal stopped the run; it can be resumed

A message says what was expected, what was got and what to do. None has arguments of its own but the
message, so each survives pickling between processes.
"""

from rewards.errors import RewardError


class AlignError(RewardError):
    """Root of what rlhf raises on purpose."""


class ConfigError(AlignError, ValueError):
    """A configuration file, an override or a command-line flag is wrong."""


class PromptError(AlignError, ValueError):
    """A prompt set misses a column, is empty, or a row cannot be used."""


class DataError(AlignError, ValueError):
    """A data set cannot be read, has changed under a run, or too much of it is broken."""


class CheckpointError(AlignError, RuntimeError):
    """A checkpoint is missing, damaged, or could not be written."""


class StaleRollouts(AlignError, ValueError):
    """Rollouts come from another policy version than the one being trained."""


class HandoverError(AlignError, RuntimeError):
    """Weights bound by a rollout worker differ from the slot that was published."""


class ReplayMismatch(AlignError, RuntimeError):
    """Replaying a rollout before the first update gave other log-probs than were stored."""


class ClusterError(AlignError, RuntimeError):
    """A worker died, or nothing came back within the time the cluster allows."""


class LearnerLost(ClusterError):
    """A learner died or hung: what it learnt since the last checkpoint went with it."""


class TooManyFailures(AlignError, RuntimeError):
    """The share of failed judge calls passed the limit of the run."""


class RewardHacked(AlignError, RuntimeError):
    """The monitor saw the reward being hacked and stopped the run after a checkpoint."""


class Interrupted(AlignError, RuntimeError):
    """A signal stopped the run, if it could after a checkpoint; `--resume RUN` continues it."""
