"""
How a Swin's blocks are run on placed tokens: windows and their shift shrink with the map, the bias is read at the
distances of the original tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hourglass.compat import size_divisibility
from hourglass.encoders.contract import Family, PlacedAttention, PlacedBlock, key_mean, project, unwrapped
from hourglass.encoders.hourglass import Hourglass
from hourglass.encoders.plan import Plan
from hourglass.encoders.registry import register
from hourglass.encoders.sharing import base_class, with_children
from hourglass.encoders.swin.attention import Setting, attend, pad_and_roll, swin_attention
from hourglass.encoders.swin.model import Block, Swin, WindowAttention
from hourglass.errors import InputError
from hourglass.reduction.reducer import Place
from hourglass.reduction.scope import EachWindow
from hourglass.reduction.windows import map_size


class HourglassSwin(Hourglass):
    """
    A Swin whose middle blocks run on fewer tokens. Blocks are counted from 0 over all stages. Each stage that has
    blocks of the plan reduces its map before the first of them and restores it after the last, before its
    output and the next stage.

    Windows shrink with the map, their shift and its mask with them, and the relative position bias is read at the
    distances of the original tokens, from the tables as they are. Under ``Plan(published=True)`` instead, as in
    Expedit's code: the zeros that fill cut windows are reduced along, the mask of shifted blocks is made for the full
    map's shift, and the bias tables are stretched to the smaller window. That takes scope "window" and windows of more
    than half their side, for which that mask is one.

    It is a view of the encoder, see :class:`~hourglass.encoders.hourglass.Hourglass`.

    Args:
        encoder: a :class:`~hourglass.encoders.Swin`, Detectron2's ``SwinTransformer``, Mask2Former's or a copy.
        plan: which blocks run on fewer tokens.

    Raises:
        InputError: for an encoder whose blocks cannot be run so, or a plan that it cannot follow.
    """

    @property
    def size_divisibility(self) -> int:
        return size_divisibility(self._unmodified)


class SwinAttention(PlacedAttention):
    """
    Attention with ``qkv``, ``proj``, ``proj_drop``, ``attn_drop``, ``num_heads``, ``scale``, a square ``window_size``
    and ``relative_position_bias_table``.
    """

    uncalled = ("softmax", "attn_drop")

    scale: float
    attn_drop: nn.Dropout
    proj_drop: nn.Module
    relative_position_bias_table: Tensor

    def forward(self, tokens: Tensor, place: Place) -> Tensor | tuple[Tensor, Tensor]:
        options, size = self.attention_options, map_size(tokens)
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        setting = Setting(self.num_heads, options.window_size, options.shifted, options.published, self.scale, dropout)
        table = self.relative_position_bias_table
        if options.fast:
            qkv, zero = project(self.qkv, tokens)
            numbers = [*place.full, *(place.window or (0, 0)), *map(int, setting[:4])]
            mixed = swin_attention(qkv, zero, table, place.sizes, place.positions, numbers, list(setting[4:]))
        else:
            windows = setting.windows(size, place)
            padded = self.qkv(pad_and_roll(tokens, windows))
            mixed = attend(padded, size, table, place, setting)
            if place.between is not None:
                qkv = torch.roll(padded, windows.shift, dims=(1, 2))[:, : size[0], : size[1]]
        out = self.proj_drop(self.proj(mixed))
        return out if place.between is None else (out, key_mean(qkv, self.num_heads))


class SwinBlock(PlacedBlock):
    attention = SwinAttention
    takes_lists = False


@register
class SwinFamily(Family):
    """Swin, and its copies."""

    name = "Swin"
    known = (Swin, Block, WindowAttention)
    class_names = ("Swin", "SwinTransformer", "D2SwinTransformer")
    parts = (*Family.parts, "shift_size")
    attention_parts = (
        *Family.attention_parts,
        *("proj_drop", "attn_drop", "scale", "window_size", "relative_position_bias_table"),
    )
    pads_published = True
    block = SwinBlock
    hourglass = HourglassSwin

    def stages(self, encoder: nn.Module) -> list[list[nn.Module]] | None:
        layers = getattr(encoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            return None
        stages = []
        for layer in layers:
            blocks = getattr(layer, "blocks", None)
            if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
                return None
            stages.append(list(blocks))
        return stages if all(self.fits(unwrapped(block)) for stage in stages for block in stage) else None

    def window_size(self, block: Any) -> int:
        return unwrapped(block).attn.window_size[0]

    def shifted(self, block: Any) -> bool:
        return unwrapped(block).shift_size > 0

    def original_forward(self, encoder: Any, block: Any, tokens: Tensor) -> Tensor:
        if base_class(encoder) is Swin:
            return block(tokens)
        # A copy's block takes the mask that its stage makes: a stage of this block alone.
        stage = next(stage for stage in encoder.layers if any(member is block for member in stage.blocks))
        alone = with_children(stage, {**stage._modules, "blocks": nn.ModuleList([block]), "downsample": None})
        return alone.forward(tokens.flatten(1, 2), *map_size(tokens))[0].view_as(tokens)

    def check_published(self, plan: Plan, blocks: list[Any]) -> None:
        if plan.scope != "window":
            raise InputError(f'a published plan must have scope "window" in Swin, got {plan.scope!r}')
        window = self.window_size(blocks[0])
        assert plan.reducer is not None, "only a reducer is run as published"
        cells = EachWindow(plan.reducer, window).cells
        if min(cells) <= window // 2:
            raise InputError(
                f"a published plan must keep more than {window // 2} tokens a side of a window of {window}, "
                f"got {cells[0]} x {cells[1]}"
            )
