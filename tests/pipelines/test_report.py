import base64
import io
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pipelines import report
from rlhf import panel_plots, plots
from rlhf.errors import ConfigError
from rlhf.metrics import write_rows
from rlhf.run import Run


@dataclass(frozen=True, slots=True)
class Tiny:
    note: str = "<b>&"


def row(step: int, draw: np.random.Generator) -> dict:
    up = 1 - np.exp(-step / 25)
    judged = {
        f"reward/{name}/{key}": value + 0.03 * draw.normal()
        for name in ("fidelity", "aesthetics", "oracle/portrait")
        for key, value in (("mean", 0.4 + 0.3 * up), ("std", 0.15))
    }
    held = {
        f"heldout/{category}/{measure}{setting}": 0.5 + 0.25 * up + 0.02 * draw.normal()
        for category in ("objects", "portrait", "text")
        for measure in ("strict", "soft")
        for setting in ("", "/w1")
        if step % 12 == 1
    }
    seconds = {
        f"seconds/{p}": s for p, s in zip(plots.SECONDS, (3, 0.6, 2.5, 0.2, 0.1), strict=True)
    }
    return {
        "step": step,
        "samples": 96,
        "reward/total": 0.5 * up + 0.08 * draw.normal(),
        "advantage/live": 0.9,
        "ratio/mean": 1 + 1e-5 * draw.normal(),
        "ratio/std": 2e-5,
        "ratio/first_max_dev": 1e-8,
        "clip/low": 0.1,
        "clip/high": 0.12 if step != 30 else None,
        "loss": -0.1 * up,
        "grad_norm": 1 + 0.2 * draw.normal(),
        "kl/velocity": 0.01 * up,
        "seconds/total": 6.3,
        **seconds,
        **judged,
        **held,
    }


@pytest.fixture
def whole(tmp_path) -> Run:
    """A finished run as `align` leaves it, with made-up numbers."""
    made = Run.create(tmp_path, "toy", Tiny(), "align")
    draw = np.random.default_rng(0)
    write_rows(made.root / "metrics.jsonl", [row(step, draw) for step in range(1, 62)])
    for name in ("before", "after"):
        pixels = draw.integers(0, 255, (128, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made.samples / f"{name}.png")
    prompts = [{"prompt": "a <red> circle", "seed": 7}, {"prompt": "two squares", "seed": 8}]
    made.write_json("samples/prompts.json", prompts)
    gain = {"before": 0.5, "after": 0.75, "gain": 0.25, "low": 0.2, "high": 0.3, "n": 256}
    drop = {"before": 0.4, "after": 0.3, "gain": -0.1, "low": -0.2, "high": 0.0, "n": 256}
    metrics = {"heldout/objects/strict": gain, "heldout/text/strict": drop, "loss": {"value": 0.5}}
    made.write_result(420.0, metrics)
    made.write_evaluation("few-steps", "evaluate", 3.0, {"fewstep/4": {"value": 0.8, "n": 64}})
    return made


def pictures(page: str) -> list[Image.Image]:
    coded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in coded]


class Balanced(HTMLParser):
    """Collects tags that are opened and never closed, or closed in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_page_holds_everything_and_needs_nothing(whole):
    result = report.run(report.Config(run=str(whole.root)))
    page = (whole.root / "report.html").read_text()
    names = ["gains", "heldout", "rewards", "training"]
    assert sorted(p.stem for p in (whole.root / "report").iterdir()) == names
    assert len(result["plots"]) == 4 and len(pictures(page)) == 6
    for text in ("0.500 →", "+0.250 [+0.200, +0.300]", "few-steps", "5,856 pictures", "7 min 0 s"):
        assert text in page, text
    assert "a &lt;red&gt; circle (seed 7)" in page and "&lt;b&gt;&amp;" in page
    assert "<red>" not in page and not re.search(r'(src|href)="(?!data:)', page)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == [] and parser.wrong == []
    stored = json.loads((whole.evaluations / "report.json").read_text())
    assert stored["metrics"]["report/iterations"] == {"value": 61}


def test_writing_it_again_gives_the_same_page(whole):
    report.run(report.Config(run=str(whole.root)))
    first = (whole.root / "report.html").read_text()
    report.run(report.Config(run=str(whole.root)))
    assert (whole.root / "report.html").read_text() == first


def remove_result(run):
    (run.root / "result.json").unlink()


def remove_rows(run):
    (run.root / "metrics.jsonl").unlink()


def remove_after(run):
    (run.samples / "after.png").unlink()
    (run.samples / "prompts.json").write_text("[")


def damage(run):
    (run.root / "result.json").write_text("{")
    (run.evaluations / "few-steps.json").write_text("{")
    (run.root / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    (run.root / "run.json").unlink()


@pytest.mark.parametrize(
    "lose, plots_left, shown",
    [
        (remove_result, 3, "unfinished"),
        (remove_rows, 1, "0.500 →"),
        (remove_after, 4, "samples before"),
        (damage, 0, "Not readable:"),
    ],
)
def test_parts_may_be_missing(whole, lose, plots_left, shown):
    (whole.root / "report").mkdir()
    (whole.root / "report" / "gains.png").write_bytes(b"of an older report")
    lose(whole)
    assert len(report.run(report.Config(run=str(whole.root)))["plots"]) == plots_left
    assert len(list((whole.root / "report").iterdir())) == plots_left
    assert shown in (whole.root / "report.html").read_text()


def test_an_empty_directory_is_enough(tmp_path):
    report.run(report.Config(run=str(tmp_path)))
    assert "<h1>" in (tmp_path / "report.html").read_text()


def test_a_run_that_is_not_there_is_refused():
    for wrong in ("", "nowhere"):
        with pytest.raises(ConfigError, match="runs/<name>"):
            config = report.Config(run=wrong)
            config.check()
            report.run(config)


def test_absent_values_leave_gaps_and_are_not_zero():
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 3},
        {"step": 4, "loss": 4},
    ]
    steps, values = plots.series(rows, "loss")
    assert steps.tolist() == [1, 4] and values.tolist() == [2, 4]
    nobody = panel_plots.Panel.of(rows)
    assert panel_plots.rewards(rows) is None and panel_plots.heldout(rows, nobody) is None
    assert panel_plots.gains({}, nobody) is None


def test_smoothing_keeps_a_constant_and_lags_a_step():
    assert plots.smooth(np.full(5, 3.0)) == pytest.approx(3.0)
    assert plots.smooth(np.array([0.0, 1.0]), weight=0.5) == pytest.approx([0, 2 / 3])
