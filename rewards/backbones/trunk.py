"""`small_resnet`: a convolutional image tower that one core trains in minutes. It is in timm's
registry, so that open_clip builds and opens it by its name like any other.

Pre-activation residual blocks (arXiv:1603.05027) of 3 x 3 convolutions with group norm; nothing is
normalised on the way from the pixels to the last map, so absolute colour gets through. The head
reads all places of that map by one linear layer, which fixes the size of the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from timm.models import register_model
from torch import Tensor, nn

SIDE = 64


class Block(nn.Module):
    """x + conv(gelu(conv(norm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.conv2(F.gelu(self.conv1(self.norm(x))))


class SmallResNet(nn.Module):
    """Maps of 32, 16 and 8 places a side, for pictures of 64 pixels; a stage doubles the width."""

    def __init__(
        self, num_classes: int, width: int = 16, blocks: Sequence[int] = (1, 1, 2)
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, 2, 1), nn.GELU())
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        for k, count in enumerate(blocks):
            here = width * 2**k
            down = [nn.Conv2d(here // 2, here, 2, 2)] if k else []
            self.stages.append(nn.Sequential(*down, *(Block(here) for _ in range(count))))
            about = {"num_chs": here, "reduction": 2 ** (k + 1), "module": f"stages.{k}"}
            self.feature_info.append(about)
        places = (SIDE // 2 ** len(blocks)) ** 2
        self.num_features = here * places
        self.head = nn.Sequential(
            nn.Flatten(1),
            nn.LayerNorm(self.num_features),
            nn.Linear(self.num_features, num_classes),
        )

    def forward_features(self, x: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, "b c 8 8"]:
        return self.forward_intermediates(x)[0]

    def forward_head(self, x: Float[Tensor, "b c 8 8"]) -> Float[Tensor, "b n"]:
        return self.head(x)

    def forward(self, x: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, "b n"]:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self, x: Float[Tensor, "b 3 64 64"], indices: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """The last map, and the maps of the stages at `indices`."""
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return x, [maps[i] for i in indices]


@register_model
def small_resnet(pretrained: bool = False, num_classes: int = 0, **_: Any) -> SmallResNet:
    """timm's entry point. Raises ValueError if asked for published weights: there are none."""
    if pretrained:
        raise ValueError("small_resnet: there are no published weights")
    return SmallResNet(num_classes)
