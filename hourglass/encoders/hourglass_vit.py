"""The hourglass around ViTDet's plain vision transformer."""

import torch
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hourglass.encoders.plan import Plan
from hourglass.encoders.vit import (
    attend_in_list,
    attend_to_selected,
    embed,
    run_attention,
    run_block,
    run_convolutions,
    run_perceptron,
    run_selected_perceptron,
)
from hourglass.encoders.windows import EachWindow, MergeEachWindow, WindowList
from hourglass.errors import InputError
from hourglass.reduction import GridReducer, MergingReducer, SelectingReducer
from hourglass.reduction.reducer import grid_positions, map_size


class HourglassViT(Backbone):
    """
    A ViT whose middle blocks run on fewer tokens: on a smaller map, on a list of tokens that merge block by block
    (``MergingReducer``), or on those that are selected for each block (``SelectingReducer``).

    It holds the encoder's own modules and parameters, under their own names: checkpoints of the encoder load, and
    changing a parameter of one changes it for both. A reducer's parameters, if it has some, are beside them under
    "reducer".

    Args:
        encoder: a :class:`~hourglass.encoders.ViT` or Detectron2's ``ViT``.
        plan: which blocks run on fewer tokens.

    Raises:
        InputError: for a plan that the encoder cannot follow.
    """

    def __init__(self, encoder: Backbone, plan: Plan):
        super().__init__()
        self.plan = plan
        self._planned = plan.blocks(self.depth(encoder))
        self.patch_embed = encoder.patch_embed
        self.pos_embed = encoder.pos_embed
        self.blocks = encoder.blocks
        self.pretrain_use_cls_token = encoder.pretrain_use_cls_token
        self._out_features = encoder._out_features
        self._out_feature_channels = encoder._out_feature_channels
        self._out_feature_strides = encoder._out_feature_strides
        self._size_divisibility = encoder.size_divisibility
        self.training = encoder.training
        self._window = None
        if self._planned:
            self._take_reducer()

    def _take_reducer(self) -> None:
        plan, reducer = self.plan, self.plan.reducer
        planned = [self.blocks[i] for i in self._planned]
        windows = {block.window_size for block in planned} - {0}
        where = f"in blocks {self._planned.start} to {self._planned.stop - 1}"
        if plan.scope == "window" and len(windows) != 1:
            raise InputError(
                'scope "window" needs blocks with windows of one size among those of the plan, '
                f"got {sorted(windows) or 'none'} {where}"
            )
        if not reducer.on_grid and plan.scope == "map" and windows:
            raise InputError(
                f'{type(reducer).__name__} takes scope "window" where blocks have windows, got scope "map" and windows '
                f"of {sorted(windows)} {where}"
            )
        if not reducer.on_grid and any(block.use_residual_block for block in planned):
            raise InputError(f"{type(reducer).__name__} takes blocks without convolutions, got some {where}")
        if isinstance(reducer, SelectingReducer):
            reducer.fit([block.norm1.weight.numel() for block in planned])
        self.reducer = reducer.to(planned[0].norm1.weight.device)
        if plan.scope == "window":
            (self._window_size,) = windows
            window = (self._window_size, self._window_size)
            if isinstance(reducer, GridReducer):
                self._window = reducer.cells(window)
            if isinstance(reducer, MergingReducer):
                self.reducer = reducer.relative_to(window)
            else:
                self.reducer = EachWindow(reducer, self._window_size)
        if isinstance(reducer, MergingReducer):
            self.reducer = MergeEachWindow(self.reducer)

    @staticmethod
    def depth(encoder: Backbone) -> int:
        """The number of blocks that a plan counts."""
        return len(encoder.blocks)

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """
        Args:
            image: (B, 3, height, width).

        Returns:
            {out_feature: (B, C, H, W)}
        """
        tokens = embed(self, image)
        planned = self._planned
        for block in self.blocks[: planned.start]:
            tokens = self._run_whole(block, tokens)
        if planned:
            tokens = self._run_planned(tokens)
        for block in self.blocks[planned.stop :]:
            tokens = self._run_whole(block, tokens)
        return {self._out_features[0]: tokens.permute(0, 3, 1, 2)}

    def _run_whole(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """A block on the full map: its own forward pass, to the bit, or fast."""
        return run_block(block, tokens, map_size(tokens), fast=True) if self.plan.fast else block(tokens)

    def _run_planned(self, tokens: Tensor) -> Tensor:
        planned = self.blocks[self._planned.start : self._planned.stop]
        if isinstance(self.reducer, MergeEachWindow):
            return self._run_merging(planned, tokens)
        if isinstance(self.reducer, SelectingReducer):
            for i, block in enumerate(planned):
                if getattr(block, "use_act_checkpoint", False) and self.training:
                    tokens = checkpoint(self._run_selecting, i, block, tokens, use_reentrant=False)
                else:
                    tokens = self._run_selecting(i, block, tokens)
                tokens = run_convolutions(block, tokens)
            return tokens
        full = map_size(tokens)

        def blocks(refined: Tensor, sizes: Tensor | None, positions: Tensor | None) -> Tensor:
            for block in planned:
                refined = run_block(block, refined, full, sizes, self._window, positions, self.plan.fast)
            return refined

        return self.plan.run(self.reducer, tokens, blocks)

    def _run_merging(self, planned: nn.ModuleList, tokens: Tensor) -> Tensor:
        full, fast = map_size(tokens), self.plan.fast
        windows = WindowList(full, full if self.plan.scope == "map" else (self._window_size, self._window_size))
        lengths = windows.lengths
        positions = grid_positions(full, tokens.device).float().expand(len(tokens), -1, -1, -1)
        tokens, positions = windows.flatten(tokens), windows.flatten(positions)
        sizes = torch.ones_like(positions[..., 0])
        restores = []
        for block in planned:
            shares = sizes if self.plan.proportional else None
            attended, keys = attend_in_list(
                block.attn, block.norm1(tokens), windows, lengths, full, block.window_size, shares, positions, fast
            )
            tokens = tokens + block.drop_path(attended)
            tokens, positions, sizes, restore = self.reducer(tokens, keys, sizes, positions, windows, lengths)
            lengths = self.reducer.left(windows, lengths)
            restores.append(restore)
            tokens = run_perceptron(block, tokens)
        for restore in reversed(restores):
            tokens = restore(tokens)
        return windows.unflatten(tokens)

    def _run_selecting(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        """A block on the tokens that are selected for it; in training all tokens run, and the others are masked out."""
        full, fast = map_size(tokens), self.plan.fast
        if block.window_size > 0:
            attended = run_attention(block.attn, block.norm1(tokens), full, block.window_size, fast=fast)
            tokens = tokens + block.drop_path(attended)
            return run_selected_perceptron(block, tokens, self.reducer, i, masked=self.training)
        if self.training:
            mask = self.reducer.mask(tokens, i)
            attended = attend_to_selected(block.attn, block.norm1(tokens), mask, fast)
            return run_perceptron(block, tokens + mask * block.drop_path(attended), mask)
        images = []
        for image in tokens.split(1):  # each may keep another number of tokens
            selected, positions, _, restore = self.reducer(image, i)
            if selected.numel() > 0:
                attended = run_attention(block.attn, block.norm1(selected), full, 0, positions=positions, fast=fast)
                selected = run_perceptron(block, selected + block.drop_path(attended))
            images.append(restore(selected))
        return torch.cat(images)
