"""What the page says of a panel: who trains, who watches, by category, and nothing made up."""

import pytest

from rlhf import panel_plots
from rlhf.panel_plots import Held, Panel

PANEL = Panel(trains=("aesthetics", "fidelity"), watches=("oracle/fidelity", "oracle/aesthetics"))


def row(step, **more):
    found = {"step": step, "seconds/total": 4.0}
    for kind, judges in (("reward", PANEL.trains), ("watch", PANEL.watches)):
        for judge in judges:
            stem = f"{kind}/{judge}"
            found |= {f"{stem}/mean": 0.5, f"{stem}/std": 0.1, f"{stem}/failed": 0.25}
            found |= {f"{stem}/na": 0.0, f"seconds/judge/{judge}": 0.5}
            found |= {f"{stem}/mean/{kind}": 0.5 for kind in ("objects", "text")}
    totals = {"reward/total": 0.5, "reward/total/objects": 0.4, "reward/total/text": 0.7}
    return found | totals | more


ROWS = [row(1), row(2, **{"advantage/dropped/text/flat_high": 2.0}), row(3)]
GAIN = {"before": 0.5, "after": 0.75, "gain": 0.25, "low": 0.2, "high": 0.3, "n": 8}


def texts(figure):
    return [axis.get_title(loc="left") for axis in figure.axes]


def test_the_rows_say_who_trains_and_who_watches():
    assert Panel.of(ROWS) == PANEL
    assert Panel.of([]) == Panel()


@pytest.mark.parametrize(
    "name, found",
    [
        ("heldout/objects/strict", ("objects", "strict", "")),
        ("heldout/objects/level1/soft/w1", ("objects/level1", "soft", "/w1")),
        ("heldout/text/fidelity/steps4", ("text", "fidelity", "/steps4")),
        ("heldout/text/oracle/aesthetics", ("text", "oracle/aesthetics", "")),
        ("heldout/flow", None),
        ("heldout/flow/sigma0.1", None),
        ("heldout/text/stranger", None),
    ],
)
def test_a_held_out_name_is_taken_apart(name, found):
    held = Held.of(name, PANEL)
    assert held == (None if found is None else Held(name, *found))


def test_truth_comes_first_and_what_trained_last():
    names = ["fidelity", "strict", "oracle/aesthetics", "soft"]
    order = sorted(names, key=PANEL.order)
    assert order == ["strict", "soft", "oracle/aesthetics", "fidelity"]
    assert PANEL.label("strict") == "strictly right (oracle, watches)"
    assert PANEL.label("fidelity") == "fidelity (trains)"
    assert Panel(trains=("oracle/fidelity",)).label("soft") == "how right (oracle, trains)"
    assert Panel().label("strict") == "strictly right (oracle)"


def test_gains_have_a_panel_for_each_category_and_setting_and_the_rest_its_own():
    names = ["heldout/text/strict", "heldout/text/fidelity/w1", "heldout/objects/strict", "recon"]
    figure = panel_plots.gains(dict.fromkeys(names, GAIN), PANEL)
    assert texts(figure) == [
        "objects, guided",
        "objects, unguided",
        "text, guided",
        "text, unguided",
        "",
    ]
    bars = [len(axis.patches) for axis in figure.axes]
    assert bars == [2, 0, 2, 2, 2]
    said = [axis.get_legend_handles_labels()[1][1:] for axis in figure.axes if axis.patches]
    assert said == [["after"], ["after"], ["after, by a judge that trains"], ["after"]]


def test_rewards_show_witnesses_beside_the_total_and_a_line_for_each_category():
    figure = panel_plots.rewards(ROWS)
    assert texts(figure) == [
        "weighted total",
        "oracle/fidelity (watches)",
        "oracle/aesthetics (watches)",
        "aesthetics (trains)",
        "fidelity (trains)",
    ]
    assert [len(axis.lines) for axis in figure.axes] == [2] * 5


def test_one_category_has_the_spread_of_its_scores_instead():
    rows = [{k: v for k, v in r.items() if not k.endswith("/text")} for r in ROWS]
    figure = panel_plots.rewards(rows)
    assert [len(axis.lines) for axis in figure.axes] == [1] * 5
    assert len(figure.axes[3].collections) == 1  # one standard deviation


def test_the_table_of_gains_leaves_out_what_was_not_measured():
    metrics = {"heldout/objects/strict": GAIN, "heldout/text/fidelity": GAIN}
    (head, lines), *more = panel_plots.held_table(metrics, PANEL).values()
    assert not more and head == ["", "objects", "text"]
    assert lines == [
        ["strictly right (oracle, watches)", "+0.250 [+0.200, +0.300]", ""],
        ["fidelity (trains)", "", "+0.250 [+0.200, +0.300]"],
    ]


def test_the_table_of_judges_has_weights_as_shares_and_what_they_cost():
    weights = {"objects": {"fidelity": 3.0, "aesthetics": 1.0}, "*": {"fidelity": 2.0}}
    head, lines = panel_plots.judges_table(ROWS, weights)
    assert head[:3] == ["judge", "objects", "text"]
    assert lines[0] == ["aesthetics (trains)", "0.25", "", "25.0%", "0.0%", "0.500"]
    assert lines[1] == ["fidelity (trains)", "0.75", "1.00", "25.0%", "0.0%", "0.500"]
    assert lines[2][:3] == ["oracle/fidelity (watches)", "–", "–"]
    equal = panel_plots.judges_table(ROWS, {})[1]
    assert [line[1] for line in equal] == ["0.50", "0.50", "–", "–"]
    assert panel_plots.judges_table([], {})[1] == []
    assert panel_plots.dropped(ROWS) == "text: flat_high 2" and panel_plots.dropped([]) == ""
