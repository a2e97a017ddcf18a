"""What the parts of the pretraining recipe are worth on scenes: arms x seeds at equal budgets.

    python -m benchmarks.ablations --list           # arms, what each changes, what is done
    python -m benchmarks.ablations --workers 2      # all of them; again to continue
    python -m benchmarks.ablations --arms kl gan --seeds 0
    python -m benchmarks.ablations --draw           # table and figure of what is done

The table also goes into docs/ablations.md.

An arm is one change of configs/vae/ablation.yaml or configs/pretrain/ablation.yaml: a run of `rlhf
vae`, where the question wants it a small transformer trained on its latents for equally many steps,
and measures (benchmarks/ablation_measures.py). Each writes
benchmarks/results/ablations/<arm>-seed<k>.json with its resolved configurations. What is there is
not computed again; a run that was killed continues from its last checkpoint. All arms see the same
pictures, captions, noise and held-out sets at equal seeds.

A flow loss is in units of its latents. Here they have unit variance per channel (latents_std), and
the loss is divided by the variance of the velocity, so 1 is a model that knows nothing; still, a
code that drops detail is easier to model, so read it beside PSNR. The soft score of the pictures
has no such trouble.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import ablation_measures as measures
from benchmarks import ablation_report
from pipelines import pretrain, vae
from rlhf import assets, config
from rlhf.errors import ConfigError
from rlhf.files import atomic_write_text, json_text
from rlhf.run import Run, machine, report

RESULTS = Path(__file__).parent / "results" / "ablations"
PAGE = Path(__file__).parents[1] / "docs" / "ablations.md"
CONSTANT = "{cosine: [0.5, 0.5], distance: [0.25, 0.25], share: 0.5}"  # of arXiv:2501.01423
DIRECT = "[{size: 128, share: 1.0, text: 0.2, batch: 2}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """`vae`: overrides of configs/vae/ablation, None to take the autoencoder as given.
    `transformer`: overrides of configs/pretrain/ablation, None where no transformer is trained.
    """

    name: str
    vae: tuple[str, ...] | None = ()
    transformer: tuple[str, ...] | None = None
    seeds: int = 2


LARGER = ("network.layers=6", "pace.steps=1000", "learner.total_steps=1000")
ARMS = (
    Arm(name="reference", transformer=()),  # global shortcut, loosened margins, no KL, no GAN
    Arm(name="shortcut-none", vae=("network.shortcut=none",)),
    Arm(name="shortcut-per-level", vae=("network.shortcut=per-level",)),
    Arm(name="align-off", vae=("loss.alignment=0.0",), transformer=()),
    Arm(name="align-constant", vae=(f"loss.margins={CONSTANT}",), transformer=()),
    Arm(name="block-swiglu", vae=None, transformer=LARGER),
    Arm(name="block-gelu", vae=None, transformer=(*LARGER, "network.block=gelu")),
    Arm(name="kl", vae=("loss.kl=1e-3",), transformer=(), seeds=1),
    Arm(name="gan", vae=("loss.gan=0.05",), seeds=1),
    Arm(name="direct", vae=(f"curriculum.stages={DIRECT}",), seeds=1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Where things are. `vae` is the autoencoder, a directory, of arms that train none. The two
    lists are further overrides of every arm.
    """

    runs: str = "runs/ablations"
    results: Path = RESULTS
    base: str = os.path.relpath(assets.resolve("scenes"))
    vae: str = os.path.join(os.path.relpath(assets.resolve("scenes")), "vae")
    vae_overrides: tuple[str, ...] = ()
    transformer_overrides: tuple[str, ...] = ()
    held: measures.Held = measures.Held()

    def file(self, arm: Arm, seed: int) -> Path:
        return self.results / f"{arm.name}-seed{seed}.json"


def resolve(study: Study, arm: Arm, seed: int) -> tuple[vae.Config | None, pretrain.Config | None]:
    """The configurations of one run of an arm. Raises ConfigError."""
    name = f"{arm.name}-seed{seed}"
    common = [f"seed={seed}", f"runs={study.runs}"]
    codec = transformer = None
    where = study.vae
    if arm.vae is not None:
        given = [*arm.vae, *study.vae_overrides, *common, f"name={name}-vae"]
        codec = config.load(vae.Config, "vae/ablation", given, "vae")
        where = f"{study.runs}/{name}-vae/vae"
    if arm.transformer is not None:
        given = [*arm.transformer, *study.transformer_overrides, *common]
        given += [f"name={name}-flow", f"vae={where}", f"condition={study.base}"]
        transformer = config.load(pretrain.Config, "pretrain/ablation", given, "pretrain")
    return codec, transformer


def trained(program: Any, wanted: Any) -> Run:
    """The finished run of a configuration: found, continued or made.

    Raises:
        ConfigError: a run of that name with other settings.
    """
    root = Path(wanted.runs) / wanted.name
    if not (root / "config.yaml").is_file():
        if root.exists():  # killed before it had a configuration
            shutil.rmtree(root)
        program.run(wanted)
        return Run.open(root)
    if config.load(type(wanted), str(root / "config.yaml")) != wanted:
        raise ConfigError(
            f"expected the settings of this study in {root}, got others: remove the directory, or"
            " write another --runs"
        )
    if not (root / "result.json").is_file():
        program.run(wanted, resume=root)
    return Run.open(root)


def training_seconds(run: Run) -> float:
    """Seconds of the steps that count, also where the run was killed and continued."""
    total, before = 0.0, 0
    for row in run.rows():
        if "seconds/step" in row:
            total += row["seconds/step"] * (row["step"] - before)
            before = row["step"]
    return round(total, 1)


def perform(study: Study, arm: Arm, seed: int) -> dict[str, Any]:
    """One arm at one seed, as its file holds it; computed unless it is there.

    Raises:
        ConfigError: a result or run of that name with other settings.
    """
    codec, transformer = resolve(study, arm, seed)
    configs = {"vae": codec and config.to_dict(codec)}
    configs["transformer"] = transformer and config.to_dict(transformer)
    known = ablation_report.read(study.file(arm, seed))
    if known is not None:
        if known["configs"] != configs:
            raise ConfigError(
                f"expected the settings of this study in {study.file(arm, seed)}, got others:"
                " remove the file, or write another --results"
            )
        return known
    began, found, extra = time.monotonic(), {}, {}
    seconds: dict[str, float] = {}
    if codec is not None:
        run = trained(vae, codec)
        seconds["vae"] = training_seconds(run)
        found |= measures.codec(run.root / "vae", study.held)
        extra["curve"] = [[r["step"], r["recon/psnr"]] for r in run.rows() if "recon/psnr" in r]
    if transformer is not None:
        run = trained(pretrain, transformer)
        seconds["transformer"] = training_seconds(run)
        made, more = measures.transformer(run.root / "model", study.held)
        found, extra = found | made, extra | more
    result = report(
        "ablations",
        time.monotonic() - began,
        {name: ablation_report.estimate(values) for name, values in found.items()},
        arm=arm.name,
        seed=seed,
        training_seconds=seconds,
        configs=configs,
        machine=machine(),
        values={name: [round(float(v), 6) for v in values] for name, values in found.items()},
        **extra,
    )
    atomic_write_text(study.file(arm, seed), json_text(result))
    return result


def _one_thread(*args: Any) -> None:
    import torch

    torch.set_num_threads(1)
    perform(*args)


def jobs(names: Sequence[str] | None, seeds: Sequence[int] | None) -> list[tuple[Arm, int]]:
    """Runs of the named arms (None: all) at the seeds (None: those each arm is planned for)."""
    known = {arm.name: arm for arm in ARMS}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ConfigError(f"--arms: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    chosen = [known[name] for name in names] if names else list(ARMS)
    return [(arm, seed) for arm in chosen for seed in (seeds or range(arm.seeds))]


def perform_all(study: Study, work: Sequence[tuple[Arm, int]], workers: int) -> int:
    """All runs, each in a process of its own; those that fail are reported, and counted."""
    failed = 0
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_one_thread, study, *job): job for job in work}
        for done in as_completed(futures):
            arm, seed = futures[done]
            try:
                done.result()
                print(f"done: {study.file(arm, seed)}", flush=True)
            except Exception as error:  # the other runs are worth having
                failed += 1
                traceback.print_exception(error)
                print(f"failed: {arm.name} seed {seed}", file=sys.stderr, flush=True)
    return failed


def listing(study: Study, work: Sequence[tuple[Arm, int]]) -> str:
    """A line for each run: its state and what it changes."""
    lines = []
    for arm, seed in work:
        started = any(Path(study.runs).glob(f"{arm.name}-seed{seed}-*"))
        state = "done" if study.file(arm, seed).is_file() else "started" if started else "to do"
        changes = [*(arm.vae or ()), *(arm.transformer or ())]
        lines.append(f"{arm.name:20s} seed {seed}  {state:8s} {' '.join(changes)}".rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="K")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--list", action="store_true", help="say what there is to do, and stop")
    parser.add_argument("--draw", action="store_true", help="table and figure only")
    parser.add_argument("--runs", default=Study().runs, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--vae", default=Study().vae, help="autoencoder of the block arms")
    for stage in ("vae", "transformer"):
        text = f"further settings of every {stage} run"
        parser.add_argument(f"--{stage}-set", nargs="+", default=[], metavar="K=V", help=text)
    given = parser.parse_args(argv)
    study = replace(
        Study(),
        runs=given.runs,
        results=given.results,
        vae=given.vae,
        vae_overrides=tuple(given.vae_set),
        transformer_overrides=tuple(given.transformer_set),
    )
    work = jobs(given.arms, given.seeds)
    if given.list:
        print(listing(study, work))
        return 0
    failed = 0 if given.draw else perform_all(study, work, given.workers)
    text = ablation_report.write(study.results)
    if study.results == RESULTS:
        ablation_report.fill(PAGE, text)
    print(text)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
