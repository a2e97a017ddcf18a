"""The embedded model: every component of `QwenImage21Pipeline`, tiny and offline.

The classes are the stock ones; only sizes differ. The tokenizer is a byte-level BPE made in place
from captions, with the special tokens and the chat template the pipeline expects, and capital
letters kept apart so that the letters of a sign are tokens of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from rlhf.models.autoencoder import Autoencoder, tiny_autoencoder
from rlhf.models.gelu import GeluShiftTransformer2DModel

TransformerBlock = Literal["swiglu", "gelu"]
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SYSTEM = "Comprehend and analyze the provided prompt."
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(captions: Iterable[str], vocab_size: int = 768) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `captions`; every byte is covered, so any prompt can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[A-Z]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [SYSTEM, "system user assistant", *captions],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=CHAT,
        padding_side="left",
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, max_side: int = 256) -> Qwen3VLProcessor:
    """One merged vision token covers 32 px, the 2x2 latents the transformer expands it into."""
    patch: dict[str, Any] = dict(patch_size=16, merge_size=2, temporal_patch_size=2)
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=32 * 32, max_pixels=max_side**2, **patch),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**patch),
        chat_template=tokenizer.chat_template,
    )


def make_text_encoder(
    tokenizer: PreTrainedTokenizerFast, hidden: int = 128, layers: int = 3
) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL with random weights, a vision tower of two layers and heads of 32."""

    def ids(token: str) -> Any:
        return tokenizer.convert_tokens_to_ids(token)

    config = Qwen3VLConfig(
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            head_dim=32,
            max_position_embeddings=4096,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[6, 5, 5]),
        ),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=2,
            out_hidden_size=hidden,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
            num_position_embeddings=256,
            deepstack_visual_indexes=[0],
        ),
    )
    return Qwen3VLForConditionalGeneration(config).eval()


def make_transformer(
    layers: int = 6,
    heads: int = 4,
    head_dim: int = 64,
    context: int = 128,
    latents: int = 64,
    axes: tuple[int, int, int] | None = None,
    block: TransformerBlock = "swiglu",
) -> QwenImage21Transformer2DModel:
    """A `QwenImage21Transformer2DModel` of width heads * head_dim; of each head a quarter is the
    frame axis, unless `axes` says how it is divided. `block` gelu is `rlhf.models.gelu`.
    """
    side = 3 * head_dim // 8
    made = QwenImage21Transformer2DModel if block == "swiglu" else GeluShiftTransformer2DModel
    return made(
        in_channels=latents,
        out_channels=latents,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        context_in_dim=context,
        mlp_ratio=3,
        axes_dims_rope=axes or (head_dim - 2 * side, side, side),
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The published sampling shift: 0.5 at 256 tokens to 0.9 at 8192, terminal sigma 0.02."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        base_shift=0.5,
        max_shift=0.9,
        shift_terminal=0.02,
    )


def assemble(
    vae: Autoencoder,
    text_encoder: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    transformer: QwenImage21Transformer2DModel,
) -> QwenImage21Pipeline:
    """A stock pipeline of the given parts, in evaluation mode."""
    return QwenImage21Pipeline(
        scheduler=make_scheduler(),
        vae=vae.eval(),  # pyright: ignore[reportArgumentType]  # or one with the same calls
        text_encoder=text_encoder.eval(),
        processor=processor,
        transformer=transformer.eval(),
    )


def random_pipeline(seed: int = 0, *, layers: int = 2, width: int = 64) -> QwenImage21Pipeline:
    """A complete pipeline with random weights, for tests: width `width`, 64 px patches of any size
    divisible by 32.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(["a red circle left of a blue square on white"])
    return assemble(
        tiny_autoencoder(),
        make_text_encoder(tokenizer, hidden=64, layers=2),
        make_processor(tokenizer),
        make_transformer(layers=layers, heads=width // 32, head_dim=32, context=64),
    )
