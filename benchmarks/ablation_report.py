"""Table and figure of benchmarks/ablations.py, from the results that are there.

Intervals are 95% and have two parts, added in quadrature: the bootstrap over held-out prompts or
pictures (paired between arms), and t s sqrt(1/n + 1/m) over seeds, where s is the spread between
seeds of one arm, pooled over the arms that have two. An arm of one seed gets its s from the others.
A difference whose interval holds 0 is not resolved.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import t as student

from rlhf import plots
from rlhf.errors import ConfigError
from rlhf.files import atomic_write_text
from rlhf.stats import Estimate, bootstrap_gain, bootstrap_mean

Result = Mapping[str, Any]
Arms = Mapping[str, Sequence[Result]]  # results by arm, one for each seed
MEASURES = ("psnr", "ssim", "psnr128", "kept", "soft", "flow", "peak", "peak_ratio")
AS_REPORTED, AGAINST, UNRESOLVED = "as reported", "contradicts the report", "no difference resolved"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`base`, the published choice, against the arms in `claims`: arm -> measure -> the sign that
    the difference (arm minus base) has if the reports are right and there is one.
    """

    name: str
    base: str
    claims: Mapping[str, Mapping[str, int]]


CODEC = {"psnr": -1}  # the published choice keeps more
LATENTS = {"soft": -1, "flow": 1}  # the published choice is easier to generate
QUESTIONS = (  # arXiv:2605.13565, but for the block, which is arXiv:2605.10730
    Question(
        name="shortcut (global)",
        base="reference",
        claims={"shortcut-none": CODEC, "shortcut-per-level": CODEC},
    ),
    Question(
        name="alignment (loosened)",
        base="reference",
        claims={"align-off": LATENTS, "align-constant": {}},
    ),
    Question(name="KL (none)", base="reference", claims={"kl": CODEC | LATENTS}),
    Question(name="discriminator (none)", base="reference", claims={"gan": CODEC}),
    Question(name="curriculum (small first)", base="reference", claims={"direct": {}}),
    Question(
        name="block (SwiGLU, scale only)",
        base="block-swiglu",
        claims={"block-gelu": {"peak": 1, "peak_ratio": 1}},
    ),
)


@dataclass(frozen=True, slots=True)
class Interval:
    """A value or difference and the ends of its 95% interval; `freedom` of its part over seeds, 0
    where there was nothing to read that from.
    """

    value: float
    low: float
    high: float
    freedom: int = 0

    @property
    def resolved(self) -> bool:
        return self.freedom > 0 and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def read(path: Path) -> dict[str, Any] | None:
    """A result, None if there is none. Raises ConfigError if it is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"expected JSON in {path}, got {error}: remove the file") from error


def load(folder: Path) -> Arms:
    """All results of a folder by arm, in the order of their seeds."""
    found: dict[str, list[Result]] = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.json")):
        result = read(path)
        assert result is not None
        found[result["arm"]].append(result)
    return found


def estimate(values: np.ndarray) -> dict[str, float | int]:
    """Mean of one run with its interval over prompts, in the form of `result.json`."""
    return bootstrap_mean(values).as_metric()


def spread(arms: Arms, measure: str, alike: str) -> tuple[float, int]:
    """Standard deviation between seeds of one arm, and its degrees of freedom, pooled over arms
    whose codec was trained, or not, as that of arm `alike` was.
    """
    total, freedom = 0.0, 0
    own = arms[alike][0]["configs"]["vae"] is None
    for results in arms.values():
        rows = rows_of(results, measure)
        means = np.empty(0) if rows is None else rows.mean(1)
        if len(means) > 1 and (results[0]["configs"]["vae"] is None) == own:
            total += float(np.sum((means - means.mean()) ** 2))
            freedom += len(means) - 1
    return (total / freedom) ** 0.5 if freedom else 0.0, freedom


def rows_of(results: Sequence[Result], measure: str) -> np.ndarray | None:
    """(seed, prompt) values, None where the arm was not measured so."""
    rows = [r["values"][measure] for r in results if measure in r["values"]]
    return np.array(rows) if rows else None


def _widened(
    found: Estimate, arms: Arms, measure: str, alike: str, counts: Sequence[int]
) -> Interval:
    """An interval over prompts with its part over seeds added, for runs of `counts` seeds."""
    s, freedom = spread(arms, measure, alike)
    quantile = float(student.ppf(0.975, freedom)) if freedom else 0.0
    over_seeds = quantile * s * sum(1 / n for n in counts) ** 0.5
    half = float(np.hypot((found.high - found.low) / 2, over_seeds))
    return Interval(found.value, found.value - half, found.value + half, freedom)


def level(arms: Arms, arm: str, measure: str) -> Interval | None:
    """Mean of an arm over seeds and prompts."""
    rows = rows_of(arms.get(arm, ()), measure)
    if rows is None:
        return None
    return _widened(bootstrap_mean(rows.mean(0)), arms, measure, arm, [len(rows)])


def difference(arms: Arms, base: str, arm: str, measure: str) -> Interval | None:
    """`arm` minus `base`, None unless both were measured so."""
    before, after = (rows_of(arms.get(name, ()), measure) for name in (base, arm))
    if before is None or after is None:
        return None
    gain = bootstrap_gain(before.mean(0), after.mean(0))
    return _widened(gain, arms, measure, arm, [len(before), len(after)])


def verdict(gap: Interval, claim: int | None) -> str:
    """What a difference says of a claimed sign (None: nothing was claimed)."""
    if not gap.freedom:
        return "one seed, not judged"
    if not gap.resolved:
        return UNRESOLVED
    if claim is None:
        return "resolved, nothing was reported"
    return AS_REPORTED if np.sign(gap.value) == claim else AGAINST


def table(arms: Arms) -> str:
    """Markdown, a line for each question, arm and measure."""
    lines = ["| question (base) | arm | seeds | measure | base | arm minus base | |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for question in QUESTIONS:
        for arm, claims in question.claims.items():
            for measure in MEASURES:
                gap = difference(arms, question.base, arm, measure)
                if gap is None:
                    continue
                said = verdict(gap, claims.get(measure))
                base, seeds = level(arms, question.base, measure), len(arms[arm])
                cells = (question.name, arm, seeds, measure, base, gap, said)
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def draw(arms: Arms) -> Figure | None:
    """Differences by measure, reconstruction over steps, activations by block."""
    pairs = [(q.base, arm) for q in QUESTIONS for arm in q.claims]
    gaps = {
        m: {a: g for base, a in pairs if (g := difference(arms, base, a, m)) is not None}
        for m in MEASURES
    }
    gaps = {measure: found for measure, found in gaps.items() if found}
    if not gaps:
        return None
    figure, axes = plots.grid(len(gaps) + 2, 2, 2.4)
    for ax, (measure, found) in zip(axes, gaps.items(), strict=False):
        for position, gap in enumerate(found.values()):
            colour = plots.COLOURS[1] if gap.resolved else plots.MUTED
            ax.plot([gap.low, gap.high], [position] * 2, color=colour, lw=1.6)
            ax.plot(gap.value, position, "o", color=colour, ms=5)
        ax.axvline(0, color=plots.MUTED, lw=0.8)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
        ax.set_yticks(range(len(found)), list(found), fontsize=8)
        ax.invert_yaxis()
        ax.margins(y=0.2)
        plots.title(ax, f"{measure}: difference from the base")
    _lines(axes[-2], arms, "PSNR on held-out pictures by step", _curve)
    _lines(axes[-1], arms, "largest |activation| by block", _blocks)
    return figure


def _curve(result: Result) -> list[tuple[float, float]]:
    return [tuple(point) for point in result.get("curve", [])]


def _blocks(result: Result) -> list[tuple[float, float]]:
    blocks = result["blocks"]["largest"] if result["arm"].startswith("block-") else []
    return list(enumerate(blocks))


def _lines(ax: Any, arms: Arms, text: str, points: Any) -> None:
    """A line for each run, a colour for each arm."""
    drawn = [name for name, results in arms.items() if any(points(r) for r in results)]
    for colour, name in enumerate(drawn):
        for number, result in enumerate(arms[name]):
            x, y = np.array(points(result)).T
            ax.plot(
                x,
                y,
                color=plots.COLOURS[colour % len(plots.COLOURS)],
                lw=1.3,
                label=name * (number == 0),
            )
    plots.title(ax, text)
    plots.legend(ax)


def write(folder: Path) -> str:
    """`table.md` in the folder and a figure beside it, `<folder>.png`; returns the table."""
    arms = load(folder)
    text = table(arms)
    atomic_write_text(folder / "table.md", text)
    figure = draw(arms)
    if figure is not None:
        figure.savefig(folder.with_suffix(".png"), dpi=150)
    return text


def fill(page: Path, text: str) -> None:
    """Replace what stands between the marks `<!-- table -->` and `<!-- /table -->` of a page."""
    start, end = "<!-- table -->\n", "<!-- /table -->"
    head, _, rest = page.read_text(encoding="utf-8").partition(start)
    atomic_write_text(page, head + start + text + end + rest.partition(end)[2])
