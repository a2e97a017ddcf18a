"""`rlhf evaluate MODEL`: what a model or run can do, on prompts that no training has seen.

recon/...     what the autoencoder keeps of held-out pictures, read by the oracle, and its PSNR
              beside that of a linear code of the same size
heldout/...   pictures of held-out prompts: guided, `/w1` unguided, `/steps4` unguided in four steps
chance/...    the same guided pictures read against other prompts
fewstep/...   with `teacher`: the pictures of the first of `settings` beside the teacher's, and with
              `baseline` beside the base's, of the same noise: how many are right, how far apart
              those of a prompt are, which of them judges prefer, what they cost. The names are in
              `rlhf.comparison`
sweep/...     objects of the first of `levels` by guidance (of split heldout, so that no choice is
              made on align-heldout)
axes/...      rank correlations of the oracle's axes on the guided pictures

Every figure has a 95% interval over prompts. Written to <run>/evaluations/<id>.json, or to a folder
for a model that is no run, with a sheet of pictures for each kind of prompt.

A model that was distilled to noise levels of its own has that many steps and takes no guidance,
unless it is told otherwise; another number of steps would be another model, and is refused.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from pipelines.data.scenes import PICTURES, mixture, pictures, rgba
from rewards import images
from rewards.scenes import world
from rewards.scenes.render import render_batch
from rewards.scenes.specs import Edit
from rlhf import comparison, heldout
from rlhf.cluster.base import threads
from rlhf.comparison import BASELINE, STUDENT, TEACHER, Eyes, Side
from rlhf.errors import ConfigError
from rlhf.files import atomic_write_text, json_text
from rlhf.gallery import Album, Studio, usual_sampler
from rlhf.heldout import Metrics, Task
from rlhf.models.reconstruction import pca_psnr, psnr, reconstruct
from rlhf.policies.open import Opened, Opening, describe_opening, open_policy
from rlhf.policies.pipeline import PipelinePolicy
from rlhf.run import report
from rlhf.sampling import Sampler
from rlhf.weights import checksum

Part = Literal["recon", "objects", "portraits", "text", "edits", "axes"]
RECORDED = ("n", "per_prompt", "objects_split", "size", "seed")
BESIDE = ("teacher", "baseline", "features")
SUFFIX = {"guided": "", "w1": "/w1", "steps4": "/steps4"}
Setting = Literal["guided", "w1", "steps4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`model`: scenes, a directory, or runs/NAME with `checkpoint` (None: newest) and `slot`.

    `n` pictures of each kind of prompt, `per_prompt` to a prompt (more where the split has fewer
    prompts). `objects_split` is the one alignment claims are made on; other kinds use heldout.
    None as steps: those of a model with noise levels of its own, else 40; as guidance: 1 for such a
    model, else 2; as settings: guided for such a model, else all three.

    `teacher` and `baseline`: models or runs that the pictures are compared with; the baseline has
    the model's steps and no guidance. `judges`, named as those of `rlhf align`, choose between the
    pictures; `features` is the encoder that says how far apart they are: scenes, or DINOv2 or CLIP
    by path. `album`: a folder that keeps the pictures of teacher and baseline, and gives them again
    where the same are asked for.
    """

    model: str = "scenes"
    checkpoint: int | None = None
    slot: str = "train"
    out: str | None = None  # folder, for a model that is no run; evaluations/<model>
    id: str | None = None  # name of the file; evaluate, with slot and checkpoint where given
    parts: tuple[Part, ...] = ("recon", "objects", "portraits", "text", "edits", "axes")
    levels: tuple[int, ...] = (2, 1, 3)  # of objects; a guidance is chosen on the first
    settings: tuple[Setting, ...] | None = None
    objects_split: Literal["heldout", "align-heldout"] = "align-heldout"
    n: int = 256
    per_prompt: int = 4
    steps: int | None = None
    guidance: float | None = None
    guidances: tuple[float, ...] = ()
    teacher: str | None = None
    teacher_steps: int | None = None
    teacher_guidance: float | None = None
    baseline: str | None = None
    judges: tuple[str, ...] = ()
    features: str = "scenes"
    album: str | None = None
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
        if self.settings == () or not self.parts:
            raise ConfigError("settings and parts: expected at least one of each, got none")
        if self.teacher is None and (self.baseline or self.judges or self.album):
            raise ConfigError(
                f"baseline, judges and album: expected a teacher to compare with, got none beside"
                f" baseline={self.baseline} judges={list(self.judges)} album={self.album}: write"
                " teacher=scenes"
            )
        if self.teacher is not None and not set(self.parts) - {"recon", "axes"}:
            raise ConfigError(
                f"parts: expected a kind of prompt to compare with a teacher, got"
                f" {list(self.parts)}: write parts=[objects]"
            )

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


# --- how pictures are made -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Samplers:
    """What is asked for, and where nothing was, what suits the models. `teacher` and `baseline` are
    there where such models are.
    """

    settings: tuple[Setting, ...]
    guided: Sampler
    teacher: Sampler | None = None
    baseline: Sampler | None = None

    def of(self, setting: Setting) -> Sampler:
        """How the pictures of a setting are made."""
        steps = 4 if setting == "steps4" else self.guided.steps
        return replace(
            self.guided, steps=steps, guidance=self.guided.guidance if setting == "guided" else 1.0
        )


def samplers(config: Config) -> Samplers:
    """Raises ConfigError for steps that a model does not have."""
    own = describe_opening(Opening(model=config.model)).own_grid
    chosen = config.settings or (("guided",) if own else ("guided", "w1", "steps4"))
    size = config.size, config.size
    guided = usual_sampler(config.model, size, config.steps, config.guidance)
    if "steps4" in chosen:
        usual_sampler(config.model, size, 4, 1.0, "steps4 of settings")
    made = Samplers(settings=chosen, guided=guided)
    if config.teacher is not None:
        asked = config.teacher_steps, config.teacher_guidance
        made = replace(made, teacher=usual_sampler(config.teacher, size, *asked, "teacher_steps"))
    if config.baseline is not None:
        asked = made.of(chosen[0]).steps, 1.0
        made = replace(
            made, baseline=usual_sampler(config.baseline, size, *asked, "steps of the baseline")
        )
    return made


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


def sheet(task: Task, painted: np.ndarray, path: Path, prompts: int = 16, each: int = 4) -> None:
    """The first pictures of the first prompts, two prompts to a row; of edits the source first."""
    rows = []
    for wanted, group in zip(task.wanted[:prompts], painted[:prompts], strict=True):
        rows.append([*wanted.sources, *group[:each]])
    path.parent.mkdir(parents=True, exist_ok=True)
    images.save_png(path, images.contact_sheet([p for row in rows for p in row], 2 * len(rows[0])))


def generation(
    config: Config, how: Samplers, studio: Studio, folder: Path
) -> tuple[Metrics, Metrics]:
    """Figures of all kinds and settings, and the correlations of the axes on what is guided."""
    out: Metrics = {}
    guided: list[tuple[Task, np.ndarray]] = []
    for task in config.tasks():
        line: list[str] = []
        for setting in how.settings:
            made = studio.paint(task.wanted, how.of(setting), f"{task.name} {setting}").pixels
            found = heldout.figures(task, made, SUFFIX[setting])
            out |= found
            strict = found[f"heldout/{task.name}/strict{SUFFIX[setting]}"]["value"]
            line.append(f"{setting} {strict:.3f}")
            if setting == how.settings[0]:
                out |= heldout.chance(task, made)
                sheet(task, made, folder / f"{task.name.replace('/', '-')}.png")
                guided.append((task, made))
        studio.console.print(f"{task.name}: strict {', '.join(line)}", highlight=False)
    return out, heldout.axes(guided) if guided and "axes" in config.parts else {}


def sweep(config: Config, how: Samplers, studio: Studio) -> Metrics:
    """Strict share by guidance, and the guidance it is highest at."""
    out: Metrics = {}
    task = config.sweep_task() if config.guidances else None
    for guidance in config.guidances:
        assert task is not None
        sampler = replace(how.guided, guidance=guidance)
        made = studio.paint(task.wanted, sampler, f"guidance {guidance:g}").pixels
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
    console, how = Console(stderr=True), samplers(config)
    eyes = _eyes(config)
    opened = open_policy(_opening(config))
    target = destination(config, opened)
    folder = target.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, threads(config.threads):
        studio = _studio(config, _opening(config), opened, console, stack)
        metrics: Metrics = {}
        if config.guidances:
            metrics |= sweep(config, how, studio)
        made, axes = generation(config, how, studio, folder)
        if "recon" in config.parts:
            metrics = reconstruction(config, opened, folder) | metrics
        metrics |= made | axes
        if eyes is not None:
            sides = _sides(config, how, studio, stack)
            metrics |= comparison.compare(config.tasks(), sides, eyes, folder)
    result = report(
        "evaluate",
        time.monotonic() - began,
        metrics,
        model=config.model,
        slot=opened.slot,
        step=opened.step,
        settings=_recorded(config, how),
        pictures=sorted(str(p) for p in folder.glob("*.png")),
    )
    atomic_write_text(target, json_text(result))
    console.print(f"written: {target}", highlight=False)
    return result


def _opening(config: Config) -> Opening:
    return Opening(
        model=config.model,
        checkpoint=config.checkpoint,
        slot=config.slot,
        device=config.device,
        dtype=config.dtype,
    )


def _eyes(config: Config) -> Eyes | None:
    if config.teacher is None:
        return None
    return Eyes.of(config.features, config.judges, config.device or "cpu", config.rows)


def _studio(
    config: Config, opening: Opening, opened: Opened, console: Console, stack: ExitStack
) -> Studio:
    """A studio that is closed with the stack."""
    made = Studio.of(opening, opened.policy, console, config.rows, config.workers, config.threads)
    stack.callback(made.workers.close)
    return made


def _sides(config: Config, how: Samplers, studio: Studio, stack: ExitStack) -> dict[str, Side]:
    """The model, and those that it is compared with; one that is both is opened once."""
    sides = {STUDENT: Side(studio=studio, sampler=how.of(how.settings[0]))}
    opened: dict[str, Studio | Album] = {}
    for name, model, sampler in (
        (TEACHER, config.teacher, how.teacher),
        (BASELINE, config.baseline, how.baseline),
    ):
        if model is None or sampler is None:
            continue
        if model not in opened:
            opening = Opening(model=model, device=config.device, dtype=config.dtype)
            one = open_policy(opening)
            made = opened[model] = _studio(config, opening, one, studio.console, stack)
            if config.album is not None:
                maker, folder = checksum(_weights(one.policy)), Path(config.album)
                opened[model] = Album(studio=made, folder=folder, maker=maker)
        sides[name] = Side(studio=opened[model], sampler=sampler)
    return sides


def _weights(policy: PipelinePolicy) -> dict[str, Tensor]:
    """All that its pictures depend on."""
    pipeline = policy.pipeline
    parts = {"transformer": pipeline.transformer, "vae": pipeline.vae}
    parts |= {n: m for n, m in pipeline.components.items() if n.startswith("text_encoder") and m}
    return {f"{n}.{key}": t for n, m in parts.items() for key, t in m.state_dict().items()}


def _recorded(config: Config, how: Samplers) -> dict[str, Any]:
    out = {name: getattr(config, name) for name in RECORDED}
    out |= {"steps": how.guided.steps, "guidance": how.guided.guidance}
    if how.teacher is not None:
        out |= {name: getattr(config, name) for name in BESIDE} | {"judges": list(config.judges)}
        out |= {"teacher_steps": how.teacher.steps, "teacher_guidance": how.teacher.guidance}
    return out


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
    tasks, how = config.tasks(), samplers(config)
    total = sum(len(w.seeds) for t in tasks for w in t.wanted)
    painted = [how.of(setting) for setting in how.settings]
    if how.teacher is not None:
        beside = (how.of(how.settings[0]), how.teacher, how.baseline)
        painted += [sampler for sampler in beside if sampler is not None]
    each = sum(sampler.forwards(1) for sampler in painted)
    swept = len(config.guidances) * config.n * how.guided.steps * 2
    return "\n".join(
        [
            f"{len(tasks)} kinds of prompt, {total} pictures in each of {', '.join(how.settings)}",
            f"{total * each + swept} forwards (rows), {config.workers} process(es)",
        ]
    )
