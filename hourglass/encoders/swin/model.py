"""
Swin (arXiv 2103.14030) as a Detectron2 backbone, with the constructor arguments and parameter names of Detectron2's
main branch, which are Mask2Former's too: published checkpoints load. The 0.6 release has none.

Letters: B batch, H x W tokens of the full map, h x w tokens of the map at hand, C channels, N heads.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from hourglass.attention import bias_index
from hourglass.encoders.swin.attention import Setting, attend, pad_and_roll
from hourglass.encoders.vit.model import Mlp
from hourglass.errors import InputError
from hourglass.operators import operator
from hourglass.reduction.reducer import Place
from hourglass.reduction.windows import map_size, pad


class WindowAttention(nn.Module):
    """Attention in windows with relative position bias."""

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        num_heads: int,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
    ):
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        rows, columns = (2 * side - 1 for side in window_size)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows * columns, num_heads))
        # Nothing here reads it, but the published checkpoints have it.
        self.register_buffer("relative_position_index", bias_index(window_size))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, tokens: Tensor, shifted: bool) -> Tensor:
        """
        Args:
            tokens: (B, H, W, C).
            shifted: whether the windows are shifted by half of them.

        Returns:
            (B, H, W, C)
        """
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        setting = Setting(self.num_heads, self.window_size[0], shifted, False, self.scale, dropout)
        size, place = map_size(tokens), Place(map_size(tokens))
        qkv = self.qkv(pad_and_roll(tokens, setting.windows(size, place)))
        return self.proj_drop(self.proj(attend(qkv, size, self.relative_position_bias_table, place, setting)))


class Block(nn.Module):
    """A Swin block, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
        norm_layer: Callable[[int], nn.Module],
        use_act_checkpoint: bool,
    ):
        super().__init__()
        self.use_act_checkpoint = use_act_checkpoint
        self.shift_size = shift_size
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(dim, (window_size, window_size), num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), nn.GELU, drop)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.use_act_checkpoint and self.training:
            return checkpoint(self._run, tokens, use_reentrant=False)
        return self._run(tokens)

    def _run(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), self.shift_size > 0))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class PatchMerging(nn.Module):
    """
    The way to the next stage: joins the tokens of each 2 x 2 square,
    (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 C). The map is padded where H or W is odd.
    """

    def __init__(self, dim: int, norm_layer: Callable[[int], nn.Module]):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.reduction(self.norm(_squares(tokens)))


@operator(
    "Tensor tokens",
    lambda tokens: [tokens.shape[0], (tokens.shape[1] + 1) // 2, (tokens.shape[2] + 1) // 2, 4 * tokens.shape[3]],
)
def _squares(tokens: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 4 C)"""
    height, width = map_size(tokens)
    if height % 2 or width % 2:
        tokens = pad(tokens, height % 2, width % 2)
    return torch.cat([tokens[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)


class Stage(nn.Module):
    """The blocks of one resolution and, but in the last stage, the way to the next one."""

    def __init__(self, blocks: list[Block], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) -> the stage's own map (B, H, W, C), and the next one's; None after the last stage."""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens, None if self.downsample is None else self.downsample(tokens)


class PatchEmbed(nn.Module):
    """Image (B, in_chans, height, width) to (B, C, H, W), a token for each square of ``patch_size`` pixels."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, norm_layer: Callable[[int], nn.Module] | None):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = None if norm_layer is None else norm_layer(embed_dim)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.proj(_pad_image(image, self.patch_size))
        if self.norm is not None:
            patches = self.norm(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return patches


@operator(
    "Tensor image, int multiple",
    lambda image, multiple: [*image.shape[:2], *(-(-side // multiple) * multiple for side in image.shape[2:])],
)
def _pad_image(image: Tensor, multiple: int) -> Tensor:
    height, width = map_size(image.permute(0, 2, 3, 1))
    return F.pad(image, (0, -width % multiple, 0, -height % multiple))


def keep_frozen(encoder: Backbone) -> None:
    """What ``frozen_stages`` names is not trained, and runs without stochastic depth and dropout."""
    if encoder.frozen_stages < 0:
        return
    if encoder.frozen_stages >= 1 and encoder.ape:
        encoder.absolute_pos_embed.requires_grad_(False)
    layers = encoder.layers[: max(0, encoder.frozen_stages - 1)]
    for module in (encoder.patch_embed, *([encoder.pos_drop] if layers else []), *layers):
        module.eval().requires_grad_(False)


class Swin(Backbone):
    """
    The Swin backbone: four stages of windowed attention, every second block's windows shifted.

    Args:
        pretrain_img_size: side of the pretraining images in pixels; sizes the absolute positions.
        patch_size: side of a patch in pixels.
        in_chans: channels of the image.
        embed_dim: channels of a token in the first stage; each stage doubles them.
        depths: blocks of each stage.
        num_heads: attention heads of each stage's blocks.
        window_size: side of an attention window in tokens.
        mlp_ratio: hidden channels of the MLP, as a multiple of the block's.
        qkv_bias: whether query, key and value have a bias.
        qk_scale: factor of the scores; None: (channels a head) ** -0.5.
        drop_rate: dropout of tokens, projections and MLPs.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        norm_layer: makes a norm of so many channels.
        ape: whether patches get an absolute position embedding.
        patch_norm: whether patches are normalised.
        out_indices: the stages, from 0, whose maps are output, each through a norm of its own.
        frozen_stages: the patches and the first ``frozen_stages - 1`` stages are not trained; -1: all are trained.
        use_checkpoint: recompute activations in the backward pass, for memory.
        out_names: names of the outputs; None: "p0" to "p3", as Detectron2's. Mask2Former's are "res2" to "res5".

    Raises:
        InputError: for names that are not as many as the stages that are output.
    """

    def __init__(
        self,
        pretrain_img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        use_checkpoint: bool = False,
        out_names: Sequence[str] | None = None,
    ):
        super().__init__()
        names = [f"p{i}" for i in out_indices] if out_names is None else list(out_names)
        if len(names) != len(out_indices):
            raise InputError(f"out_names must be a name for each of the stages {list(out_indices)}, got {names}")
        self.ape = ape
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, norm_layer if patch_norm else None)
        if ape:
            side = pretrain_img_size // patch_size
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, embed_dim, side, side))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)

        drop_path = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            blocks = [
                Block(
                    dim=dim,
                    num_heads=num_heads[i],
                    window_size=window_size,
                    shift_size=window_size // 2 if j % 2 else 0,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path[sum(depths[:i]) + j],
                    norm_layer=norm_layer,
                    use_act_checkpoint=use_checkpoint,
                )
                for j in range(depth)
            ]
            downsample = PatchMerging(dim, norm_layer) if i < len(depths) - 1 else None
            self.layers.append(Stage(blocks, downsample))
        for i in out_indices:
            self.add_module(f"norm{i}", norm_layer(embed_dim * 2**i))

        self._out_features = names
        self._out_feature_channels = {name: embed_dim * 2**i for name, i in zip(names, out_indices)}
        self._out_feature_strides = {name: patch_size * 2**i for name, i in zip(names, out_indices)}
        self._size_divisibility = patch_size * 2 ** (len(depths) - 1)
        self.apply(self._init_weights)
        keep_frozen(self)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def train(self, mode: bool = True) -> "Swin":
        super().train(mode)
        keep_frozen(self)
        return self

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """
        Args:
            image: (B, in_chans, height, width), of any size.

        Returns:
            name to (B, C, H, W), from stride 4 to 32.
        """
        patches = self.patch_embed(image)
        if self.ape:
            positions = self.absolute_pos_embed
            patches = patches + F.interpolate(positions, size=patches.shape[-2:], mode="bicubic", align_corners=False)
        tokens = self.pos_drop(patches.permute(0, 2, 3, 1))
        features = {}
        names = dict(zip(self.out_indices, self._out_features))
        for i, stage in enumerate(self.layers):
            out, tokens = stage(tokens)
            if i in names:
                features[names[i]] = self.get_submodule(f"norm{i}")(out).permute(0, 3, 1, 2).contiguous()
        return features
