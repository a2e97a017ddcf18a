"""What a transformer does on held-out examples of a stage, with the same noise every time."""

from __future__ import annotations

from dataclasses import replace

from pipelines.data.loader import Batches, Draws
from pipelines.data.stages import Span
from rlhf.flow import Batch, loss_by_level
from rlhf.models.health import activation_maxima

EXAMPLES, BATCHES = 256, 8
LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # edges of the bins of sigma


class Held:
    """The loss by noise level and the largest activation of each block."""

    def __init__(self, draws: Draws, batches: Batches) -> None:
        self.draws, self.batches = draws, batches
        self._open: tuple[int, list[Batch]] | None = None

    def figures(self, span: Span, slot: str) -> dict[str, float]:
        """`heldout/flow` is the mean of its bins, `heldout/flow/sigma<middle>`; and
        `activation/block<i>`, of `BATCHES` batches under the weights of `slot`.
        """
        policy = self.batches.encoder.policy
        if self._open is None or self._open[0] != span.number:
            draws = self.draws.held(span.number, EXAMPLES)
            noising = replace(self.batches.noising, dropout=0.0)
            make = Batches(draws, self.batches.encoder, noising)
            with self.batches.encoder.lock:
                self._open = span.number, [make(draws(step)) for step in range(1, BATCHES + 1)]
        with activation_maxima(policy.transformer) as maxima:
            levels = loss_by_level(policy, self._open[1], LEVELS, slot)
        out = {"heldout/flow": sum(levels.values()) / len(levels)}
        out |= {f"heldout/flow/sigma{level:g}": value for level, value in levels.items()}
        return out | {f"activation/block{i}": value for i, value in maxima.largest.items()}
