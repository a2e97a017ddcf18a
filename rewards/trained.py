"""Judges that were trained: a folder with a card, heads, and the name of the towers they stand on.

    card.json           {"family": "towers", "axis": ..., "towers": folder or hub id, "heads": ...}
                        and what every judge has (`rewards.folder`)
    heads.safetensors   "<head>.<parameter>"

Of family "vlm", see `rewards.backbones.vlm`. What is particular to one of the five judges is in the
file of its name; any other axis is `TowersJudge` as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rewards import golden
from rewards.backbones.limits import DOWNSCALED, TRUNCATED
from rewards.backbones.towers import Towers, open_towers
from rewards.errors import RewardConfigError
from rewards.folder import read_card, read_weights, write_folder
from rewards.judge import Judge
from rewards.training.heads import HeadConfig, Tokens, make_head
from rewards.training.losses import expectation
from rewards.types import Calibration, JudgeCard, Sample, Score, card_of, failed

SHIPPED = Path(__file__).parent / "assets" / "judges"
HEADS = "heads.safetensors"
CHUNK = 64  # pictures in one call
KINDS = {
    "aesthetics": "Aesthetics",
    "fidelity": "Fidelity",
    "portrait": "Portrait",
    "instruction": "Instruction",
    "consistency": "Consistency",
}


class TowersModel(nn.Module):
    """Towers with heads by name; `forward` computes each token once, whichever heads want it."""

    def __init__(self, towers: Towers, heads: Mapping[str, HeadConfig]) -> None:
        super().__init__()
        self.towers, self.configs = towers, dict(heads)
        self.heads = nn.ModuleDict(
            {name: make_head(config, towers.sizes) for name, config in heads.items()}
        )

    @property
    def reads(self) -> bool:
        """Whether a head sees the prompt."""
        return any(config.text for config in self.configs.values())

    @staticmethod
    def of(towers: Towers, heads: Mapping[str, tuple[HeadConfig, nn.Module]]) -> TowersModel:
        """The same towers with heads that are there already."""
        model = TowersModel(towers, {})
        model.configs = {name: config for name, (config, _) in heads.items()}
        model.heads = nn.ModuleDict({name: head for name, (_, head) in heads.items()})
        return model

    def tokens(self, samples: Sequence[Sample], text: bool, source: bool) -> Tokens:
        """Tokens of B samples; equal pictures and prompts are computed once."""
        pictures = [s.image for s in samples]
        if source:
            pictures += [s.sources[0] for s in samples]
        unique, where = _unique(pictures, [p.tobytes() for p in pictures])
        found, pooled = (part[where] for part in self.towers.see(unique))
        texts = words = None
        if text:
            prompts, which = _unique([s.prompt for s in samples], [s.prompt for s in samples])
            texts, words = (part[which] for part in self.towers.text_tokens(prompts))
        count = len(samples)
        return Tokens(
            image=found[:count],
            pooled=pooled[:count],
            source=found[count:] if source else None,
            pooled_source=pooled[count:] if source else None,
            text=texts,
            words=words,
        )

    def forward(
        self, samples: Sequence[Sample], wanted: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What each head says: of the samples at `wanted[name]`, or of all."""
        wanted = wanted or {name: torch.arange(len(samples)) for name in self.heads}
        edits = [name for name in wanted if self.configs[name].source]
        made = [name for name in wanted if not self.configs[name].source]
        out: dict[str, Tensor] = {}
        for names, source in ((made, False), (edits, True)):
            if not names:
                continue
            rows = torch.cat([wanted[name] for name in names]).unique()
            place = torch.full((len(samples),), -1)
            place[rows] = torch.arange(len(rows))
            text = any(self.configs[name].text for name in names)
            tokens = self.tokens([samples[i] for i in rows.tolist()], text, source)
            for name in names:
                out[name] = self.heads[name](tokens.rows(place[wanted[name]]))
        return out


def _unique(items: Sequence[Any], keys: Sequence[Any]) -> tuple[list[Any], Tensor]:
    """The items that differ, and where each of the given ones is among them."""
    place: dict[Any, int] = {}
    unique = []
    for item, key in zip(items, keys, strict=True):
        if key not in place:
            place[key] = len(unique)
            unique.append(item)
    return unique, torch.tensor([place[key] for key in keys])


class TowersJudge:
    """One axis on towers: value = calibration((E - 1) / (L - 1)), E the expected level of its head.

    Samples longer than the text tower reads, or larger than the image tower sees, are flagged.
    """

    AXIS: ClassVar[str] = ""
    HEADS: ClassVar[Mapping[str, HeadConfig]] = {}
    CATEGORIES: ClassVar[tuple[str, ...]] = ("*",)
    NEEDS: ClassVar[tuple[Any, ...]] = ()

    def __init__(
        self,
        model: TowersModel,
        card: JudgeCard,
        axis: str,
        settings: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.card, self.axis = model, card, axis
        self.settings = dict(settings or {})

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample; each is independent of the others, up to 1e-6 of rounding."""
        out: list[Score] = []
        for start in range(0, len(samples), CHUNK):
            part = samples[start : start + CHUNK]
            with torch.no_grad():
                said = {name: v.float().cpu() for name, v in self.model(part).items()}
            for i, sample in enumerate(part):
                out.append(self._judged({name: v[i] for name, v in said.items()}, sample))
        return out

    def _judged(self, said: Mapping[str, Tensor], sample: Sample) -> Score:
        """One score; `failed` where a head does not answer in numbers, whatever the others say."""
        broken = [name for name, logits in said.items() if not bool(logits.isfinite().all())]
        if broken:
            return failed(f"what the heads {', '.join(broken)} say is not finite")
        raw, parts = self.answer(said, sample)
        value = self.card.calibration(raw)
        return Score(value=value, parts={"raw": raw, **parts}, flags=self.flags(sample))

    def answer(
        self, said: Mapping[str, Tensor], sample: Sample
    ) -> tuple[float, Mapping[str, float]]:
        """The uncalibrated value in [0, 1] of one sample, and what it was made of."""
        return level(said[self.axis]), {}

    def flags(self, sample: Sample) -> tuple[str, ...]:
        """What was cut or scaled down before the model saw it."""
        towers, found = self.model.towers, []
        if self.model.reads and towers.truncated(sample.prompt):
            found.append(TRUNCATED)
        if max(sample.image.shape[1:]) > towers.side:
            found.append(DOWNSCALED)
        return tuple(found)

    def fresh(self, seed: int = 0) -> TowersJudge:
        """The same with heads and towers that nobody trained: a baseline, never a reward."""
        import copy

        model = copy.deepcopy(self.model)
        model.towers.forget()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread
        card = replace(self.card, name=f"untrained/{self.card.name}", calibration=Calibration())
        return type(self)(model, card, self.axis, self.settings)


def level(logits: Tensor) -> float:
    """(E - 1) / (L - 1) in [0, 1] of one row of logits."""
    return float((expectation(logits) - 1) / (logits.shape[-1] - 1))


# --- folders -------------------------------------------------------------------------------------


def towers_at(source: str, folder: Path = Path()) -> str:
    """For `open_towers`: "scenes" are those that ship; else a path seen from `folder`, a hub id."""
    if source == "scenes":
        return str(SHIPPED / "towers")
    return str((folder / source).resolve()) if (folder / source).is_dir() else source


def shared_towers(source: str) -> Towers:
    """Towers by folder or hub id, opened once in a process and again where their files changed."""
    files = [p for p in Path(source).glob("*") if p.is_file()] if Path(source).is_dir() else []
    stamps = ((p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(files))
    return _towers_as_of(source, tuple(stamps))


@lru_cache(maxsize=4)
def _towers_as_of(source: str, stamps: tuple[object, ...]) -> Towers:
    return open_towers(source)


def kind_of(axis: str) -> type[TowersJudge]:
    """The class of an axis: its own for the five, else the plain one."""
    if axis not in KINDS:
        return TowersJudge
    return getattr(import_module(f"rewards.{axis}"), KINDS[axis])


def save_judge(
    folder: Path,
    judge: TowersJudge,
    towers: str,
    readme: str = "",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a judge's folder; `towers` is "scenes", a hub id, or a path seen from it.

    Raises:
        RewardConfigError: the folder exists.
        JudgeError: the judge does not answer.
    """
    heads = {k: asdict(v) for k, v in judge.model.configs.items()}
    about: dict[str, Any] = {"family": "towers", "axis": judge.axis, "towers": towers}
    about |= {"heads": heads, "settings": judge.settings}
    weights = {k: v.to(dtype) for k, v in judge.model.heads.state_dict().items()}
    written = {**about, "card": asdict(judge.card)}

    def reopen(part: Path) -> TowersJudge:
        local = Path(towers_at(towers, part)).is_dir()  # as they were rounded, if they were
        return _of_card(part, written, None if local else judge.model.towers)

    write_folder(folder, about, judge.card, {HEADS: weights}, readme, reopen)


def open_judge(folder: str | Path) -> Judge:
    """The judge in a folder.

    Raises:
        RewardConfigError: no judge there, weights that do not fit its card, or golden scores that
            moved.
    """
    folder = Path(folder)
    about = read_card(folder)
    if about["family"] == "vlm":
        from rewards.backbones.vlm_folder import load_vlm_judge

        return load_vlm_judge(folder)
    judge = _of_card(folder, about)
    golden.check(judge, about.get("golden"))
    return judge


def _of_card(folder: Path, about: Mapping[str, Any], towers: Towers | None = None) -> TowersJudge:
    """The judge of a folder on the towers its card names, or on these."""
    if towers is None:
        towers = shared_towers(towers_at(about["towers"], folder))
    model = TowersModel(towers, {k: HeadConfig(**v) for k, v in about["heads"].items()})
    weights = read_weights(folder / HEADS)
    try:
        model.heads.load_state_dict({k: v.float() for k, v in weights.items()})
    except RuntimeError as error:
        raise RewardConfigError(
            f"expected the weights of {list(about['heads'])} in '{folder / HEADS}': {error}"
        ) from error
    model.to(towers.device).eval().requires_grad_(False)
    axis, settings = about["axis"], about.get("settings", {})
    return kind_of(axis)(model, card_of(about["card"]), axis, settings)
