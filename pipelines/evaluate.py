"""`rlhf evaluate MODEL`: what a model or run can do, on prompts that no training has seen.

recon/...     what the autoencoder keeps of held-out pictures, read by the oracle, and its PSNR
              beside that of a linear code of the same size
heldout/...   pictures of held-out prompts: guided, `/w1` unguided, `/steps4` unguided in four steps
chance/...    the same guided pictures read against other prompts
fewstep/...   with `teacher`: `<steps>/<kind>/strict_ratio`, the share of strictly right pictures
              (of the first of `settings`) over that of the teacher's guided ones of the same noise,
              of all kinds `<steps>/strict_ratio`; forwards and seconds for a picture, the teacher's
              over the model's. heldout/<kind>/strict/teacher is the teacher's own share
sweep/...     objects of the first of `levels` by guidance (of split heldout, so that no choice is
              made on align-heldout)
axes/...      rank correlations of the oracle's axes on the guided pictures

Every figure has a 95% interval over prompts. Written to <run>/evaluations/<id>.json, or to a folder
for a model that is no run, with a sheet of pictures for each kind of prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from pipelines.data.scenes import PICTURES, mixture, pictures, rgba
from rewards import images
from rewards.scenes import world
from rewards.scenes.render import render_batch
from rewards.scenes.specs import Edit
from rlhf import heldout
from rlhf.cluster.base import threads
from rlhf.cluster.pool import Here, Pool, Workers
from rlhf.errors import ConfigError
from rlhf.files import atomic_write_text, json_text
from rlhf.gallery import Painter, assemble, make_painter
from rlhf.heldout import Metrics, Task
from rlhf.models.reconstruction import pca_psnr, psnr, reconstruct
from rlhf.policies.base import Policy
from rlhf.policies.open import Opened, Opening, open_policy
from rlhf.run import report
from rlhf.sampling import Sampler

Part = Literal["recon", "objects", "portraits", "text", "edits", "axes"]
RECORDED = ("n", "per_prompt", "steps", "guidance", "objects_split", "size", "seed")
SUFFIX = {"guided": "", "w1": "/w1", "steps4": "/steps4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`model`: scenes, a directory, or runs/NAME with `checkpoint` (None: newest) and `slot`.

    `n` pictures of each kind of prompt, `per_prompt` to a prompt (more where the split has fewer
    prompts). `objects_split` is the one alignment claims are made on; other kinds use heldout.
    `teacher`: a model or run that the pictures are compared with.
    """

    model: str = "scenes"
    checkpoint: int | None = None
    slot: str = "train"
    out: str | None = None  # folder, for a model that is no run; evaluations/<model>
    id: str | None = None  # name of the file; evaluate, with slot and checkpoint where given
    parts: tuple[Part, ...] = ("recon", "objects", "portraits", "text", "edits", "axes")
    levels: tuple[int, ...] = (2, 1, 3)  # of objects; a guidance is chosen on the first
    settings: tuple[Literal["guided", "w1", "steps4"], ...] = ("guided", "w1", "steps4")
    objects_split: Literal["heldout", "align-heldout"] = "align-heldout"
    n: int = 256
    per_prompt: int = 4
    steps: int = 40
    guidance: float = 2.0
    guidances: tuple[float, ...] = ()
    teacher: str | None = None
    teacher_steps: int = 40
    teacher_guidance: float = 2.0
    size: int = 64
    seed: int = 1000
    rows: int = 64  # pictures in one call
    workers: int = 1  # processes; above 1 on Ray
    threads: int = 1  # of each
    device: str | None = None
    dtype: str | None = None

    def check(self) -> None:
        """Refuse what cannot be measured."""
        if self.n < 2 or min(self.per_prompt, self.workers, self.threads, self.rows) < 1:
            raise ConfigError(
                "expected n >= 2 and per_prompt, workers, threads and rows >= 1, got "
                f"n={self.n} per_prompt={self.per_prompt} workers={self.workers} "
                f"threads={self.threads} rows={self.rows}"
            )
        if set(self.levels) - {1, 2, 3}:
            raise ConfigError(f"levels: expected some of 1, 2, 3, got {list(self.levels)}")
        if not self.settings or not self.parts:
            raise ConfigError("settings and parts: expected at least one of each, got none")

    def sampler(self, setting: str = "guided", guidance: float | None = None) -> Sampler:
        """How the pictures of a setting are made."""
        guided = self.guidance if guidance is None else guidance
        return Sampler(
            steps=4 if setting == "steps4" else self.steps,
            guidance=guided if setting == "guided" else 1.0,
            height=self.size,
            width=self.size,
        )

    def teacher_sampler(self) -> Sampler:
        """How the pictures of the teacher are made."""
        side, steps, guidance = self.size, self.teacher_steps, self.teacher_guidance
        return Sampler(steps=steps, guidance=guidance, height=side, width=side)

    def tasks(self) -> list[Task]:
        """Prompts and seeds of every kind that is asked for."""
        count = -(-self.n // self.per_prompt)
        kinds = [("objects", level, self.objects_split) for level in self.levels]
        kinds += [(c, 1, "heldout") for c in ("portraits", "text", "edits")]
        out = []
        for category, level, split in kinds:
            if category in self.parts:
                name = f"{category}/level{level}" if category == "objects" else category
                specs = heldout.specs_of(category, level, split, count)
                out.append(self._task(name, specs))
        return out

    def _task(self, name: str, specs: Sequence[heldout.Spec | Edit]) -> Task:
        return heldout.make_task(name, specs, self.n, self.size, self.seed, self.per_prompt)

    def sweep_task(self) -> Task:
        """Prompts that a guidance may be chosen on."""
        level, count = self.levels[0], -(-self.n // self.per_prompt)
        specs = heldout.specs_of("objects", level, "heldout", count)
        return self._task(f"objects/level{level}", specs)


# --- reconstruction ------------------------------------------------------------------------------


def reconstruction(config: Config, opened: Opened, folder: Path) -> Metrics:
    """Round trips of `n` held-out pictures of each kind, and of the mixture an autoencoder sees."""
    vae = opened.policy.pipeline.vae.float()
    kinds = {f"objects/level{level}": ("objects", level) for level in (1, 2, 3)}
    kinds |= {"portraits": ("portraits", 1), "text": ("text", 1)}
    out: Metrics = {}
    shown: list[list[np.ndarray]] = []
    for name, (category, level) in kinds.items():
        specs = [world.draw(category, i, split="heldout", level=level) for i in range(config.n)]  # type: ignore[arg-type]
        before = render_batch(specs, config.size)  # type: ignore[arg-type]
        again = reconstruct(vae, rgba(before).to(opened.policy.device)).cpu()
        after = images.to_uint8(again[:, :3]).numpy()
        out |= heldout.reconstruction(name, specs, before, after)  # type: ignore[arg-type]
        shown += [list(before[:12]), list(after[:12])]
    images.save_png(folder / "recon.png", images.contact_sheet(shown))
    held = rgba(pictures(mixture(config.n, config.seed, "heldout", PICTURES), config.size))
    seen = rgba(pictures(mixture(2000, config.seed + 1, "train", PICTURES), config.size))
    again = reconstruct(vae, held.to(opened.policy.device)).cpu()
    for name, values in {
        "recon/psnr": psnr(again[:, :3], held[:, :3]),
        "recon/psnr_pca64": pca_psnr(seen, held),
    }.items():
        out[name] = heldout.estimate(values.numpy()[:, None])
    return out


# --- pictures ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Studio:
    """Where pictures are made, and who is told how far it is."""

    painter: Painter  # of this process, plans the batches
    workers: Workers
    rows: int
    console: Console

    @staticmethod
    def of(opening: Opening, policy: Policy, config: Config, console: Console) -> Studio:
        """A studio of a policy that was opened here, in as many processes as asked for."""
        painter = Painter(policy)
        workers: Workers = Here(lambda: painter, config.threads)
        if config.workers > 1:
            workers = Pool(partial(make_painter, opening), config.workers, config.threads)
        return Studio(painter=painter, workers=workers, rows=config.rows, console=console)

    def pictures(self, task: Task, sampler: Sampler, label: str) -> np.ndarray:
        """Pictures of a task, uint8 (P, G, 3, H, W)."""
        batches = self.painter.batches(task.wanted, sampler, self.rows)
        total = sum(len(w.seeds) for w in task.wanted)
        quiet = not self.console.is_terminal
        with Progress(console=self.console, transient=True, disable=quiet) as progress:
            bar = progress.add_task(label, total=total)
            found = []
            for batch, painted in self.workers.map("paint", batches):
                progress.update(bar, advance=painted.shape[0] * painted.shape[1])
                found.append((batch, painted))
        return assemble(iter(found), len(task.wanted))


def sheet(task: Task, painted: np.ndarray, path: Path, prompts: int = 16, each: int = 4) -> None:
    """The first pictures of the first prompts, two prompts to a row; of edits the source first."""
    rows = []
    for wanted, group in zip(task.wanted[:prompts], painted[:prompts], strict=True):
        rows.append([*wanted.sources, *group[:each]])
    path.parent.mkdir(parents=True, exist_ok=True)
    images.save_png(path, images.contact_sheet([p for row in rows for p in row], 2 * len(rows[0])))


def generation(config: Config, studio: Studio, folder: Path) -> tuple[Metrics, Metrics]:
    """Figures of all kinds and settings, and the correlations of the axes on what is guided."""
    out: Metrics = {}
    guided: list[tuple[Task, np.ndarray]] = []
    for task in config.tasks():
        line: list[str] = []
        for setting in config.settings:
            made = studio.pictures(task, config.sampler(setting), f"{task.name} {setting}")
            found = heldout.figures(task, made, SUFFIX[setting])
            out |= found
            strict = found[f"heldout/{task.name}/strict{SUFFIX[setting]}"]["value"]
            line.append(f"{setting} {strict:.3f}")
            if setting == config.settings[0]:
                out |= heldout.chance(task, made)
                sheet(task, made, folder / f"{task.name.replace('/', '-')}.png")
                guided.append((task, made))
        studio.console.print(f"{task.name}: strict {', '.join(line)}", highlight=False)
    return out, heldout.axes(guided) if guided and "axes" in config.parts else {}


def comparison(config: Config, studio: Studio, teacher: Studio) -> Metrics:
    """The model's pictures beside the teacher's, by kind and in all. See the module's docstring."""
    samplers = config.sampler(config.settings[0]), config.teacher_sampler()
    out: Metrics = {}
    strict: list[tuple[np.ndarray, np.ndarray]] = []
    seconds, name = [0.0, 0.0], f"fewstep/{samplers[0].steps}"
    for task in config.tasks():
        found = []
        for i, (one, sampler) in enumerate(zip((studio, teacher), samplers, strict=True)):
            began = time.monotonic()
            made = one.pictures(task, sampler, f"{task.name} {('', 'teacher')[i]}")
            seconds[i] += time.monotonic() - began
            found.append(heldout.strict_of(task, made))
        strict.append((found[0], found[1]))
        out[f"heldout/{task.name}/strict/teacher"] = heldout.estimate(found[1])
        out |= _named(
            f"{name}/{task.name}/strict_ratio", heldout.strict_ratio(*([x] for x in found))
        )
    mine, theirs = zip(*strict, strict=True)
    out |= _named(f"{name}/strict_ratio", heldout.strict_ratio(mine, theirs))
    forwards = [sampler.forwards(1) for sampler in samplers]
    out[f"{name}/forwards_ratio"] = {"value": forwards[1] / forwards[0]}
    out[f"{name}/seconds_ratio"] = {"value": seconds[1] / seconds[0]}
    return out


def _named(name: str, metric: dict[str, float | int] | None) -> Metrics:
    return {} if metric is None else {name: metric}


def sweep(config: Config, studio: Studio) -> Metrics:
    """Strict share by guidance, and the guidance it is highest at."""
    out: Metrics = {}
    task = config.sweep_task() if config.guidances else None
    for guidance in config.guidances:
        assert task is not None
        made = studio.pictures(task, config.sampler("guided", guidance), f"guidance {guidance:g}")
        found = heldout.figures(task, made)[f"heldout/{task.name}/strict"]
        out[f"sweep/{task.name}/strict/guidance{guidance:g}"] = found
    if out:
        best = max(zip(config.guidances, out.values(), strict=True), key=lambda p: p[1]["value"])
        out["sweep/best_guidance"] = {"value": best[0], "n": best[1]["n"]}
    return out


# --- the program ---------------------------------------------------------------------------------


def run(config: Config) -> dict[str, Any]:
    """Measure, write pictures and figures, return the figures. Raises what `open_policy` raises."""
    began = time.monotonic()
    torch.set_num_threads(config.threads)
    console = Console(stderr=True)
    opening = Opening(
        model=config.model,
        checkpoint=config.checkpoint,
        slot=config.slot,
        device=config.device,
        dtype=config.dtype,
    )
    opened = open_policy(opening)
    target = destination(config, opened)
    folder = target.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    studio = Studio.of(opening, opened.policy, config, console)
    try:
        with threads(config.threads):
            metrics: Metrics = {}
            if config.guidances:
                metrics |= sweep(config, studio)
            made, axes = generation(config, studio, folder)
            if "recon" in config.parts:
                metrics = reconstruction(config, opened, folder) | metrics
            metrics |= made | axes
            if config.teacher is not None:
                metrics |= _beside_teacher(config, studio)
    finally:
        studio.workers.close()
    result = report(
        "evaluate",
        time.monotonic() - began,
        metrics,
        model=config.model,
        slot=opened.slot,
        step=opened.step,
        settings={k: getattr(config, k) for k in RECORDED},
        pictures=sorted(str(p) for p in folder.glob("*.png")),
    )
    atomic_write_text(target, json_text(result))
    console.print(f"written: {target}", highlight=False)
    return result


def _beside_teacher(config: Config, studio: Studio) -> Metrics:
    opening = Opening(model=str(config.teacher), device=config.device, dtype=config.dtype)
    teacher = Studio.of(opening, open_policy(opening).policy, config, studio.console)
    try:
        return comparison(config, studio, teacher)
    finally:
        teacher.workers.close()


def destination(config: Config, opened: Opened) -> Path:
    """The JSON file of this evaluation; pictures go to the folder of the same name."""
    slot = "" if config.slot == "train" else f"-{config.slot.replace('/', '-')}"
    step = "" if config.checkpoint is None else f"-step{config.checkpoint}"
    name = config.id or f"evaluate{slot}{step}"
    if opened.run is not None and config.out is None:
        return opened.run.evaluations / f"{name}.json"
    return Path(config.out or Path("evaluations") / opened.name) / f"{name}.json"


def plan(config: Config) -> str:
    """How many pictures and forwards, for --dry-run."""
    tasks = config.tasks()
    total = sum(len(w.seeds) for t in tasks for w in t.wanted)
    rows = {s: config.sampler(s) for s in config.settings}
    each = sum(s.steps * (2 if s.guidance > 1 else 1) for s in rows.values())
    if config.teacher is not None:
        each += next(iter(rows.values())).forwards(1) + config.teacher_sampler().forwards(1)
    swept = len(config.guidances) * config.n * config.steps * 2
    return "\n".join(
        [
            f"{len(tasks)} kinds of prompt, {total} pictures in each of {', '.join(rows)}",
            f"{total * each + swept} forwards (rows), {config.workers} process(es)",
        ]
    )
