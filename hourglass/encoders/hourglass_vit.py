"""The hourglass around ViTDet's plain vision transformer."""

from detectron2.modeling import Backbone
from torch import Tensor, nn

from hourglass.encoders.plan import Plan
from hourglass.encoders.vit import embed, run_block
from hourglass.encoders.windows import EachWindow
from hourglass.errors import InputError
from hourglass.reduction import GridReducer, Reducer
from hourglass.reduction.reducer import map_size


class HourglassViT(Backbone):
    """
    A ViT whose middle blocks run on fewer tokens.

    It holds the encoder's own modules and parameters, under their own names: checkpoints of the encoder load, and
    changing a parameter of one changes it for both.

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
            self.reducer = plan.reducer
        if self._planned and plan.scope == "window":
            self.reducer = self._each_window(plan.reducer)
            if isinstance(plan.reducer, GridReducer):
                self._window = plan.reducer.cells((self.reducer.window, self.reducer.window))

    def _each_window(self, reducer: Reducer) -> EachWindow:
        windows = {self.blocks[i].window_size for i in self._planned} - {0}
        if len(windows) != 1:
            raise InputError(
                'scope "window" needs blocks with windows of one size among those of the plan, '
                f"got {sorted(windows) or 'none'} in blocks {self._planned.start} to {self._planned.stop - 1}"
            )
        return EachWindow(reducer, windows.pop())

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
        full = map_size(tokens)

        def blocks(refined: Tensor, sizes: Tensor | None, positions: Tensor | None) -> Tensor:
            for block in self.blocks[self._planned.start : self._planned.stop]:
                refined = run_block(block, refined, full, sizes, self._window, positions, self.plan.fast)
            return refined

        return self.plan.run(self.reducer, tokens, blocks)
