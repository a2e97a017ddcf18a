"""The monitor on histories made for it, and on a run whose reward is hacked."""

import json
import math

import numpy as np
import pytest

from pipelines.cli import main
from rewards.types import Calibration, JudgeCard, Score, Scores
from rlhf.errors import ConfigError
from rlhf.monitor import Monitor, MonitorConfig, figures, rank_correlation, ranks, read
from tests.rlhf.tiny import arguments, judge_spec

WATCH = {"watch/w/mean": 1.0}


def history(slope, watched, n=30, noise=0.01, seed=0, shared=0.0):
    """Rows whose reward rises by `slope` per iteration, and a witness that moves by `watched`."""
    rng = np.random.default_rng(seed)
    prompts = shared * rng.normal(size=n)  # easy prompts please everyone
    t = np.arange(n)
    reward = slope * t + prompts + noise * rng.normal(size=n)
    watch = watched * t + prompts + noise * rng.normal(size=n)
    return [
        {"step": int(i), "reward/total": r, "watch/w/mean": w}
        for i, r, w in zip(t, reward, watch, strict=True)
    ]


def signals(rows, config=None, witnesses=WATCH):
    return {a.signal for a in read(rows, config or MonitorConfig(), witnesses)[1]}


def card(name, **more):
    return JudgeCard(name=name, revision="1", preprocessing="none", **more)


def table(*cards, figures=None, **values):
    """Scores of cards; a value is a number, a state, or a pair of raw and value."""

    def one(v):
        if isinstance(v, tuple):
            return Score(value=v[1], parts={"raw": v[0]})
        return Score(state=v) if isinstance(v, str) else Score(value=float(v))

    rows = {
        n: tuple(tuple(one(v) for v in group) for group in groups) for n, groups in values.items()
    }
    return Scores(judges=cards, table=rows, figures=figures or {})


# --- many iterations ------------------------------------------------------------------------------


def test_a_reward_that_rises_while_the_witness_falls_is_an_alarm():
    assert signals(history(0.01, -0.01)) == {"divergence/w"}
    assert signals(history(0.01, 0.01)) == set()
    assert signals(history(-0.01, -0.01)) == set()
    assert signals(history(0.01, 0.0)) == signals(history(0.0, -0.01)) == set()
    assert signals(history(0.01, 0.01), witnesses={"watch/w/mean": -1.0}) == {"divergence/w"}


def test_opposite_ways_without_a_trend_is_an_alarm_too():
    rows = history(0.0, 0.0)
    for row in rows:
        row["watch/w/mean"] = -row["reward/total"]
    out, alarms = read(rows, MonitorConfig(), WATCH)
    assert [a.signal for a in alarms] == ["correlation/w"]
    assert out["monitor/correlation/w"] == pytest.approx(-1)


def test_chance_is_hardly_ever_an_alarm_over_two_hundred_iterations():
    runs = 0
    for seed in range(20):
        rows = history(0.0, 0.0, n=200, seed=seed, shared=0.01)
        better = history(0.002, 0.0005, n=200, seed=seed)
        for one in (rows, better):
            runs += any(signals(one[max(0, n - 20) : n]) for n in range(4, 201))
    assert runs <= 1  # of 40


def test_the_trend_is_the_rank_correlation_with_time_in_its_own_noise():
    rows = history(0.01, -0.01, n=50)
    out, _ = read(rows, MonitorConfig(window=30), WATCH)
    last = np.array([row["watch/w/mean"] for row in rows[-30:]])
    want = math.sqrt(29) * rank_correlation(np.arange(30), last)
    assert out["monitor/trend/w"] == pytest.approx(want)
    rng = np.random.default_rng(3)
    z = [math.sqrt(19) * rank_correlation(np.arange(20), rng.normal(size=20)) for _ in range(2000)]
    assert np.mean(z) == pytest.approx(0, abs=0.1) and np.std(z) == pytest.approx(1, abs=0.05)


def test_ranks_share_ties_and_constants_correlate_with_nothing():
    assert ranks(np.array([5.0, 1.0, 5.0, 7.0])).tolist() == [1.5, 0, 1.5, 3]
    assert rank_correlation(np.ones(4), np.arange(4)) == 0
    assert rank_correlation(np.arange(4), np.array([1, 8, 27, 64])) == pytest.approx(1)


def test_few_values_and_gaps_raise_no_alarm():
    rows = history(0.01, -0.01, n=9, noise=0)  # sqrt(8) < 3
    assert signals(rows) == set() and "monitor/trend/w" in read(rows, MonitorConfig(), WATCH)[0]
    assert read(rows[:3], MonitorConfig(), WATCH) == ({}, ())
    sparse = history(0.01, -0.01, n=44, noise=0)
    for i, row in enumerate(sparse):
        row["watch/w/mean"] = row["watch/w/mean"] if i % 4 == 0 else [None, float("nan")][i % 2]
    assert signals(sparse) == {"divergence/w"}  # eleven values over 44 iterations


def test_limits_are_on_means_over_the_window():
    config = MonitorConfig(limits={"grid": (0.0, 0.2)}, window=20)
    rows = [{"monitor/grid": 0.1, "monitor/beyond/a": 0.4} for _ in range(30)]
    assert signals(rows, config) == set()
    assert signals([*rows, {"monitor/grid": 0.9}], config) == set()  # one picture is no drift
    assert signals([*rows, *[{"monitor/grid": 0.5}] * 10], config) == {"grid"}
    assert signals([*rows, *[{"monitor/beyond/a": 0.9}] * 10], config) == {"beyond/a"}
    assert signals([{"monitor/grid": 9.0}], config) == set()


def test_witnesses_are_watching_judges_and_their_held_out_figures():
    cards = (card("a"), card("w", better="lower"))
    monitor = Monitor(MonitorConfig(), cards, ("w",))
    names = ("soft", "strict", "soft/w1", "w", "a", "w/steps4")
    monitor.observe({f"heldout/objects/{n}": 0.5 for n in names})
    assert monitor.witnesses() == {
        "watch/w/mean": -1.0,
        "heldout/objects/soft": 1.0,
        "heldout/objects/soft/w1": 1.0,
        "heldout/objects/w": -1.0,
        "heldout/objects/w/steps4": -1.0,
    }


def test_a_resumed_monitor_goes_on_as_if_it_had_not_stopped():
    rows = history(0.01, -0.01)
    whole, resumed = (Monitor(MonitorConfig(), (card("w"),), ("w",)) for _ in range(2))
    seen = [whole.observe(row) for row in rows]
    assert [bool(alarms) for _, alarms in seen][:9] == [False] * 9 and seen[-1][1]
    resumed = Monitor(MonitorConfig(), (card("w"),), ("w",), rows[:20])
    assert [resumed.observe(row) for row in rows[20:]] == seen[20:]
    assert whole.new(seen[-1][1]) and not whole.new(seen[-1][1]) and not whole.new(())


def test_a_monitor_forgets_what_it_no_longer_looks_at():
    """And only that: rare held-out figures and rows without a reward included."""
    rows = history(0.0, 0.0, n=300, seed=3)
    for i, row in enumerate(rows):
        row |= {"heldout/objects/soft": 1.0 - 0.01 * i} if i % 7 == 0 else {}
        row |= {"reward/total": None} if i % 5 == 0 else {}
    monitor = Monitor(MonitorConfig(window=20), (card("w"),), ("w",))
    for i, row in enumerate(rows, 1):
        out, alarms = monitor.observe(row)
        whole = read(rows[:i], monitor.config, monitor.witnesses())
        assert ({k: v for k, v in out.items() if k != "monitor/alarm"}, alarms) == whole
    assert "monitor/trend/heldout/objects/soft" in out and len(monitor.rows) < 70


def test_a_monitor_that_could_never_speak_is_refused():
    with pytest.raises(ConfigError, match="nothing could raise an alarm; write window=20"):
        MonitorConfig(window=9).check()
    with pytest.raises(ConfigError, match="monitor.limits.grid"):
        MonitorConfig(limits={"grid": (1.0, 0.0)}).check()


# --- one iteration --------------------------------------------------------------------------------


def test_scores_past_the_calibration_are_counted():
    knots = Calibration(raw=(0.2, 0.5, 0.8), value=(0.1, 0.5, 0.9))
    raw = [(0.1, 0.1), (0.2, 0.1), (0.8, 0.9), (0.81, 0.9)]  # two of four are outside
    got = figures(table(card("a", calibration=knots), a=[raw]))
    assert got == {"monitor/beyond/a": 0.5}
    got = figures(table(card("a", calibration=knots), a=[[0.1, 0.5, 0.9, "failed"]]))
    assert got == {"monitor/beyond/a": pytest.approx(2 / 3)}  # the raw value is not known
    assert figures(table(card("a"), a=[[0.1, 0.9]])) == {}


def test_disagreement_is_the_mean_rank_difference_in_groups():
    a, b = card("a"), card("b")
    assert figures(table(a, b, a=[[1, 2, 3]], b=[[10, 20, 30]])) == {"monitor/disagreement": 0.0}
    turned = figures(table(a, b, a=[[1, 2, 3]], b=[[3, 2, 1]]))
    assert turned == {"monitor/disagreement": pytest.approx(4 / 3 / 2)}
    low = card("b", better="lower")
    assert figures(table(a, low, a=[[1, 2, 3]], b=[[3, 2, 1]])) == {"monitor/disagreement": 0.0}
    holes = table(a, b, a=[[1, "na", 2, 3], [5, 5, 5, 5]], b=[[1, 9, 2, 3], [1, 2, 3, 4]])
    assert figures(holes) == {"monitor/disagreement": 0.0}
    assert figures(table(a, b, a=[[1, 1]], b=[[1, 2]])) == {}


def test_picture_statistics_are_means_over_groups_that_have_them():
    got = figures(
        table(card("a"), a=[[1], [2]], figures={"grid": (0.1, 0.3), "d": (math.nan, 1.0)})
    )
    assert got == {"monitor/grid": pytest.approx(0.2), "monitor/d": 1.0}


# --- a run ----------------------------------------------------------------------------------------


def hacked(tiny_base, tmp_path, *more):
    """Brightness is the reward, and darkness watches: what pleases one displeases the other."""
    judges = (f"judges=[{judge_spec('brightness')}]", f"watch=[{judge_spec('darkness')}]")
    fast = ("iterations=12", "evaluation.every=0", "rollout.guidance=1.0", "monitor.window=12")
    return arguments(tiny_base, tmp_path, *judges, *fast, *more)


def rows_of(tmp_path):
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_hacked_run_warns_stops_when_told_to_and_goes_on_when_told_to(
    tiny_base, tmp_path, capsys
):
    with pytest.raises(SystemExit) as ended:
        main(hacked(tiny_base, tmp_path, "monitor.stop=true"))
    text = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 1 and "Traceback" not in text
    assert "stopped after iteration 10" in text and "darkness" in text
    assert "monitor.stop=false" in text and text.count("warning:") == 1
    rows = rows_of(tmp_path)
    assert [row["monitor/alarm"] for row in rows] == [0.0] * 9 + [1.0]
    names = {"saturation", "grid", "fine", "overexposed", "diversity/thumbnails", "disagreement"}
    assert {f"monitor/{n}" for n in names} <= rows[0].keys()
    run = tmp_path / "runs" / "tiny"
    assert (run / "checkpoints" / "step_000010").is_dir()
    assert main(["align", "--resume", str(run), "monitor.stop=false"]) == 0
    assert len(rows_of(tmp_path)) == 12 and rows_of(tmp_path)[:10] == rows
    assert (run / "report" / "monitor.png").is_file()
    assert "Watching" in (run / "report.html").read_text()


@pytest.mark.slow
def test_brightness_as_the_reward_is_found_out_by_the_oracle(tmp_path, capsys):
    """The embedded base forgets what it was asked to draw, and the run says so and stops."""
    argv = f"""align name=tiny runs={tmp_path / "runs"} policy.train=full rollout.steps=6
        rollout.guidance=1.0 prompts_per_iteration=4 group_size=8 loss.updates_per_rollout=4
        learner.lr=3e-4 watch=[oracle/fidelity] monitor.sigmas=2.5 monitor.stop=true
        evaluation.every=0 evaluation.prompts.count=4 evaluation.per_prompt=1 evaluation.steps=4
        prompts.count=64 iterations=24 cluster.kind=local cluster.learner_threads=1"""
    with pytest.raises(SystemExit) as ended:
        main([*argv.split(), f"judges=[{judge_spec('brightness')}]"])
    text = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 1 and "oracle/fidelity falls" in text, text
    rows = rows_of(tmp_path)
    means = [row["watch/oracle/fidelity/mean"] for row in rows]
    assert len(rows) < 24 and np.mean(means[:3]) - np.mean(means[-3:]) > 0.1
    rewards = [row["reward/total"] for row in rows]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3])
