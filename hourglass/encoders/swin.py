"""
Swin (arXiv 2103.14030) as a Detectron2 backbone, with the constructor arguments and parameter names of Detectron2's
main branch, which are Mask2Former's too: published checkpoints load. The 0.6 release has none.

Letters: B batch, H x W tokens of the full map, h x w tokens of the map at hand, C channels, N heads.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from hourglass.attention import attend_windows, bias_index, read_bias, read_bias_at
from hourglass.encoders.vit import Mlp, run_perceptron
from hourglass.encoders.windows import Strip, join, pad, split, window_of
from hourglass.errors import InputError
from hourglass.operators import operator
from hourglass.reduction.reducer import map_size


class WindowAttention(nn.Module):
    """The parameters of a window's attention with relative position bias; :func:`run_attention` runs it."""

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


class _Place(NamedTuple):
    """
    The windows of a block on the map at hand, each along rows and columns.

    Attributes:
        window: tokens of a window.
        step: original tokens from one token to the next.
        shift: by how many tokens the windows are moved.
        masked_shift: the shift that their mask is made for. The same, but in Expedit's code, where it stays that of the
            full map.
    """

    window: tuple[int, int]
    step: tuple[float, float]
    shift: tuple[int, int]
    masked_shift: tuple[int, int]


def _place(
    size: tuple[int, int],
    full: tuple[int, int],
    window_size: int,
    window: tuple[int, int] | None,
    shifted: bool,
    published: bool,
) -> _Place:
    window, step = window_of(size, full, window_size, window)
    shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
    masked_shift = (window_size // 2, window_size // 2) if published and shifted else shift
    return _Place(window, step, shift, masked_shift)


def run_attention(
    attn: nn.Module,
    tokens: Tensor,
    full: tuple[int, int],
    shifted: bool,
    sizes: Tensor | None = None,
    window: tuple[int, int] | None = None,
    published: bool = False,
    fast: bool = False,
    positions: Tensor | None = None,
) -> Tensor:
    """
    Run a block's attention, Detectron2's or ours, in the windows of a map.

    Args:
        attn: module with the parameters of :class:`WindowAttention`.
        tokens: (B, h, w, C).
        shifted: whether windows are shifted. What the roll then brings together from opposite edges is kept apart.
        full, sizes, window, published, fast, positions: as in :func:`run_block`.

    Returns:
        (B, h, w, C)
    """
    window_size = attn.window_size[0]
    dropout = attn.attn_drop.p if attn.training else 0.0
    table = attn.relative_position_bias_table
    if fast:
        mixed = _swin_attention(
            attn.qkv(tokens),
            attn.qkv.bias,
            table,
            sizes,
            positions,
            attn.num_heads,
            attn.scale,
            shifted,
            window_size,
            *full,
            *(window or (0, 0)),
            published,
            dropout,
        )
        return attn.proj_drop(attn.proj(mixed))
    size = map_size(tokens)
    place = _place(size, full, window_size, window, shifted, published)
    qkv = attn.qkv(_pad_and_roll(tokens, place))
    mixed = _attend(
        qkv, size, table, sizes, positions, attn.num_heads, attn.scale, window_size, place, published, dropout
    )
    return attn.proj_drop(attn.proj(mixed))


@operator(
    "Tensor qkv, Tensor? bias, Tensor table, Tensor? sizes, Tensor? positions, int heads, float scale, bool shifted, "
    "int window_size, SymInt full_h, SymInt full_w, int window_h, int window_w, bool published, float dropout",
    lambda qkv, *_: [*qkv.shape[:3], qkv.shape[3] // 3],
)
def _swin_attention(
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor,
    sizes: Tensor | None,
    positions: Tensor | None,
    heads: int,
    scale: float,
    shifted: bool,
    window_size: int,
    full_h: int,
    full_w: int,
    window_h: int,
    window_w: int,
    published: bool,
    dropout: float,
) -> Tensor:
    """
    Fast attention between the projections; what fills cut windows joins here, as in a ViT.

    Args:
        qkv: (B, h, w, 3 C).
        bias: (3 C,), of the projection to it.
        table: see :func:`hourglass.attention.read_bias`.
        window_h, window_w: 0 where windows shrink as the map does.

    Returns:
        (B, h, w, C)
    """
    size = map_size(qkv)
    window = (window_h, window_w) if window_h else None
    place = _place(size, (full_h, full_w), window_size, window, shifted, published)
    qkv = _pad_and_roll(qkv, place, 0.0 if bias is None else bias)
    return _attend(qkv, size, table, sizes, positions, heads, scale, window_size, place, published, dropout, fast=True)


def _attend(
    qkv: Tensor,
    size: tuple[int, int],
    table: Tensor,
    sizes: Tensor | None,
    positions: Tensor | None,
    heads: int,
    scale: float,
    window_size: int,
    place: _Place,
    published: bool,
    dropout: float,
    fast: bool = False,
) -> Tensor:
    """
    Args:
        qkv: (B, H, W, 3 C), padded and rolled.
        size: (h, w) of the map.
        sizes: (B, h, w).
        positions: (B, h, w, 2).

    Returns:
        (B, h, w, C)
    """
    # Only the last row and column of windows hold what the roll moved: the others share one bias.
    counts = [length // side for length, side in zip(map_size(qkv), place.window)]
    rows, columns = (
        [Strip(count - 1, side), Strip(1, side)] if masked else [Strip(count, side)]
        for count, side, masked in zip(counts, place.window, place.masked_shift)
    )
    rows, columns = ([strip for strip in strips if strip.windows] for strips in (rows, columns))
    parts = split(qkv, rows, columns)
    log_sizes = [None] * len(parts)
    if sizes is not None:
        # A padded key is there in the full map too: it stands for as many as a token does on average.
        sizes = _pad_and_roll(sizes[..., None], place, value=place.step[0] * place.step[1])
        # The size of a centre that no token is near may be 0.
        log_sizes = [part.flatten(1) for part in split(sizes.clamp(min=1e-6).log(), rows, columns)]

    extent = (window_size, window_size)
    if positions is None:
        biases = [read_bias(table, extent, place.window, place.step, resize=published)] * len(parts)
    else:
        windows = split(_positions_in_windows(positions, window_size, place), rows, columns)
        biases = [read_bias_at(table, extent, window.flatten(1, 2)) for window in windows]
    lasts = [(row is rows[-1], column is columns[-1]) for row in rows for column in columns]
    mixed = []
    for part, bias, log_size, last in zip(parts, biases, log_sizes, lasts):
        masks = [masked if is_last else 0 for masked, is_last in zip(place.masked_shift, last)]
        part_bias = bias.masked_fill(_apart(place.window, masks, bias.device), -torch.inf) if any(masks) else bias
        q, k, v = part.reshape(*part.shape[:1], -1, 3, heads, part.shape[3] // (3 * heads)).permute(2, 0, 3, 1, 4)
        attended = attend_windows(q, k, v, part_bias, scale, log_size, dropout, fast)
        mixed.append(attended.transpose(1, 2).reshape(*part.shape[:3], -1))
    mixed = join(mixed, rows, columns)
    if any(place.shift):
        mixed = torch.roll(mixed, place.shift, dims=(1, 2))
    return mixed[:, : size[0], : size[1]]


def _positions_in_windows(positions: Tensor, window_size: int, place: _Place) -> Tensor:
    """(B, h, w, 2) padded and rolled. What fills a cut window lies there as on the regular grid."""
    bottom, right = (-length % side for length, side in zip(map_size(positions), place.window))
    padded = pad(positions, bottom, right, torch.nan)
    axes = []
    for length, side, step in zip(map_size(padded), place.window, place.step):
        index = torch.arange(length, device=padded.device)
        axes.append(index // side * window_size + (index % side + 0.5) * step - 0.5)
    regular = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return _pad_and_roll(torch.where(padded.isnan(), regular, padded), place)


def _pad_and_roll(tokens: Tensor, place: _Place, value: float | Tensor = 0.0) -> Tensor:
    bottom, right = (-length % side for length, side in zip(map_size(tokens), place.window))
    if bottom or right:
        tokens = pad(tokens, bottom, right, value)
    return torch.roll(tokens, [-shift for shift in place.shift], dims=(1, 2)) if any(place.shift) else tokens


def _apart(window: tuple[int, int], shift: Sequence[int], device: torch.device) -> Tensor:
    """(wh * ww, wh * ww) True for two tokens of which one is, by either axis, among the last ``shift`` of a window."""
    moved = (torch.arange(side, device=device) >= side - last for side, last in zip(window, shift))
    rows, columns = moved
    region = (2 * rows[:, None].long() + columns).flatten()
    return region[:, None] != region


class Block(nn.Module):
    """The parameters of a Swin block; :func:`run_block` runs it."""

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
    ):
        super().__init__()
        self.shift_size = shift_size
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(dim, (window_size, window_size), num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), nn.GELU, drop)


def run_block(
    block: nn.Module,
    tokens: Tensor,
    full: tuple[int, int],
    sizes: Tensor | None = None,
    window: tuple[int, int] | None = None,
    published: bool = False,
    fast: bool = False,
    positions: Tensor | None = None,
    perceptron: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> Tensor:
    """
    Run a Swin block, Detectron2's or ours, on a full map or a reduced one: windows and their shift shrink with the map,
    the bias is read at the distances of the original tokens.

    Args:
        block: module with ``norm1``, ``attn``, ``norm2``, ``mlp``, ``drop_path`` and ``shift_size``.
        tokens: (B, h, w, C).
        full: (H, W) of the full map; (h, w) where the map is the full one.
        sizes: (B, h, w), the number of tokens that each stands for: its logarithm is added to a key's score.
        window: (wh, ww), rows and columns of the windows on this map; None: shrunk as the map is.
        published: as in Expedit's code, the bias's table is stretched to the window
            (:func:`hourglass.attention.read_bias`) and the mask of shifted windows stays that of the full map.
        fast: attention, see :func:`hourglass.attention.attend_windows`.
        positions: (B, h, w, 2), where the tokens lie, in original ones; None: on the regular grid.
        perceptron: what runs the second half of the block; None: :func:`run_perceptron`.

    Returns:
        (B, h, w, C)
    """
    attended = block.norm1(tokens)
    attended = run_attention(
        block.attn, attended, full, block.shift_size > 0, sizes, window, published, fast, positions
    )
    tokens = tokens + block.drop_path(attended)
    return (perceptron or run_perceptron)(block, tokens)


class PatchMerging(nn.Module):
    """The parameters of the way to the next stage; :func:`merge_patches` runs it."""

    def __init__(self, dim: int, norm_layer: Callable[[int], nn.Module]):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)


def merge_patches(downsample: nn.Module, tokens: Tensor) -> Tensor:
    """
    Join the tokens of each 2 x 2 square.

    Args:
        downsample: module with ``norm`` and ``reduction``, Detectron2's or ours.
        tokens: (B, H, W, C), padded where H or W is odd.

    Returns:
        (B, ceil(H / 2), ceil(W / 2), 2 C)
    """
    return downsample.reduction(downsample.norm(_squares(tokens)))


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

    def __init__(self, blocks: list[Block], window_size: int, downsample: PatchMerging | None, use_checkpoint: bool):
        super().__init__()
        self.window_size = window_size
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) -> the stage's own map (B, H, W, C), and the next one's; None after the last stage."""
        for block in self.blocks:
            tokens = run_checkpointed(self, block, tokens, map_size(tokens))
        return tokens, None if self.downsample is None else merge_patches(self.downsample, tokens)


def run_checkpointed(stage: nn.Module, block: nn.Module, tokens: Tensor, *arguments: Any) -> Tensor:
    """:func:`run_block`, recomputed in the backward pass where the stage asks for it."""
    if stage.use_checkpoint and stage.training:
        return checkpoint(run_block, block, tokens, *arguments, use_reentrant=False)
    return run_block(block, tokens, *arguments)


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
    height, width = int(image.shape[2]), int(image.shape[3])
    return F.pad(image, (0, -width % multiple, 0, -height % multiple))


def embed(encoder: Backbone, image: Tensor) -> Tensor:
    """
    What stands before a Swin's stages: patches and, if it has them, absolute positions.

    Args:
        encoder: a :class:`Swin`, Detectron2's or ours.
        image: (B, 3, height, width).

    Returns:
        (B, H, W, C)
    """
    patches = encoder.patch_embed(image)
    if encoder.ape:
        positions = encoder.absolute_pos_embed
        patches = patches + F.interpolate(positions, size=patches.shape[-2:], mode="bicubic", align_corners=False)
    return encoder.pos_drop(patches.permute(0, 2, 3, 1))


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
        mlp_ratio: hidden channels of the perceptron, as a multiple of the block's.
        qkv_bias: whether query, key and value have a bias.
        qk_scale: factor of the scores; None: (channels a head) ** -0.5.
        drop_rate: dropout of tokens, projections and perceptrons.
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
            raise InputError(f"out_names takes a name for each of the stages {list(out_indices)}, got {names}")
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
                )
                for j in range(depth)
            ]
            downsample = PatchMerging(dim, norm_layer) if i < len(depths) - 1 else None
            self.layers.append(Stage(blocks, window_size, downsample, use_checkpoint))
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
        tokens = embed(self, image)
        features = {}
        names = dict(zip(self.out_indices, self._out_features))
        for i, stage in enumerate(self.layers):
            out, tokens = stage(tokens)
            if i in names:
                features[names[i]] = self.get_submodule(f"norm{i}")(out).permute(0, 3, 1, 2)
        return features
