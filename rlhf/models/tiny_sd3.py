"""A tiny `StableDiffusion3Pipeline` with random weights, made offline, for tests and timing.

The classes are the stock ones, tokenizers included; only sizes differ. Vocabularies are single
characters, so that nothing has to be trained or fetched.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CLIP_TOKENS = 77
WIDTH = 32  # of each text encoder


def make_clip_tokenizer() -> CLIPTokenizer:
    """A token for each byte, inside a word and at its end; every text can be encoded."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_TOKENS)


def make_t5_tokenizer() -> T5Tokenizer:
    """A token for each printable character of ASCII, one for any other."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters = [(c, -2.0) for c in string.digits + string.ascii_letters + string.punctuation]
    return T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=512)


def make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Two layers, with the projection that gives the pooled vector."""
    ends: dict[str, Any] = {
        key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        **ends,
    )
    return CLIPTextModelWithProjection(config).eval()


def make_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Two layers, as wide as both CLIPs together."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=4
    )
    return T5EncoderModel(config).eval()


def make_autoencoder() -> AutoencoderKL:
    """16 channels at 8 px per latent, its shift and scale not trivial."""
    levels: dict[str, Any] = dict(  # four of them: three halvings
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        **levels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ).eval()


def random_sd3_pipeline(
    seed: int = 0, *, layers: int = 2, heads: int = 2, head_dim: int = 32, t5: bool = True
) -> StableDiffusion3Pipeline:
    """A complete pipeline of width heads * head_dim, for pictures of up to 512 px in steps of 16;
    its own size is 128, 64 tokens.
    """
    torch.manual_seed(seed)
    clip, t5_tokenizer = make_clip_tokenizer(), make_t5_tokenizer() if t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        caption_projection_dim=heads * head_dim,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=16,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )
    third: dict[str, Any] = {
        "text_encoder_3": make_t5(t5_tokenizer) if t5_tokenizer else None,
        "tokenizer_3": t5_tokenizer,
    }
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_autoencoder(),
        text_encoder=make_clip(clip),
        tokenizer=clip,
        text_encoder_2=make_clip(clip),
        tokenizer_2=make_clip_tokenizer(),
        **third,
    )
