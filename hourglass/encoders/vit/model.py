"""
ViTDet's plain vision transformer and its simple feature pyramid (arXiv 2203.16527), with Detectron2's constructor
arguments and parameter names, so that published checkpoints load. Detectron2's main branch has both, the 0.6 release
has neither.

Letters: B batch, H x W tokens of the full map, h x w tokens of the map at hand, C channels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling import Backbone
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from hourglass.attention import attend, read_table
from hourglass.operators import is_symbolic
from hourglass.reduction.windows import map_size, partition, unpartition


class ChannelLayerNorm(nn.Module):
    """
    LayerNorm over the channels of a (B, C, H, W) map, at each position. Usable wherever Detectron2 takes a
    norm: ``norm=ChannelLayerNorm``.
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).square().mean(1, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class PatchEmbed(nn.Module):
    """Image (B, in_chans, height, width) to tokens (B, H, W, C), one for each square of ``patch_size`` pixels."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).permute(0, 2, 3, 1)


def absolute_positions(pos_embed: Tensor, has_cls_token: bool, size: tuple[int, int]) -> Tensor:
    """
    Position embeddings of a map, resized bicubically where it is not of the pretraining's size.

    Args:
        pos_embed: (1, positions, C); the positions after the class token's, if it has one, are a square.
        has_cls_token: whether the first position is the class token's.
        size: (H, W) of the map.

    Returns:
        (1, H, W, C)
    """
    grid = pos_embed[:, 1:] if has_cls_token else pos_embed
    side = math.isqrt(grid.shape[1])
    grid = grid.reshape(1, side, side, -1)
    # To the same size, which an open one may turn out to be, it is the identity.
    if is_symbolic(*size) or (side, side) != tuple(size):
        grid = F.interpolate(grid.permute(0, 3, 1, 2), size=size, mode="bicubic", align_corners=False)
        grid = grid.permute(0, 2, 3, 1)
    return grid


class Attention(nn.Module):
    """Multi-head attention with decomposed relative positions, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        use_rel_pos: bool,
        rel_pos_zero_init: bool,
        input_size: tuple[int, int],
    ):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * input_size[0] - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * input_size[1] - 1, dim // num_heads))
            if not rel_pos_zero_init:
                nn.init.trunc_normal_(self.rel_pos_h, std=0.02)
                nn.init.trunc_normal_(self.rel_pos_w, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        size = map_size(tokens)
        q, k, v = self.qkv(tokens).unflatten(3, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        rel_h = rel_w = None
        if self.use_rel_pos:
            tables = (self.rel_pos_h, self.rel_pos_w)
            rel_h, rel_w = (read_table(table, side, side, 1) for table, side in zip(tables, size))
        return self.proj(attend(q, k, v, rel_h, rel_w).permute(0, 2, 3, 1, 4).flatten(3))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, act_layer: Callable[[], nn.Module], drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class ResBottleneckBlock(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions around a residual, without a last activation. Starts as the identity."""

    def __init__(self, channels: int, act_layer: Callable[[], nn.Module]):
        super().__init__()
        hidden = channels // 2
        self.conv1 = Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = ChannelLayerNorm(hidden)
        self.act1 = act_layer()
        self.conv2 = Conv2d(hidden, hidden, 3, padding=1, bias=False)
        self.norm2 = ChannelLayerNorm(hidden)
        self.act2 = act_layer()
        self.conv3 = Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = ChannelLayerNorm(channels)
        for conv in (self.conv1, self.conv2, self.conv3):
            weight_init.c2_msra_fill(conv)
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.norm1(self.conv1(x)))
        out = self.act2(self.norm2(self.conv2(out)))
        return x + self.norm3(self.conv3(out))


class Block(nn.Module):
    """A transformer block, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
        norm_layer: Callable[[int], nn.Module],
        act_layer: Callable[[], nn.Module],
        use_rel_pos: bool,
        rel_pos_zero_init: bool,
        window_size: int,
        use_residual_block: bool,
        use_act_checkpoint: bool,
        input_size: tuple[int, int],
    ):
        super().__init__()
        self.use_act_checkpoint = use_act_checkpoint
        self.norm1 = norm_layer(dim)
        input_size = (window_size, window_size) if window_size > 0 else input_size
        self.attn = Attention(dim, num_heads, qkv_bias, use_rel_pos, rel_pos_zero_init, input_size)
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer)
        self.window_size = window_size
        self.use_residual_block = use_residual_block
        if use_residual_block:
            self.residual = ResBottleneckBlock(dim, act_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.use_act_checkpoint and self.training:
            return checkpoint(self._run, tokens, use_reentrant=False)
        return self._run(tokens)

    def _run(self, tokens: Tensor) -> Tensor:
        attended = self.norm1(tokens)
        if self.window_size > 0:
            size, window = map_size(tokens), (self.window_size, self.window_size)
            attended = unpartition(self.attn(partition(attended, window)), size)
        else:
            attended = self.attn(attended)
        tokens = tokens + self.drop_path(attended)
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        if self.use_residual_block:
            tokens = self.residual(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return tokens


class ViT(Backbone):
    """
    The plain ViT backbone of ViTDet: windowed blocks, a few global or convolutional ones between them, no final norm.

    Args:
        img_size: side of the training images in pixels; sizes the relative position tables of global blocks.
        patch_size: side of a patch in pixels.
        in_chans: channels of the image.
        embed_dim: channels of a token.
        depth: number of blocks.
        num_heads: attention heads of a block.
        mlp_ratio: hidden channels of the MLP, as a multiple of ``embed_dim``.
        qkv_bias: whether query, key and value have a bias.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        norm_layer: makes a norm of so many channels (the published models: LayerNorm with eps 1e-6).
        act_layer: makes the activation of the MLPs.
        use_abs_pos: whether patches get an absolute position embedding.
        use_rel_pos: whether attention has decomposed relative positions.
        rel_pos_zero_init: whether those start at zero.
        window_size: side of an attention window in tokens.
        window_block_indexes: the blocks with windowed attention; the others are global.
        residual_block_indexes: the blocks that end with a convolutional residual block.
        use_act_checkpoint: recompute activations in the backward pass, for memory.
        pretrain_img_size: side of the pretraining images in pixels; sizes the absolute positions.
        pretrain_use_cls_token: whether the absolute positions include a class token's.
        out_feature: name of the output.
    """

    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        use_abs_pos: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        window_block_indexes: Sequence[int] = (),
        residual_block_indexes: Sequence[int] = (),
        use_act_checkpoint: bool = False,
        pretrain_img_size: int = 224,
        pretrain_use_cls_token: bool = True,
        out_feature: str = "last_feat",
    ):
        super().__init__()
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = None
        if use_abs_pos:
            positions = (pretrain_img_size // patch_size) ** 2 + int(pretrain_use_cls_token)
            self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(
            Block(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
                norm_layer=norm_layer,
                act_layer=act_layer,
                use_rel_pos=use_rel_pos,
                rel_pos_zero_init=rel_pos_zero_init,
                window_size=window_size if i in window_block_indexes else 0,
                use_residual_block=i in residual_block_indexes,
                use_act_checkpoint=use_act_checkpoint,
                input_size=(img_size // patch_size, img_size // patch_size),
            )
            for i in range(depth)
        )
        self._out_features = [out_feature]
        self._out_feature_channels = {out_feature: embed_dim}
        self._out_feature_strides = {out_feature: patch_size}
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """
        Args:
            image: (B, in_chans, height, width).

        Returns:
            {out_feature: (B, embed_dim, H, W)}
        """
        tokens = self.patch_embed(image)
        if self.pos_embed is not None:
            tokens = tokens + absolute_positions(self.pos_embed, self.pretrain_use_cls_token, map_size(tokens))
        for block in self.blocks:
            tokens = block(tokens)
        return {self._out_features[0]: tokens.permute(0, 3, 1, 2)}


class SimpleFeaturePyramid(Backbone):
    """
    ViTDet's feature pyramid, built from the last map of a plain backbone alone.

    Args:
        net: the backbone.
        in_feature: the feature of ``net`` that the pyramid is built from.
        out_channels: channels of every level.
        scale_factors: scale of each level against that feature, from 4.0, 2.0, 1.0 and 0.5, fine to coarse.
        top_block: makes more levels from the coarsest; has ``num_levels`` and ``in_feature``.
        norm: "LN" or "".
        square_pad: if over 0, images, which must not be larger, are padded to squares of this many pixels.
    """

    def __init__(
        self,
        net: Backbone,
        in_feature: str,
        out_channels: int,
        scale_factors: Sequence[float],
        top_block: Any = None,
        norm: str = "LN",
        square_pad: int = 0,
    ):
        super().__init__()
        if norm not in ("LN", ""):
            raise ValueError(f'norm must be "LN" or "", got {norm!r}')
        self.net = net
        self.in_feature = in_feature
        self.top_block = top_block
        shape = net.output_shape()[in_feature]
        strides = [int(shape.stride / scale) for scale in scale_factors]

        def conv(in_channels: int, kernel_size: int) -> Conv2d:
            level_norm = ChannelLayerNorm(out_channels) if norm else None
            padding = kernel_size // 2
            return Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=not norm, norm=level_norm)

        self._stages = [f"simfp_{int(math.log2(stride))}" for stride in strides]
        for name, scale in zip(self._stages, scale_factors):
            layers, channels = self._resample(scale, shape.channels, norm)
            self.add_module(name, nn.Sequential(*layers, conv(channels, 1), conv(out_channels, 3)))

        self._out_feature_strides = {f"p{int(math.log2(stride))}": stride for stride in strides}
        if top_block is not None:
            last = int(math.log2(strides[-1]))
            for level in range(last + 1, last + 1 + top_block.num_levels):
                self._out_feature_strides[f"p{level}"] = 2**level
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = {name: out_channels for name in self._out_features}
        self._size_divisibility = strides[-1]
        self._square_pad = square_pad

    @staticmethod
    def _resample(scale: float, channels: int, norm: str) -> tuple[list[nn.Module], int]:
        if scale == 4.0:
            between = [ChannelLayerNorm(channels // 2)] if norm else []
            up = nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)
            upper = nn.ConvTranspose2d(channels // 2, channels // 4, kernel_size=2, stride=2)
            return [up, *between, nn.GELU(), upper], channels // 4
        if scale == 2.0:
            return [nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)], channels // 2
        if scale == 1.0:
            return [], channels
        if scale == 0.5:
            return [nn.MaxPool2d(kernel_size=2, stride=2)], channels
        raise ValueError(f"scale_factors must be 4.0, 2.0, 1.0 or 0.5, got {scale}")

    @property
    def size_divisibility(self) -> int:
        # Detectron2 0.6 knows no square padding. Multiples of the square's side give the same padded image.
        return self._square_pad or self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_pad}

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """
        Args:
            image: (B, 3, height, width).

        Returns:
            name to (B, out_channels, rows, columns), from "p2" (stride 4) to the coarsest.
        """
        bottom_up = self.net(image)
        results = [self.get_submodule(stage)(bottom_up[self.in_feature]) for stage in self._stages]
        if self.top_block is not None:
            top = self.top_block.in_feature
            source = bottom_up[top] if top in bottom_up else results[self._out_features.index(top)]
            results.extend(self.top_block(source))
        return dict(zip(self._out_features, results))
