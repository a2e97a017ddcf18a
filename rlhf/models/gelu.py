"""The transformer block that Qwen-Image-2.0 left: GELU and scale-and-shift modulation.

The report (arXiv:2605.10730) gives SwiGLU and modulation without a shift as its remedy for massive
activations (arXiv:2402.17762). This is the stock transformer with both undone, as in
arXiv:2212.09748: h (1 + scale) + shift before attention and MLP and before the last layer, and
out(gelu(proj(h))). Attention, positions, masks, caches, checkpointing and tanh gates are the stock
class's own code.

A GELU layer has two matrices where SwiGLU has three, so it is 1.5 times as wide at equal weights;
the shifts add 3 width^2 (shared by all blocks) to the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, QwenImage21Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21AdaLayerNormContinuous,
    QwenImage21TransformerBlock,
)
from jaxtyping import Float
from torch import Tensor, nn


class GeluFeedForward(nn.Module):
    """out(gelu(proj(x))) without biases, tanh approximation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.out(F.gelu(self.proj(x), approximate="tanh"))


def _of_tokens(rows: Tensor, target: Tensor | None) -> Tensor:
    """Modulation of every token: (B, 1, D), or with a mask (N,) of target tokens, whose rows are
    all but the last, (B, N, D); the others read the last row, of t = 0.
    """
    if target is None:
        return rows.unsqueeze(1)
    return torch.where(target.view(1, -1, 1), rows[:-1].unsqueeze(1), rows[-1:].unsqueeze(0))


class GeluShiftBlock(QwenImage21TransformerBlock):
    """The stock block whose halves of the modulation hold shift, scale and gate."""

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: int = 3,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, num_attention_heads, attention_head_dim, mlp_ratio, eps)
        self.img_mlp = GeluFeedForward(dim, 3 * mlp_ratio * dim // 2)

    def _modulate(
        self, hidden_states: Tensor, mod_params: Tensor, target_token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        parts = (_of_tokens(part, target_token_mask) for part in mod_params.chunk(3, dim=-1))
        shift, scale, gate = parts
        return hidden_states * (1 + scale) + shift, gate


class ShiftedNorm(QwenImage21AdaLayerNormContinuous):
    """The stock last norm with a shift: `linear` gives shift and scale."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, dim, eps=eps)
        self.linear = nn.Linear(dim, 2 * dim, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        conditioning_embedding: Tensor,
        target_token_mask: Tensor | None = None,
    ) -> Tensor:
        rows = self.linear(self.silu(conditioning_embedding).to(hidden_states.dtype))
        shift, scale = (_of_tokens(part, target_token_mask) for part in rows.chunk(2, dim=-1))
        return self.norm(hidden_states) * (1 + scale) + shift


# A pipeline loads classes of other packages if their module knows ModelMixin by name.
class GeluShiftTransformer2DModel(QwenImage21Transformer2DModel, ModelMixin):
    """Stands in for the stock transformer in `QwenImage21Pipeline`, with its configuration.

    `mlp_ratio` is that of the SwiGLU it is compared with: the GELU layer is 1.5 `mlp_ratio` times
    the width.
    """

    _no_split_modules = ["GeluShiftBlock"]
    _repeated_blocks = ["GeluShiftBlock"]
    _tp_plan = {
        layer: how
        for layer, how in (QwenImage21Transformer2DModel._tp_plan or {}).items()
        if not layer.endswith("gate_layer")
    }

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = 64,
        num_layers: int = 32,
        attention_head_dim: int = 128,
        num_attention_heads: int = 32,
        context_in_dim: int = 4096,
        mlp_ratio: int = 3,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        eps: float = 1e-6,
        causal_condition: bool = True,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=0,  # its blocks are not the stock ones
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            context_in_dim=context_in_dim,
            mlp_ratio=mlp_ratio,
            axes_dims_rope=axes_dims_rope,  # pyright: ignore[reportArgumentType]  # a list from JSON
            eps=eps,
            causal_condition=causal_condition,
        )
        self.register_to_config(num_layers=num_layers)
        width = self.inner_dim
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width, bias=False))
        self.transformer_blocks = nn.ModuleList(
            GeluShiftBlock(width, num_attention_heads, attention_head_dim, mlp_ratio, eps)
            for _ in range(num_layers)
        )
        self.norm_out = ShiftedNorm(width, eps=eps)
