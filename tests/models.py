"""What tests need of small encoders."""

import torch.nn.functional as F
from torch import Tensor, nn

from hourglass.encoders.registry import family_of
from hourglass.encoders.vit.model import absolute_positions


def embed_vit(vit: nn.Module, image: Tensor) -> Tensor:
    """What a ViT's blocks get: (B, H, W, C)."""
    tokens = vit.patch_embed(image)
    if vit.pos_embed is None:
        return tokens
    return tokens + absolute_positions(vit.pos_embed, vit.pretrain_use_cls_token, tokens.shape[1:3])


def embed_swin(swin: nn.Module, image: Tensor) -> Tensor:
    """What a Swin's first stage gets: (B, H, W, C)."""
    patches = swin.patch_embed(image)
    if swin.ape:
        positions = swin.absolute_pos_embed
        patches = patches + F.interpolate(positions, size=patches.shape[-2:], mode="bicubic", align_corners=False)
    return patches.permute(0, 2, 3, 1)


def placed(encoder: nn.Module, block: nn.Module, fast: bool = False) -> nn.Module:
    """A view of an encoder's block that runs on placed tokens."""
    return family_of(encoder).placed(block, fast)
