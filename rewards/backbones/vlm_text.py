"""What is said between us and a vision-language judge, as pure functions of text.

The same words are used to train and to ask: request, then, if it is to think first, a rationale and
a new line, then "Score:" and one digit.
"""

from __future__ import annotations

import re
from typing import Any

from rewards.errors import DataError, JudgeError
from rewards.rubric import PROMPT

MARK = "Score:"
_ANSWER = re.compile(r"(?P<rationale>.*)^Score:[ ]?(?P<score>\S+)\s*\Z", flags=re.S | re.M)


def clean(prompt: str) -> str:
    """A prompt that can hold no special token ("<|im_end|>"), so nobody ends the question early."""
    return prompt.replace("<|", "< |")


def question(*, template: str, prompt: str, levels: int, rationale: bool) -> str:
    """The rubric with the prompt in its place, and how to answer."""
    how = "First say in a few sentences what you see. Then write" if rationale else "Write"
    return (
        f"{template.replace(PROMPT, clean(prompt))}\n"
        f"{how} a line with {MARK} and one digit from 1 to {levels}."
    )


def messages(*, sources: int, text: str) -> list[dict[str, Any]]:
    """A conversation of one turn: source pictures, the picture to judge, the question."""
    content: list[dict[str, str]] = []
    for _ in range(sources):
        content += [{"type": "text", "text": "Source picture:\n"}, {"type": "image"}]
        content += [{"type": "text", "text": "\n"}]
    content += [{"type": "text", "text": "Picture to judge:\n"}, {"type": "image"}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": f"\n{text}"}]}]


def lead(rationale: str = "") -> str:
    """What stands between the request and the digit."""
    return f"{rationale.strip()}\n{MARK}" if rationale.strip() else MARK


def answer(*, rationale: str, score: int, levels: int) -> str:
    """An answer to learn from. Raises DataError for a score off the scale, or a rationale that
    names a score or holds a special token.
    """
    if not 1 <= score <= levels or MARK in rationale or "<|" in rationale:
        raise DataError(
            f"expected a score from 1 to {levels} and a rationale without {MARK!r} and special"
            f" tokens, got {score} and {rationale[:80]!r}: leave the example out"
        )
    return f"{lead(rationale)}{score}"


def read_answer(*, reply: str, levels: int) -> tuple[str, int]:
    """A reply -> (rationale, score). Nothing is guessed, rounded or clamped.

    Raises:
        JudgeError: no line with a score at the end, several, or one that is no digit of the scale.
    """
    found = _ANSWER.fullmatch(reply.strip())
    if found is None or MARK in found["rationale"]:
        raise JudgeError(f"expected one {MARK!r} at the end of the reply, got {reply[-80:]!r}")
    if found["score"] not in [str(level) for level in range(1, levels + 1)]:
        raise JudgeError(f"expected a score from 1 to {levels}, got {found['score'][:20]!r}")
    return found["rationale"].strip(), int(found["score"])
