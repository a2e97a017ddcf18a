"""What a vision-language judge is asked on each axis, and how parts of fidelity become one number.

The texts are ours, after the definitions of arXiv 2605.10730 and 2606.27608, which print none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rewards.errors import RewardConfigError

PROMPT = "{prompt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubric:
    """A question to a judge: `text` holds "{prompt}" once; `sources`: whether it is shown the
    pictures that an edit started from.

    Raises:
        RewardConfigError: "{prompt}" is missing or there twice.
    """

    axis: str
    text: str
    sources: bool = False

    def __post_init__(self) -> None:
        if self.text.count(PROMPT) != 1:
            raise RewardConfigError(
                f"rubric {self.axis!r}: expected {PROMPT} once, got it"
                f" {self.text.count(PROMPT)} times: say where the prompt goes"
            )


AESTHETICS = Rubric(
    axis="aesthetics",
    text="""How good does this picture look? It was made for the prompt: {prompt}
Look at composition, light and colour, texture and detail, and whether it holds together as one
picture. Do not ask whether it fits the prompt.
1: ugly or broken. 2: clear faults. 3: ordinary. 4: good. 5: outstanding.""",
)
FIDELITY = Rubric(
    axis="fidelity",
    text="""Does this picture show what the prompt asks for? The prompt: {prompt}
Check in this order: is everything there and in the right number; has everything the right colour,
material and other attributes; is everything in the right place; do actions and poses fit. A fault
early in the order weighs more than all that follows. Do not ask whether it is beautiful.
1: the main things are missing. 2: something is missing or miscounted. 3: a wrong attribute.
4: a wrong place or pose. 5: everything fits.""",
)
PORTRAIT = Rubric(
    axis="portrait",
    text="""How well is the person in this picture drawn? It was made for the prompt: {prompt}
Count the fingers of each hand. Look for a distorted face, wrong proportions of the body, and skin
or hair that looks painted or like wax.
1: badly distorted. 2: a plain error of anatomy. 3: unnatural. 4: natural. 5: flawless.""",
)
INSTRUCTION = Rubric(
    axis="instruction",
    sources=True,
    text="""Was the source picture edited as instructed? The instruction: {prompt}
First the core of the instruction: is it done? Then its further wishes: are they met? Last, does
the result hold together? A picture equal to its source has nothing done.
1: nothing done. 2: the core is missing. 3: the core is done in part. 4: small wishes are missing.
5: all done.""",
)
CONSISTENCY = Rubric(
    axis="consistency",
    sources=True,
    text="""Is everything that was not to be changed as in the source picture? The edit: {prompt}
Compare shapes, positions, text, faces and the background outside the edit. Do not ask whether the
edit itself succeeded.
1: another picture. 2: much has changed. 3: something plain has changed. 4: traces of change.
5: all else is as it was.""",
)
RUBRICS: Mapping[str, Rubric] = MappingProxyType(
    {r.axis: r for r in (AESTHETICS, FIDELITY, PORTRAIT, INSTRUCTION, CONSISTENCY)}
)

# criterion -> (weight in the mean, ceiling when it is wholly unmet), in order of priority (ours)
FIDELITY_CRITERIA: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "presence": (4.0, 0.25),
        "attributes": (3.0, 0.5),
        "spatial": (2.0, 0.7),
        "action": (1.0, 0.85),
    }
)


def capped(
    criteria: Mapping[str, float],
    rules: Mapping[str, tuple[float, float]] = FIDELITY_CRITERIA,
) -> float:
    """One number in [0, 1] from criteria c_k in [0, 1]: a weighted mean under ceilings,

        min( sum_k w_k c_k / sum_k w_k,  min_k [ceiling_k + (1 - ceiling_k) c_k] ),

    so a criterion that fails caps the score, the first in the order lowest, whatever the others
    say. Rising in every c_k, without jumps. A criterion that does not apply is left out. Priorities
    after arXiv 2606.27608; the formula and its numbers are ours.

    Raises:
        RewardConfigError: no criterion, an unknown one, or a value outside [0, 1].
    """
    unknown = sorted(set(criteria) - set(rules))
    outside = {k: c for k, c in criteria.items() if not 0.0 <= c <= 1.0 or math.isnan(c)}
    if not criteria or unknown or outside:
        raise RewardConfigError(
            f"expected criteria in [0, 1] among {list(rules)}, got {dict(criteria)}: leave out what"
            " does not apply, and score `na` where nothing does"
        )
    total = sum(rules[k][0] for k in criteria)
    mean = sum(rules[k][0] * c for k, c in criteria.items()) / total
    ceilings = (rules[k][1] + (1.0 - rules[k][1]) * c for k, c in criteria.items())
    return min(mean, *ceilings)
