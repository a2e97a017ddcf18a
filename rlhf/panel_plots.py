"""Plots of what judges say of a run, category by category: before and after, over the training
pictures, and on the held-out prompts.

A judge either trains or watches; what watches, and the oracle unless it trains, is what a claim may
stand on. Categories have one colour in all figures, settings of the evaluation one dash.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.plots import (
    AFTER,
    BEFORE,
    COLOURS,
    DASHES,
    INK,
    MUTED,
    Row,
    grid,
    line,
    names,
    note,
    series,
    title,
)

Metrics = Mapping[str, Mapping[str, float | int]]
ORACLE = "oracle/fidelity"  # whose held-out figures are called strict and soft
MEASURES = {"strict": "strictly right", "soft": "how right"}
SETTINGS = {"": "guided", "/w1": "unguided", "/steps4": "unguided, 4 steps"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """The judges of a run by what they do."""

    trains: tuple[str, ...] = ()
    watches: tuple[str, ...] = ()

    @staticmethod
    def of(rows: Sequence[Row]) -> Panel:
        """The judges that rows of metrics speak of."""
        found = {
            kind: dict.fromkeys(m.group(1) for m in names(rows, f"{kind}/(.+)/(?:mean|failed)"))
            for kind in ("reward", "watch")
        }
        return Panel(trains=tuple(found["reward"]), watches=tuple(found["watch"]))

    def judge(self, measure: str) -> str:
        """The judge behind a held-out measure."""
        return ORACLE if measure in MEASURES else measure

    def label(self, measure: str) -> str:
        """A measure or judge as a reader should see it."""
        judge = self.judge(measure)
        role = "trains" if judge in self.trains else "watches" if judge in self.watches else ""
        if measure in MEASURES:
            return f"{MEASURES[measure]} ({', '.join(filter(None, ('oracle', role)))})"
        short = Path(measure).name if ".py:" in measure else measure
        return f"{short} ({role})" if role else short

    def order(self, measure: str) -> tuple[bool, int]:
        """Truth first, then witnesses, then what trained."""
        known = [*MEASURES, *self.watches, *self.trains]
        return measure not in MEASURES, known.index(measure) if measure in known else len(known)


@dataclass(frozen=True, slots=True)
class Held:
    """`heldout/<category>/<measure><setting>` taken apart."""

    name: str
    category: str
    measure: str
    setting: str

    @staticmethod
    def of(name: str, panel: Panel) -> Held | None:
        """None where `name` is no held-out figure of the oracle or of a judge of the panel."""
        judges = "|".join(map(re.escape, sorted({*panel.trains, *panel.watches}, key=len)[::-1]))
        found = re.fullmatch(rf"heldout/(.+?)/(strict|soft|{judges or 'soft'})(/w1|/steps4|)", name)
        return Held(name, *found.groups()) if found else None


def categories(rows: Sequence[Row]) -> list[str]:
    """The categories of the training prompts, sorted."""
    return sorted({m.group(1) for m in names(rows, r"(?:reward|watch)/.+/mean/(.+)")})


def _colour(category: str, every: Sequence[str]) -> str:
    return COLOURS[sorted(every).index(category) % len(COLOURS)]


def shared_legend(figure: Figure, axes: Sequence[Axes], columns: int = 4) -> None:
    """One legend for all panels, above them."""
    entries = {
        text: handle
        for ax in axes
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if len(entries) > 1:
        where = {"loc": "outside upper left", "ncols": columns, "frameon": False}
        figure.legend(
            entries.values(), entries, fontsize=8, labelcolor=MUTED, handlelength=2.8, **where
        )


# --- before and after -----------------------------------------------------------------------------


def gains(metrics: Metrics, panel: Panel) -> Figure | None:
    """Bars before and after for each metric that has both, a panel for each category and setting;
    the whisker: the gain's 95% interval.
    """
    pairs = {name: metric for name, metric in metrics.items() if "after" in metric}
    if not pairs:
        return None
    held = [h for name in pairs if (h := Held.of(name, panel))]
    settings = [s for s in SETTINGS if any(h.setting == s for h in held)]
    groups: dict[str, list[tuple[str, str, bool]]] = {}  # title -> metric, label, trained on
    for category in sorted({h.category for h in held}):
        for setting in settings:
            own = [h for h in held if (h.category, h.setting) == (category, setting)]
            text = f"{category}, {SETTINGS[setting]}" if len(settings) > 1 else category
            groups[text] = [
                (h.name, panel.label(h.measure), panel.judge(h.measure) in panel.trains)
                for h in sorted(own, key=lambda h: panel.order(h.measure))
            ]
    rest = [(name, name, False) for name in pairs if name not in {h.name for h in held}]
    groups |= {"": rest} if rest else {}
    most = max(map(len, groups.values()))
    figure, axes = grid(len(groups), max(len(settings), 1), 0.6 + 0.5 * most)
    both = {trained for lines in groups.values() for _, _, trained in lines} == {True, False}
    for ax, (text, lines) in zip(axes, groups.items(), strict=True):
        _bars(ax, [(pairs[name], label, trained and both) for name, label, trained in lines])
        ax.set_ylim(most - 0.4, -0.6)
        title(ax, text)
    left, right = min(ax.dataLim.x0 for ax in axes), max(ax.dataLim.x1 for ax in axes)
    for position, ax in enumerate(axes):
        ax.set_xlim(min(left, 0.0), right + 0.5 * (right - min(left, 0.0)))
        if len(settings) > 1 and position % len(settings) and position < len(held):
            ax.set_yticklabels([])
    shared_legend(figure, axes)
    return figure


def _bars(ax: Axes, lines: Sequence[tuple[Mapping[str, float | int], str, bool]]) -> None:
    """Two bars for each metric; those of a judge that trains in a colour of their own."""
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    ax.set_xticks([])
    for position, (metric, _, trained) in enumerate(lines):
        before, after = metric["before"], metric["after"]
        says = "after, by a judge that trains" if trained else "after"
        ax.barh(position - 0.19, before, 0.34, color=BEFORE, label="before")
        ax.barh(position + 0.19, after, 0.34, color=COLOURS[1] if trained else AFTER, label=says)
        end = after
        if "low" in metric:
            low, high = before + metric["low"], before + metric["high"]
            ax.plot([low, high], [position + 0.19] * 2, color=INK, lw=1.2, marker="|", ms=6)
            end = max(after, high)
        note(ax, f"{before:.3g}", max(before, 0), position - 0.19)
        note(ax, f"{after:.3g}  ({metric['gain']:+.3f})", max(end, 0), position + 0.19)
    ax.set_yticks(range(len(lines)), [label for _, label, _ in lines], fontsize=8.5, color=INK)
    ax.axvline(0, color=MUTED, lw=0.8)


# --- training pictures ----------------------------------------------------------------------------


def rewards(rows: Sequence[Row]) -> Figure | None:
    """The total, then every judge's mean, those first that have no say. A line for each category;
    where there is one category, one standard deviation of the scores around it.
    """
    panel, kinds = Panel.of(rows), categories(rows)
    stems = {"total": "reward/total"} if len(series(rows, "reward/total")[0]) else {}
    for kind, judges in (("watch", panel.watches), ("reward", panel.trains)):
        said = [judge for judge in judges if len(series(rows, f"{kind}/{judge}/mean")[0])]
        stems |= {panel.label(judge): f"{kind}/{judge}/mean" for judge in said}
    if not stems:
        return None
    figure, axes = grid(len(stems), 2 if len(stems) in (2, 4) else 3, 2.3)
    for ax, (text, stem) in zip(axes, stems.items(), strict=True):
        if len(kinds) < 2:
            _band(ax, rows, stem)
        for kind in kinds if len(kinds) > 1 else ():
            own = series(rows, f"{stem}/{kind}")
            if len(own[0]):
                line(ax, own, _colour(kind, kinds), kind)
        title(ax, "weighted total" if text == "total" else text)
    shared_legend(figure, axes)
    return figure


def _band(ax: Axes, rows: Sequence[Row], stem: str) -> None:
    line(ax, series(rows, stem), INK if stem == "reward/total" else COLOURS[0])
    names = (stem, f"{stem.removesuffix('mean')}std")
    both = [row for row in rows if None not in (row.get(names[0]), row.get(names[1]))]
    (steps, mean), (_, std) = (series(both, name) for name in names)
    ax.fill_between(steps, mean - std, mean + std, color=COLOURS[0], alpha=0.12, lw=0)


# --- held-out prompts -----------------------------------------------------------------------------


def heldout(rows: Sequence[Row], panel: Panel) -> Figure | None:
    """Held-out figures: a panel per measure, a colour per category, a dash per setting."""
    every = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    held = [h for name in every if (h := Held.of(name, panel))]
    held.sort(key=lambda h: (h.category, h.setting))
    if not held:
        return None
    measures = sorted({h.measure for h in held}, key=panel.order)
    kinds, settings = sorted({h.category for h in held}), sorted({h.setting for h in held})
    figure, axes = grid(len(measures), 2 if len(measures) in (2, 4) else 3, 2.6)
    for ax, measure in zip(axes, measures, strict=True):
        for h in (h for h in held if h.measure == measure):
            dash = DASHES[settings.index(h.setting) % len(DASHES)]
            said = f"{h.category}, {SETTINGS[h.setting]}" if len(settings) > 1 else h.category
            line(ax, series(rows, h.name), _colour(h.category, kinds), said, dash)
        title(ax, panel.label(measure))
        ax.set_xlabel("iteration", fontsize=8, color=MUTED)
    shared_legend(figure, axes, len(kinds))
    return figure


def headline(name: str, panel: Panel) -> str:
    """A metric's name in words, if it is a held-out figure."""
    held = Held.of(name, panel)
    if held is None:
        return name
    return f"{held.category}, {SETTINGS[held.setting]}: {panel.label(held.measure)}"


def held_table(metrics: Metrics, panel: Panel) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Gains with their 95% intervals: setting -> head and lines of a table with a line per measure
    and a column per category.
    """
    held = [h for name, m in metrics.items() if "after" in m and (h := Held.of(name, panel))]
    kinds = sorted({h.category for h in held})
    out = {}
    for setting in (s for s in SETTINGS if any(h.setting == s for h in held)):
        own = {(h.measure, h.category): metrics[h.name] for h in held if h.setting == setting}
        measures = sorted({measure for measure, _ in own}, key=panel.order)
        lines = [
            [panel.label(measure), *(_cell(own.get((measure, kind))) for kind in kinds)]
            for measure in measures
        ]
        out[SETTINGS[setting]] = (["", *kinds], lines)
    return out


def _cell(metric: Mapping[str, float | int] | None) -> str:
    if metric is None:
        return ""
    text = f"{metric['gain']:+.3f}"
    return text + (f" [{metric['low']:+.3f}, {metric['high']:+.3f}]" if "low" in metric else "")


# --- who judges -----------------------------------------------------------------------------------


def judges_table(
    rows: Sequence[Row], weights: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Head and a line per judge: its weight in each category, the share of its scores that failed
    or did not apply, and the seconds it worked in an iteration. No lines without rows of a run.
    """
    panel, kinds = Panel.of(rows), categories(rows)
    lines = []
    for judge in (*panel.trains, *panel.watches):
        says = [_weight(judge, panel, weights, kind) for kind in kinds]
        stem = f"{'watch' if judge in panel.watches else 'reward'}/{judge}"
        failed, na = (series(rows, f"{stem}/{state}")[1] for state in ("failed", "na"))
        worked = series(rows, f"seconds/judge/{judge}")[1]
        shares = [f"{values.mean():.1%}" if len(values) else "" for values in (failed, na)]
        seconds = f"{np.median(worked):.3f}" if len(worked) else ""
        lines.append([panel.label(judge), *says, *shares, seconds])
    return ["judge", *kinds, "failed", "not applicable", "s per iteration"], lines


def _weight(
    judge: str, panel: Panel, weights: Mapping[str, Mapping[str, float]], category: str
) -> str:
    """A judge's share of the weights of a category; equal ones where none were written."""
    if judge in panel.watches:
        return "–"
    row = weights.get(category, weights.get("*", {})) if weights else dict.fromkeys(panel.trains, 1)
    total = sum(row.values())
    return f"{row[judge] / total:.2f}" if row.get(judge) else ""


def dropped(rows: Sequence[Row]) -> str:
    """Groups of training pictures that taught nothing, by category and reason; "" for none."""
    found = {
        m.group(1): int(series(rows, m.group(0))[1].sum())
        for m in names(rows, "advantage/dropped/(.+)")
    }
    return ", ".join(f"{name.replace('/', ': ')} {count}" for name, count in found.items())
