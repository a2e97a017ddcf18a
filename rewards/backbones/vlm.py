"""A judge that is a vision-language model (Qwen3-VL), after arXiv 2606.27608: it is shown the
pictures and a rubric and answers a digit; the score is the expectation over the digits' tokens.

    E = sum_l l softmax(logits)_l in [1, L],  value = calibration((E - 1) / (L - 1)),  z = E_a - E_b
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from rewards.backbones import vlm_text
from rewards.backbones.limits import DOWNSCALED, TRUNCATED
from rewards.errors import JudgeError, RewardConfigError
from rewards.images import to_pil
from rewards.rubric import Rubric
from rewards.training.losses import expectation
from rewards.types import Calibration, JudgeCard, Sample, Score, failed, not_applicable

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmSettings:
    """How pictures and words are put to the model.

    `text_tokens`: of the prompt, the rest is cut. `pixels`: of the longer side, larger pictures are
    scaled down. `rationale_tokens`: most it may think before the score, 0 answers at once.

    Raises:
        RewardConfigError: a number out of its range.
    """

    rubric: Rubric
    levels: int = 5
    text_tokens: int = 512
    pixels: int = 1024
    rationale_tokens: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 9 or min(self.text_tokens, self.pixels) < 1:
            raise RewardConfigError(
                f"expected 2 to 9 levels and limits of at least 1, got {self.levels} levels,"
                f" text_tokens {self.text_tokens} and pixels {self.pixels}"
            )

    def card(self, *, name: str, revision: str = "", **fields: Any) -> JudgeCard:
        """A card with these limits and a hash of all that is put to the model."""
        known = repr((self.rubric, self.levels, self.text_tokens, self.rationale_tokens))
        return JudgeCard(
            name=name,
            revision=revision,
            preprocessing=f"vlm-{self.pixels}-{hashlib.sha256(known.encode()).hexdigest()[:12]}",
            needs=("source",) if self.rubric.sources else (),
            text_tokens=self.text_tokens,
            pixels=self.pixels,
            **fields,
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One sample as the model is asked about it, before tokens."""

    text: str  # after the chat template, up to where the assistant speaks
    pictures: tuple[Image.Image, ...]  # sources first
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VlmInputs:
    """A batch for the model, padded on the left: the last position is the one that answers."""

    tensors: dict[str, Tensor]
    flags: tuple[tuple[str, ...], ...]


def pair_logit(first: Float[Tensor, "b l"], second: Float[Tensor, "b l"]) -> Float[Tensor, " b"]:
    """z = E_a - E_b in [1 - L, L - 1]; P(first is better) = sigmoid(z / temperature)."""
    return expectation(first) - expectation(second)


def score_tokens(tokenizer: Any, levels: int) -> list[int]:
    """The token of each digit where the answer stands.

    Raises:
        RewardConfigError: a digit is not one token, or not one of its own.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    before, found = encode(vlm_text.MARK), []
    for level in range(1, levels + 1):
        ids = encode(f"{vlm_text.MARK}{level}")
        if len(ids) != len(before) + 1 or ids[:-1] != before:
            raise RewardConfigError(
                f"expected the digit {level} after {vlm_text.MARK!r} to be one token, got ids"
                f" {ids} after {before}: take a tokenizer that splits digits"
            )
        found.append(ids[-1])
    if len(set(found)) != levels:
        raise RewardConfigError(f"expected {levels} different score tokens, got {found}")
    return found


class VlmRewardModel(nn.Module):
    """Logits over L levels from a vision-language model and its processor.

    Example: `model(model.prepare(samples))` is (B, L), float32.
    """

    def __init__(self, model: Any, processor: Any, settings: VlmSettings) -> None:
        super().__init__()
        self.model, self.processor, self.settings = model, processor, settings
        self.score_ids = score_tokens(processor.tokenizer, settings.levels)

    def _cut(self, prompt: str) -> tuple[str, bool]:
        tokenizer, most = self.processor.tokenizer, self.settings.text_tokens
        ids = tokenizer.encode(vlm_text.clean(prompt), add_special_tokens=False)
        if len(ids) <= most:
            return prompt, False
        return tokenizer.decode(ids[:most], clean_up_tokenization_spaces=False).rstrip("�"), True

    def _fit(self, image: Any) -> tuple[Image.Image, bool]:
        picture, most = to_pil(image), self.settings.pixels
        scale = most / max(picture.size)
        if scale >= 1:
            return picture, False
        size = [max(1, round(side * scale)) for side in picture.size]
        return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS), True

    def conversation(self, sample: Sample) -> tuple[list[dict[str, Any]], Request]:
        """The turn of the user, and the same as a request."""
        prompt, cut = self._cut(sample.prompt)
        sources = sample.sources if self.settings.rubric.sources else ()
        fitted = [self._fit(image) for image in (*sources, sample.image)]
        turns = vlm_text.messages(
            sources=len(sources),
            text=vlm_text.question(
                template=self.settings.rubric.text,
                prompt=prompt,
                levels=self.settings.levels,
                rationale=self.settings.rationale_tokens > 0,
            ),
        )
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        flags = (TRUNCATED,) * cut + (DOWNSCALED,) * any(shrunk for _, shrunk in fitted)
        return turns, Request(text, tuple(picture for picture, _ in fitted), flags)

    def request(self, sample: Sample, answer: str = "") -> Request:
        """What the model is asked; `answer` is what it is taken to have said already."""
        request = self.conversation(sample)[1]
        return Request(request.text + answer, request.pictures, request.flags)

    def layout(self, request: Request) -> tuple[Any, ...]:
        """Requests of one layout make a batch without padding."""
        ids = self.processor.tokenizer.encode(request.text, add_special_tokens=False)
        return len(ids), *(picture.size for picture in request.pictures)

    def collate(self, requests: Sequence[Request]) -> VlmInputs:
        """Tokens and pixels of a batch, on the CPU."""
        batch = self.processor(
            text=[request.text for request in requests],
            images=[picture for request in requests for picture in request.pictures],
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        return VlmInputs(dict(batch), tuple(self._flags(requests, batch["image_grid_thw"])))

    def _flags(self, requests: Sequence[Request], grids: Tensor) -> Iterable[tuple[str, ...]]:
        """The requests' flags, and those of pictures that the processor made smaller by more than
        its rounding.
        """
        shapes = self.processor.image_processor
        unit, seen = shapes.patch_size, iter(grids.tolist())
        for request in requests:
            shrunk = False
            for picture in request.pictures:
                _, rows, columns = next(seen)
                lost = max(picture.height - rows * unit, picture.width - columns * unit)
                shrunk |= lost >= unit * shapes.merge_size
            more = shrunk and DOWNSCALED not in request.flags
            yield request.flags + (DOWNSCALED,) * more

    def prepare(self, samples: Sequence[Sample], rationales: Sequence[str] = ()) -> VlmInputs:
        """A batch that ends where the digit comes, after the rationales if there are any."""
        said = list(rationales) or [""] * len(samples)
        pairs = zip(samples, said, strict=True)
        return self.collate([self.request(s, vlm_text.lead(r)) for s, r in pairs])

    def _placed(self, inputs: VlmInputs) -> dict[str, Tensor]:
        return {name: tensor.to(self.model.device) for name, tensor in inputs.tensors.items()}

    def forward(self, inputs: VlmInputs) -> Float[Tensor, "b l"]:
        """Logits over the levels; the head is computed in float32, whatever the model's dtype."""
        hidden = self.model.model(**self._placed(inputs)).last_hidden_state[:, -1]
        with torch.autocast(hidden.device.type, enabled=False):
            rows = self.model.get_output_embeddings().weight[self.score_ids]
            return hidden.float() @ rows.float().T

    @torch.no_grad()
    def think(self, inputs: VlmInputs) -> list[str]:
        """What the model writes by itself, greedily: `rationale_tokens` tokens and a score."""
        given = self._placed(inputs)
        ids = self.model.generate(
            **given,
            max_new_tokens=self.settings.rationale_tokens + 8,
            do_sample=False,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            eos_token_id=self.processor.tokenizer.eos_token_id,
        )
        new = ids[:, given["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)


def add_lora(model: VlmRewardModel, rank: int, alpha: int = 0) -> list[nn.Parameter]:
    """Freeze the model and put adapters on the linear maps of its language part.

    Returns the adapters' parameters. `alpha` is `rank` by default.

    Raises:
        RewardConfigError: a rank below 1, or adapters are there already.
    """
    from peft import LoraConfig

    if rank < 1 or getattr(model.model, "_hf_peft_config_loaded", False):
        raise RewardConfigError(f"expected rank >= 1 and no adapters yet, got rank {rank}")
    model.model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=LORA_TARGETS)
    model.model.add_adapter(config)
    return [p for p in model.parameters() if p.requires_grad]


class VlmJudge:
    """A `VlmRewardModel` as a judge.

    Requests are batched by equal layout, without padding, so a score does not depend on its
    neighbours. A reply without a score, or one off the scale, is `failed` with the reply's end as
    the reason; so are logits that are not finite. `parts` holds the expectation and, after a
    rationale, the digit `said`.
    """

    def __init__(
        self, model: VlmRewardModel, card: JudgeCard, device: str = "cpu", batch: int = 8
    ) -> None:
        if batch < 1:
            raise RewardConfigError(f"expected batch >= 1, got {batch}")
        self.model, self.card, self._batch = model.to(device).eval(), card, batch

    def _batched(
        self, requests: dict[int, Request], ask: Callable[[VlmInputs], Sequence[Any]]
    ) -> dict[int, tuple[Any, tuple[str, ...]]]:
        """index -> (answer, flags), asked in batches of equal layout."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in requests.items():
            groups.setdefault(self.model.layout(request), []).append(i)
        out: dict[int, tuple[Any, tuple[str, ...]]] = {}
        for members in groups.values():
            for start in range(0, len(members), self._batch):
                part = members[start : start + self._batch]
                inputs = self.model.collate([requests[i] for i in part])
                out |= zip(part, zip(ask(inputs), inputs.flags, strict=True), strict=True)
        return out

    def _rationales(
        self, samples: dict[int, Sample], out: list[Score]
    ) -> dict[int, tuple[str, int]]:
        asked = {i: self.model.request(sample) for i, sample in samples.items()}
        found: dict[int, tuple[str, int]] = {}
        for i, (reply, _) in self._batched(asked, self.model.think).items():
            try:
                found[i] = vlm_text.read_answer(reply=reply, levels=self.model.settings.levels)
            except JudgeError as error:
                out[i] = failed(str(error))
        return found

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample."""
        out = [not_applicable(f"{self.card.name} needs a source picture")] * len(samples)
        known = enumerate(samples)
        asked = {i: s for i, s in known if s.sources or not self.model.settings.rubric.sources}
        said: dict[int, tuple[str, int]] = {}
        if self.model.settings.rationale_tokens:
            said = self._rationales(asked, out)
            asked = {i: asked[i] for i in said}
        leads = {i: vlm_text.lead(said[i][0] if said else "") for i in asked}
        requests = {i: self.model.request(asked[i], leads[i]) for i in asked}
        read = self._batched(requests, lambda inputs: expectation(self.model(inputs)).tolist())
        for i, (value, flags) in read.items():
            more = {"said": float(said[i][1])} if said else {}
            out[i] = _to_score(
                value, self.model.settings.levels, self.card.calibration, flags, more
            )
        return out


def _to_score(
    value: float,
    levels: int,
    calibration: Calibration,
    flags: tuple[str, ...],
    parts: dict[str, float],
) -> Score:
    if not math.isfinite(value):
        return failed("the score tokens' logits are not finite")
    raw = (value - 1) / (levels - 1)
    return Score(
        value=calibration(raw),
        parts={"raw": raw, "expectation": value, **parts},
        flags=flags,
    )
