"""Teaching a vision-language judge to say why before it scores, with TRL's SFTTrainer.

An example is the judge's own request followed by a rationale and the score it argues for; the loss
is on the answer alone. Choose rationales whose score agrees with the label (arXiv 2604.11626).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.backbones import vlm_text
from rewards.backbones.vlm import VlmRewardModel
from rewards.errors import DataError
from rewards.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Rationale:
    """Why `sample` deserves `score` in 1..L."""

    sample: Sample
    text: str
    score: int


def conversation(model: VlmRewardModel, rationale: Rationale) -> dict[str, Any]:
    """{"images", "prompt", "completion"} as SFTTrainer reads them, the pictures as the judge will
    see them.

    Raises:
        DataError: a score off the scale, no words, or words that the judge could not read back.
    """
    if not rationale.text.strip():
        raise DataError("expected a rationale in words, got none: leave the example out")
    said = vlm_text.answer(
        rationale=rationale.text, score=rationale.score, levels=model.settings.levels
    )
    turns, request = model.conversation(rationale.sample)
    return {
        "images": list(request.pictures),
        "prompt": turns,
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": said}]}],
    }


def train_rationales(
    model: VlmRewardModel,
    rationales: Sequence[Rationale],
    *,
    steps: int,
    scratch: Path,
    lr: float = 1e-5,
    batch: int = 4,
    seed: int = 0,
) -> list[float]:
    """Train the parameters that require a gradient in place, where the model is (in bfloat16 unless
    that is the CPU); the loss of each step.

    What the trainer writes stays in `scratch`, and nothing reads it later. Sets torch's global
    seed, as every trainer of transformers does.

    Raises:
        DataError: no example, or one that cannot be used.
    """
    if not rationales:
        raise DataError("expected rationales to learn from, got none")
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    cpu = model.model.device.type == "cpu"
    config = SFTConfig(
        output_dir=str(scratch),
        max_steps=steps,
        learning_rate=lr,
        per_device_train_batch_size=batch,
        seed=seed,
        completion_only_loss=True,
        max_length=None,
        use_cpu=cpu,
        bf16=not cpu,
        dataloader_pin_memory=not cpu,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model.model,
        args=config,
        train_dataset=Dataset.from_list([conversation(model, one) for one in rationales]),
        processing_class=model.processor,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
