"""
ViTDet's plain vision transformer and its simple feature pyramid (arXiv 2203.16527), with Detectron2's constructor
arguments and parameter names, so that published checkpoints load. Detectron2's main branch has both, the 0.6 release
has neither.

Letters: B batch, H x W tokens of the full map, h x w tokens of the map at hand, C channels.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling import Backbone
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from hourglass.attention import attend, attend_at, read_table
from hourglass.encoders.windows import WindowList, partition, unpartition, window_of
from hourglass.errors import InputError
from hourglass.operators import operator
from hourglass.reduction import SelectingReducer
from hourglass.reduction.reducer import grid_positions, map_size


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
    if (side, side) != tuple(size):
        grid = F.interpolate(grid.permute(0, 3, 1, 2), size=size, mode="bicubic", align_corners=False)
        grid = grid.permute(0, 2, 3, 1)
    return grid


def embed(encoder: Backbone, image: Tensor) -> Tensor:
    """
    What stands before a ViT's blocks: patches and absolute positions.

    Args:
        encoder: a :class:`ViT`, Detectron2's or ours.
        image: (B, 3, height, width).

    Returns:
        (B, H, W, C)
    """
    tokens = encoder.patch_embed(image)
    if encoder.pos_embed is not None:
        has_cls_token = encoder.pretrain_use_cls_token
        tokens = tokens + absolute_positions(encoder.pos_embed, has_cls_token, map_size(tokens))
    return tokens


class Attention(nn.Module):
    """The parameters of multi-head attention with decomposed relative positions; :func:`run_attention` runs it."""

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


def run_attention(
    attn: nn.Module,
    tokens: Tensor,
    full: tuple[int, int],
    window_size: int,
    sizes: Tensor | None = None,
    window: tuple[int, int] | None = None,
    positions: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """
    Run a block's attention, Detectron2's or ours, on a map whose tokens may lie apart.

    Args:
        attn: module with ``qkv``, ``proj``, ``num_heads``, ``use_rel_pos`` and, if so, ``rel_pos_h`` and ``rel_pos_w``.
        tokens: (B, h, w, C).
        full, sizes, window, positions, fast: as in :func:`run_block`.
        window_size: the block's, in original tokens; 0: attention is global.

    Returns:
        (B, h, w, C)

    Raises:
        InputError: for positions of tokens that are not in windows of their own.
    """
    if positions is not None and window_size > 0 and window is None:
        raise InputError(
            f"blocks with windows (of {window_size} x {window_size} tokens) take tokens on the regular grid, or those "
            'of a GridReducer under scope "window"; got some that lie elsewhere'
        )
    tables = _tables(attn)
    if fast:
        window = (0, 0) if window is None else window
        mixed = _vit_attention(
            attn.qkv(tokens), attn.qkv.bias, *tables, sizes, positions, attn.num_heads, window_size, *full, *window
        )
        return attn.proj(mixed)
    place = _place(map_size(tokens), full, window_size, window)
    qkv = attn.qkv(partition(tokens, place.window))
    return unpartition(
        attn.proj(_attend(qkv, tables, sizes, positions, attn.num_heads, place, fast=False)), map_size(tokens)
    )


def _tables(attn: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return (attn.rel_pos_h, attn.rel_pos_w) if attn.use_rel_pos else (None, None)


class _Place(NamedTuple):
    """
    Where attention looks: the window of the map at hand, the original tokens that it covers, and their number
    from one of its tokens to the next, each along rows and columns.
    """

    window: tuple[int, int]
    extent: tuple[int, int]
    step: tuple[float, float]


def _place(size: tuple[int, int], full: tuple[int, int], window_size: int, window: tuple[int, int] | None) -> _Place:
    if window_size == 0:
        return _Place(size, full, (full[0] / size[0], full[1] / size[1]))
    window, step = window_of(size, full, window_size, window)
    return _Place(window, (window_size, window_size), step)


@operator(
    "Tensor qkv, Tensor? bias, Tensor? table_h, Tensor? table_w, Tensor? sizes, Tensor? positions, int heads, "
    "int window_size, SymInt full_h, SymInt full_w, int window_h, int window_w",
    lambda qkv, *_: [*qkv.shape[:3], qkv.shape[3] // 3],
)
def _vit_attention(
    qkv: Tensor,
    bias: Tensor | None,
    table_h: Tensor | None,
    table_w: Tensor | None,
    sizes: Tensor | None,
    positions: Tensor | None,
    heads: int,
    window_size: int,
    full_h: int,
    full_w: int,
    window_h: int,
    window_w: int,
) -> Tensor:
    """
    Fast attention between the projections. Tokens of zeros, which fill cut windows, are projected to the bias: they
    join here, and nothing is spent on projecting them.

    Args:
        qkv: (B, h, w, 3 C).
        bias: (3 C,), of the projection to it.
        window_h, window_w: 0 where windows shrink as the map does.

    Returns:
        (B, h, w, C)
    """
    size = map_size(qkv)
    place = _place(size, (full_h, full_w), window_size, (window_h, window_w) if window_h else None)
    windows = partition(qkv, place.window, 0.0 if bias is None else bias)
    return unpartition(_attend(windows, (table_h, table_w), sizes, positions, heads, place, fast=True), size)


def _attend(
    qkv: Tensor,
    tables: tuple[Tensor | None, Tensor | None],
    sizes: Tensor | None,
    positions: Tensor | None,
    heads: int,
    place: _Place,
    fast: bool,
) -> Tensor:
    """
    Args:
        qkv: (B * n, wh, ww, 3 C), of windows.
        sizes: (B, h, w), of the map.
        positions: (B, h, w, 2), of the map.

    Returns:
        (B * n, wh, ww, C)
    """
    count, (h, w) = qkv.shape[0], map_size(qkv)
    log_sizes = rel_h = rel_w = None
    if tables[0] is not None and positions is None:
        rel_h, rel_w = (read_table(*axis) for axis in zip(tables, place.extent, place.window, place.step))
    if sizes is not None:
        # A padded key is there in the full map too: it stands for as many as a token does on average.
        sizes = partition(sizes[..., None], place.window, value=place.step[0] * place.step[1])[..., 0]
        # The size of a centre that no token is near may be 0, and a window may hold only such.
        log_sizes = sizes.clamp(min=1e-6).log()
    q, k, v = qkv.reshape(count, h, w, 3, heads, -1).permute(3, 0, 4, 1, 2, 5)
    if positions is None:
        mixed = attend(q, k, v, rel_h, rel_w, log_sizes, fast)
    else:
        q, k, v, positions = (x.flatten(-3, -2) for x in (q, k, v, _in_windows(positions, place)))
        log_sizes = None if log_sizes is None else log_sizes.flatten(1)
        mixed = attend_at(q, k, v, *tables, place.extent, positions, log_sizes, fast).unflatten(2, (h, w))
    return mixed.permute(0, 2, 3, 1, 4).reshape(count, h, w, -1)


def _in_windows(positions: Tensor, place: _Place) -> Tensor:
    """
    Positions in the map (B, h, w, 2) -> in its windows (B * n, wh, ww, 2), of which each covers ``place.extent``
    original tokens. What fills a cut window lies there as on the regular grid.
    """
    axes = []
    for length, side, extent in zip(map_size(positions), place.window, place.extent):
        axes.append(torch.arange(length, device=positions.device) // side * extent)
    local = positions - torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    local = partition(local, place.window, value=torch.nan)
    axes = [
        (torch.arange(side, device=positions.device) + 0.5) * step - 0.5 for side, step in zip(place.window, place.step)
    ]
    regular = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return torch.where(local.isnan(), regular, local)


def attend_in_list(
    attn: nn.Module,
    tokens: Tensor,
    windows: WindowList,
    lengths: list[int],
    full: tuple[int, int],
    window_size: int,
    sizes: Tensor | None,
    positions: Tensor,
    fast: bool,
) -> tuple[Tensor, Tensor]:
    """
    Run a block's attention on a list of tokens that lie anywhere.

    Args:
        attn: as in :func:`run_attention`.
        tokens: (B, 1, L, C).
        windows, lengths: what the list is of, and how many tokens windows of each kind have.
        full: (H, W) of the full map.
        window_size: the block's; 0: attention is global.
        sizes: (B, 1, L), as in :func:`run_block`.
        positions: (B, 1, L, 2), in original tokens.
        fast: see :func:`hourglass.attention.attend`.

    Returns:
        what is attended to, (B, 1, L, C), and the keys in the mean over heads, (B, 1, L, C / heads).
    """
    qkv = attn.qkv(tokens)
    keys = qkv.unflatten(3, (3, attn.num_heads, -1))[:, :, :, 1].mean(3)

    def attend_to(qkv: Tensor, sizes: Tensor | None, positions: Tensor, extent: tuple[int, int]) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        log_sizes = None if sizes is None else sizes.clamp(min=1e-6).log()
        return attend_at(q, k, v, *_tables(attn), extent, positions, log_sizes, fast).transpose(1, 2).flatten(2)

    if window_size == 0:
        mixed = attend_to(qkv[:, 0], None if sizes is None else sizes[:, 0], positions[:, 0], full)[:, None]
        return attn.proj(mixed), keys
    parts = []
    sizes_of = [None] * len(lengths) if sizes is None else windows.split(sizes[..., None], lengths)
    cells = windows.split(windows.flatten(grid_positions(full, positions.device)[None]), windows.lengths)
    for part, size, place, cell, shape in zip(
        windows.split(qkv, lengths), sizes_of, windows.split(positions, lengths), cells, windows.shapes
    ):
        length = part.shape[1]
        place = (place.unflatten(0, (-1, len(cell))) - cell[:, :1]).flatten(0, 1)  # from the window's first cell
        # Tokens of zeros fill cut windows in the full map: they stay, where they lie beyond the edge.
        beyond = _cells_beyond(shape, window_size, place)
        part = torch.cat([part, _bias(attn.qkv, part).expand(len(part), len(beyond), -1)], dim=1)
        place = torch.cat([place, beyond.expand(len(place), -1, -1)], dim=1)
        size = None if size is None else F.pad(size[..., 0], (0, len(beyond)), value=1.0)
        parts.append(attend_to(part, size, place, (window_size, window_size))[:, :length])
    return attn.proj(windows.join(parts)), keys


def _cells_beyond(shape: tuple[int, int], window_size: int, like: Tensor) -> Tensor:
    """(m, 2) the cells of a window that are not among its first ``shape`` rows and columns."""
    (height, width), side = shape, torch.arange(window_size, device=like.device, dtype=like.dtype)
    return torch.cat([torch.cartesian_prod(side[:height], side[width:]), torch.cartesian_prod(side[height:], side)])


def _bias(linear: nn.Linear, like: Tensor) -> Tensor:
    """What a linear layer makes of zeros."""
    return like.new_zeros(like.shape[-1]) if linear.bias is None else linear.bias.to(like.dtype)


def attend_to_selected(attn: nn.Module, tokens: Tensor, mask: Tensor, fast: bool) -> Tensor:
    """
    Global attention to selected tokens only, with a gradient of the selection: values and weights of the others are
    multiplied by 0, and what is left is normalised again.

    Args:
        attn: as in :func:`run_attention`.
        tokens: (B, H, W, C).
        mask: (B, H, W, 1), 1 for selected tokens and 0 for others.
        fast: see :func:`hourglass.attention.attend`.

    Returns:
        (B, H, W, C)
    """
    batch, height, width, _ = tokens.shape
    rel_h = rel_w = None
    if attn.use_rel_pos:
        rel_h, rel_w = (read_table(table, side, side, 1) for table, side in zip(_tables(attn), (height, width)))
    qkv = attn.qkv(tokens)
    q, k, v = qkv.unflatten(3, (3, attn.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
    mask = mask[:, None].expand(-1, attn.num_heads, -1, -1, -1).to(v.dtype)
    mixed = attend(q, k, torch.cat([v * mask, mask], dim=-1), rel_h, rel_w, fast=fast).float()
    mixed = (mixed[..., :-1] / mixed[..., -1:].clamp(min=1e-6)).to(v.dtype)
    return attn.proj(mixed.permute(0, 2, 3, 1, 4).flatten(3))


def run_block(
    block: nn.Module,
    tokens: Tensor,
    full: tuple[int, int],
    sizes: Tensor | None = None,
    window: tuple[int, int] | None = None,
    positions: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """
    Run a ViT block, Detectron2's or ours, on a full map or a reduced one: windows shrink with the map, relative
    positions are read at the distances of the original tokens.

    Args:
        block: module with ``norm1``, ``attn``, ``norm2``, ``mlp``, ``drop_path``, ``window_size`` and, if
            ``use_residual_block``, ``residual``.
        tokens: (B, h, w, C).
        full: (H, W) of the full map; (h, w) where the map is the full one.
        sizes: (B, h, w), the number of tokens that each stands for: its logarithm is added to a key's score.
        window: (wh, ww), rows and columns of a windowed block's windows on this map; None: shrunk as the map is.
        positions: (B, h, w, 2), where the tokens lie, in original ones; None: on the regular grid. Global blocks only.
        fast: attention, see :func:`hourglass.attention.attend`.

    Returns:
        (B, h, w, C)
    """
    if getattr(block, "use_act_checkpoint", False) and block.training:
        return checkpoint(_run_block, block, tokens, full, sizes, window, positions, fast, use_reentrant=False)
    return _run_block(block, tokens, full, sizes, window, positions, fast)


def _run_block(
    block: nn.Module,
    tokens: Tensor,
    full: tuple[int, int],
    sizes: Tensor | None,
    window: tuple[int, int] | None,
    positions: Tensor | None,
    fast: bool,
) -> Tensor:
    attended = run_attention(block.attn, block.norm1(tokens), full, block.window_size, sizes, window, positions, fast)
    return run_convolutions(block, run_perceptron(block, tokens + block.drop_path(attended)))


def run_perceptron(block: nn.Module, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """The second half of a block, (B, h, w, C) -> (B, h, w, C). ``mask`` (B, h, w, 1) multiplies what is added."""
    update = block.drop_path(block.mlp(block.norm2(tokens)))
    return tokens + (update if mask is None else mask * update)


def run_selected_perceptron(
    block: nn.Module, tokens: Tensor, reducer: SelectingReducer, number: int, masked: bool
) -> Tensor:
    """
    The second half of a block on the tokens that are selected for it.

    Args:
        block: as in :func:`run_block`.
        tokens: (B, H, W, C).
        reducer: selects them.
        number: of the block in the plan.
        masked: run all tokens and mask what is not selected, for training.

    Returns:
        (B, H, W, C)
    """
    if masked:
        return run_perceptron(block, tokens, reducer.mask(tokens, number))
    images = []
    for image in tokens.split(1):
        selected, _, _, restore = reducer(image, number)
        images.append(restore(run_perceptron(block, selected)))
    return torch.cat(images)


def run_convolutions(block: nn.Module, tokens: Tensor) -> Tensor:
    """The end of a block that has convolutions, (B, h, w, C) -> (B, h, w, C)."""
    if block.use_residual_block:
        tokens = block.residual(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return tokens


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
    """A transformer block; :func:`run_block` runs it, here on the full map and by attention's plain formula."""

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
        return run_block(self, tokens, full=map_size(tokens))


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
        mlp_ratio: hidden channels of the perceptron, as a multiple of ``embed_dim``.
        qkv_bias: whether query, key and value have a bias.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        norm_layer: makes a norm of so many channels (the published models: LayerNorm with eps 1e-6).
        act_layer: makes the activation of the perceptrons.
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
        tokens = embed(self, image)
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
        top_block: nn.Module | None = None,
        norm: str = "LN",
        square_pad: int = 0,
    ):
        super().__init__()
        if norm not in ("LN", ""):
            raise ValueError(f'norm takes "LN" or "", got {norm!r}')
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
        raise ValueError(f"scale_factors takes 4.0, 2.0, 1.0 and 0.5, got {scale}")

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
