"""The hourglass around Swin."""

from functools import partial

from detectron2.modeling import Backbone
from torch import Tensor, nn

from hourglass.compat import size_divisibility
from hourglass.encoders.plan import Plan
from hourglass.encoders.swin import Stage, embed, keep_frozen, merge_patches, run_checkpointed
from hourglass.encoders.vit import run_selected_perceptron
from hourglass.encoders.windows import EachWindow
from hourglass.errors import InputError
from hourglass.reduction import GridReducer, MergingReducer, SelectingReducer
from hourglass.reduction.reducer import map_size


class HourglassSwin(Backbone):
    """
    A Swin whose middle blocks run on fewer tokens. Blocks are counted from 0 over all stages. Each stage that has
    blocks of the plan reduces its map before the first of them and restores it after the last, before its
    output and the next stage.

    Windows shrink with the map, their shift and its mask with them, and the relative position bias is read at the
    distances of the original tokens, from the tables as they are. Under ``Plan(published=True)`` instead, as in
    Expedit's code: the zeros that fill cut windows are reduced along, the mask of shifted blocks is made for the full
    map's shift, and the bias tables are stretched to the smaller window. That takes scope "window" and windows of more
    than half their side, for which that mask is one.

    It holds the encoder's own modules and parameters, under their own names: checkpoints of the encoder load, and
    changing a parameter of one changes it for both.

    Args:
        encoder: a :class:`~hourglass.encoders.Swin` or Detectron2's ``SwinTransformer``.
        plan: which blocks run on fewer tokens.

    Raises:
        InputError: for a plan that the encoder cannot follow.
    """

    def __init__(self, encoder: Backbone, plan: Plan):
        super().__init__()
        self.plan = plan
        self._planned = plan.blocks(self.depth(encoder))
        self.patch_embed = encoder.patch_embed
        self.ape = encoder.ape
        if self.ape:
            self.absolute_pos_embed = encoder.absolute_pos_embed
        self.pos_drop = encoder.pos_drop
        self.layers = encoder.layers
        self.out_indices = encoder.out_indices
        for i in self.out_indices:
            self.add_module(f"norm{i}", encoder.get_submodule(f"norm{i}"))
        self._out_features = encoder._out_features
        self._out_feature_channels = encoder._out_feature_channels
        self._out_feature_strides = encoder._out_feature_strides
        self._size_divisibility = size_divisibility(encoder)
        self.frozen_stages = encoder.frozen_stages
        self.training = encoder.training
        if self._planned:
            self._take_reducer()

    @staticmethod
    def depth(encoder: Backbone) -> int:
        """The number of blocks that a plan counts."""
        return sum(len(stage.blocks) for stage in encoder.layers)

    def train(self, mode: bool = True) -> "HourglassSwin":
        super().train(mode)
        keep_frozen(self)
        return self

    def _take_reducer(self) -> None:
        plan, reducer = self.plan, self.plan.reducer
        if isinstance(reducer, MergingReducer):
            raise InputError(f"{type(reducer).__name__} takes a ViT, got a Swin, whose windows are shifted")
        if not reducer.on_grid and plan.scope != "window":
            raise InputError(f'{type(reducer).__name__} takes scope "window" in Swin, got {plan.scope!r}')
        blocks = [block for stage in self.layers for block in stage.blocks]
        if isinstance(reducer, SelectingReducer):
            reducer.fit([blocks[i].norm1.weight.numel() for i in self._planned])
        self.reducer = reducer.to(blocks[0].norm1.weight.device)
        if plan.scope == "window":
            self.reducer = EachWindow(reducer, self.layers[0].window_size, pad=plan.published)
        if plan.published:
            self._check_published()

    def _check_published(self) -> None:
        if self.plan.scope != "window":
            raise InputError(f'a published plan takes scope "window" in Swin, got {self.plan.scope!r}')
        window = self.layers[0].window_size
        cells = self.plan.reducer.cells((window, window))
        if min(cells) <= window // 2:
            raise InputError(
                f"a published plan takes more than {window // 2} tokens a side of a window of {window}, "
                f"got {cells[0]} x {cells[1]}"
            )

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """
        Args:
            image: (B, 3, height, width).

        Returns:
            name to (B, C, H, W), from stride 4 to 32.
        """
        tokens = embed(self, image)
        names = dict(zip(self.out_indices, self._out_features))
        features = {}
        first = 0
        for i, stage in enumerate(self.layers):
            blocks = range(first, first + len(stage.blocks))
            planned = range(max(blocks.start, self._planned.start), min(blocks.stop, self._planned.stop))
            out, tokens = self._run_stage(stage, tokens, range(planned.start - first, planned.stop - first), first)
            first = blocks.stop
            if i in names:
                features[names[i]] = self.get_submodule(f"norm{i}")(out).permute(0, 3, 1, 2)
        return features

    def _run_stage(self, stage: nn.Module, tokens: Tensor, planned: range, first: int) -> tuple[Tensor, Tensor | None]:
        """``planned`` counts the stage's blocks, of which the first is number ``first`` of all."""
        if not planned and not self.plan.fast:
            return stage(tokens) if isinstance(stage, Stage) else _run_detectron2_stage(stage, tokens)
        planned = planned or range(0)  # an empty one may have any bounds
        for block in stage.blocks[: planned.start]:
            tokens = self._run_whole(stage, block, tokens)
        if planned:
            if isinstance(self.reducer, SelectingReducer):
                tokens = self._run_selecting(stage, tokens, planned, first - self._planned.start)
            else:
                tokens = self._run_planned(stage, tokens, planned)
        for block in stage.blocks[planned.stop :]:
            tokens = self._run_whole(stage, block, tokens)
        return tokens, None if stage.downsample is None else merge_patches(stage.downsample, tokens)

    def _run_whole(self, stage: nn.Module, block: nn.Module, tokens: Tensor) -> Tensor:
        return run_checkpointed(stage, block, tokens, map_size(tokens), None, None, False, self.plan.fast)

    def _run_planned(self, stage: nn.Module, tokens: Tensor, planned: range) -> Tensor:
        plan, full = self.plan, map_size(tokens)
        window = None
        if plan.scope == "window" and isinstance(plan.reducer, GridReducer):
            window = plan.reducer.cells((stage.window_size, stage.window_size))

        def blocks(refined: Tensor, sizes: Tensor | None, positions: Tensor | None) -> Tensor:
            if positions is not None and window is None:
                raise InputError(
                    "Swin's windows take tokens on the regular grid, or those of a GridReducer under scope "
                    f'"window"; got some that lie elsewhere, from {plan.reducer!r}'
                )
            options = (sizes, window, plan.published, plan.fast, positions)
            for block in stage.blocks[planned.start : planned.stop]:
                refined = run_checkpointed(stage, block, refined, full, *options)
            return refined

        return plan.run(self.reducer, tokens, blocks)

    def _run_selecting(self, stage: nn.Module, tokens: Tensor, planned: range, offset: int) -> Tensor:
        """
        Attention of all tokens, the perceptron of those that are selected. ``offset`` is added to a block's number in
        the stage to have that in the plan.
        """
        for i in planned:
            perceptron = partial(run_selected_perceptron, reducer=self.reducer, number=i + offset, masked=self.training)
            options = (None, None, False, self.plan.fast, None, perceptron)
            tokens = run_checkpointed(stage, stage.blocks[i], tokens, map_size(tokens), *options)
        return tokens


def _run_detectron2_stage(stage: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Its own forward pass, to the bit."""
    height, width = map_size(tokens)
    out, _, _, following, *size = stage(tokens.flatten(1, 2), height, width)
    return out.unflatten(1, (height, width)), following.unflatten(1, tuple(size))
