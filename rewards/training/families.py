"""What `rlhf reward train` trains, behind one face: judges on towers, or one on a vision-language
model. A family computes logits by axis, names what is learnt, and gives judges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rewards.backbones.towers import open_towers, save_towers
from rewards.errors import RewardConfigError
from rewards.judge import Judge
from rewards.trained import KINDS, TowersJudge, TowersModel, kind_of, save_judge, towers_at
from rewards.training.heads import HeadConfig
from rewards.types import JudgeCard, Sample


@runtime_checkable
class Family(Protocol):
    """See the module. `heads` names what the axes' logits come from."""

    @property
    def heads(self) -> Sequence[str]: ...

    def __call__(
        self, samples: Sequence[Sample], wanted: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Logits (B, L) by head, of the samples at `wanted[head]`."""
        ...

    def learned(self) -> dict[str, nn.Parameter]: ...

    def train(self, on: bool) -> None: ...

    def judges(self) -> dict[str, Any]:
        """The judges by axis, as they stand; their `card` may be replaced."""
        ...

    def save(self, folder: Path, judges: Mapping[str, Any], readme: str) -> None:
        """Write each judge to `folder/<axis>`."""
        ...


def raw_of(judge: Judge, samples: Sequence[Sample]) -> list[float | None]:
    """Uncalibrated values in [0, 1] that a judge of either family gives, None where it failed."""
    scores = judge.score(samples)
    return [None if s.value is None else s.parts["raw"] for s in scores]


TowersTrained = Literal["full", "locked", "heads"]
"""What is trained beside the heads: both towers; the text tower alone, the image tower locked as in
LiT (arXiv:2111.07991); or neither.
"""

# --- towers --------------------------------------------------------------------------------------


def heads_of(
    judges: Sequence[str], instead: Mapping[str, HeadConfig] | None = None
) -> dict[str, HeadConfig]:
    """All heads that these judges need, each once, with some of them in another form."""
    out: dict[str, HeadConfig] = {}
    for judge in judges:
        own = kind_of(judge).HEADS if judge in KINDS else {judge: HeadConfig()}
        out |= {name: (instead or {}).get(name, config) for name, config in own.items()}
    return out


class TowersFamily:
    """Judges with heads on two towers, which they share.

    `towers`: a folder or hub id, "scenes" for those that ship. `trained`: see `TowersTrained`.
    """

    def __init__(
        self,
        axes: Sequence[str],
        towers: str,
        *,
        trained: TowersTrained,
        heads: Mapping[str, HeadConfig] | None = None,
        floor: float = 0.0,
        device: str = "cpu",
    ) -> None:
        self.axes, self.trained, self.floor = axes, trained, floor
        self.dtype = torch.float32  # of what is written
        self.source = str(Path(towers).absolute()) if Path(towers).is_dir() else towers
        opened = open_towers(towers_at(self.source), device)
        self.model = TowersModel(opened, heads_of(axes, heads)).to(device)
        opened.requires_grad_(trained != "heads")
        opened.clip.visual.requires_grad_(trained == "full")
        self.heads = list(self.model.heads)

    def __call__(
        self, samples: Sequence[Sample], wanted: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return self.model(samples, wanted)

    def learned(self) -> dict[str, nn.Parameter]:
        """All that requires a gradient and that some head reaches."""
        idle = tuple(f"towers.{name}" for name in self.model.towers.unreached())
        named = self.model.named_parameters()
        return {n: p for n, p in named if p.requires_grad and not n.startswith(idle)}

    def train(self, on: bool) -> None:
        self.model.train(on)

    @torch.no_grad()
    def round(self, dtype: torch.dtype) -> None:
        """Give every weight that will be written as `dtype` the value that it will then have."""
        self.dtype = dtype
        written = self.model.heads if self.trained == "heads" else self.model
        for parameter in written.parameters():
            parameter.copy_(parameter.to(dtype))
        self.model.towers.forget()

    def judges(self) -> dict[str, TowersJudge]:
        return {axis: self._judge(axis) for axis in self.axes}

    def _judge(self, axis: str) -> TowersJudge:
        kind, model = kind_of(axis), self.model
        names = list(kind.HEADS) or [axis]
        part = TowersModel.of(model.towers, {n: (model.configs[n], model.heads[n]) for n in names})
        card = JudgeCard(
            name=axis,
            revision="training",
            preprocessing=f"letterbox-{model.towers.side}",
            categories=kind.CATEGORIES,
            needs=kind.NEEDS,
            text_tokens=model.towers.context if part.reads else None,
            pixels=model.towers.side,
        )
        return kind(part, card, axis, {"floor": self.floor} if axis == "consistency" else {})

    def save(self, folder: Path, judges: Mapping[str, TowersJudge], readme: str) -> None:
        source = self.source
        if self.trained != "heads":
            save_towers(self.model.towers, folder / "towers", self.dtype)
            source = "../towers"
        for axis, judge in judges.items():
            save_judge(folder / axis, judge, source, readme, self.dtype)


# --- vision-language models ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmConfig:
    """A Qwen3-VL by folder or hub id; `rank` of its adapters. `kind`: whose rubric it is asked, one
    of the five.
    """

    base: str = "Qwen/Qwen3-VL-8B-Instruct"
    rank: int = 32
    levels: int = 5
    text_tokens: int = 512
    pixels: int = 1024
    rationale_tokens: int = 0
    kind: Literal["", "aesthetics", "fidelity", "portrait", "instruction", "consistency"] = ""


class VlmFamily:
    """One judge: a vision-language model with low-rank adapters, asked the rubric of its axis."""

    def __init__(self, axis: str, config: VlmConfig, device: str = "cpu") -> None:
        from rewards.backbones.vlm import VlmSettings, add_lora
        from rewards.backbones.vlm_folder import open_base
        from rewards.rubric import RUBRICS

        kind = config.kind or axis
        if kind not in RUBRICS:
            raise RewardConfigError(
                f"vlm.kind: expected whose rubric {axis!r} is asked, one of"
                f" {', '.join(RUBRICS)}: write vlm.kind={next(iter(RUBRICS))}"
            )
        settings = VlmSettings(
            rubric=RUBRICS[kind],
            levels=config.levels,
            text_tokens=config.text_tokens,
            pixels=config.pixels,
            rationale_tokens=config.rationale_tokens,
        )
        self.axis, self.config, self.heads = axis, config, [axis]
        self.model = open_base(config.base, settings).to(device)
        add_lora(self.model, config.rank)

    def __call__(
        self, samples: Sequence[Sample], wanted: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """One call for each layout, in the order of the samples."""
        index = wanted[self.axis].tolist()
        requests = [self.model.request(samples[i], self._lead()) for i in index]
        layouts: dict[Any, list[int]] = {}
        for place, request in enumerate(requests):
            layouts.setdefault(self.model.layout(request), []).append(place)
        rows: list[Tensor] = [torch.empty(0)] * len(index)
        for places in layouts.values():
            found = self.model(self.model.collate([requests[p] for p in places]))
            for place, row in zip(places, found, strict=True):
                rows[place] = row
        return {self.axis: torch.stack(rows)} if rows else {}

    def _lead(self) -> str:
        from rewards.backbones.vlm_text import lead

        return lead("")

    def learned(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def train(self, on: bool) -> None:
        self.model.train(on)

    def judges(self) -> dict[str, Any]:
        from rewards.backbones.vlm import VlmJudge

        kind = kind_of(self.axis)
        card = self.model.settings.card(
            name=self.axis,
            revision="training",
            categories=kind.CATEGORIES,
        )
        self.model.eval()
        return {self.axis: VlmJudge(self.model, card, str(self.model.model.device))}

    def save(self, folder: Path, judges: Mapping[str, Any], readme: str) -> None:
        from rewards.backbones.vlm_folder import save

        base = self.config.base
        if Path(base).is_dir():
            base = str(Path(base).absolute())
        for axis, judge in judges.items():
            save(self.model, folder / axis, base=base, card=judge.card, readme=readme)
