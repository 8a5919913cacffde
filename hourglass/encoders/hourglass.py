"""The hourglass around an encoder: its own forward pass, with some of its blocks run on fewer tokens."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hourglass import reduction
from hourglass.encoders.calibration import TOLERANCE, Calibration
from hourglass.encoders.contract import Family, as_map, is_recomputed_by_fairscale, unwrapped
from hourglass.encoders.plan import Plan
from hourglass.encoders.proof import is_on_meta, prove
from hourglass.encoders.registry import family_of
from hourglass.encoders.sharing import base_class, hide, modules_holding, new_view, replaced, unmodified, with_children
from hourglass.errors import InputError
from hourglass.reduction import Reducer
from hourglass.reduction.calibrated import Calibrated, check_restoring
from hourglass.reduction.scope import in_scope, probe


class Hourglass(nn.Module):
    """
    An encoder whose middle blocks run on fewer tokens: on a smaller map, on a list of tokens that merge block by block,
    or on those that are selected for each block.

    It is a view of the encoder: an instance of its class that shares its modules, parameters and hooks under their own
    names, so that checkpoints of the encoder load, and changing a parameter of one changes it for both. The blocks are
    views as well. Everything before, between and after the blocks is the encoder's own code. A reducer's parameters, if
    any, are registered under "reducer".

    Args:
        encoder: of a family that is registered, unmodified or expedited.
        plan: which blocks run on fewer tokens; ``Plan()``: the encoder's own forward pass.

    Raises:
        InputError: for an encoder whose blocks cannot be run on fewer tokens, or a plan that it cannot follow.
    """

    plan: Plan
    reducer: Reducer
    _planned: range
    _unmodified: nn.Module
    _body: nn.Module
    _counterparts: list[tuple[nn.Module, nn.Module]]
    _proof_pending: bool
    _weights_unchecked: bool

    def __new__(cls, encoder: nn.Module, plan: Plan):
        return new_view(cls, base_class(unmodified(encoder)))

    def __init__(self, encoder: nn.Module, plan: Plan):
        encoder = unmodified(encoder)
        family = family_of(encoder)
        stages = family.stages_of(encoder)
        blocks = [block for stage in stages for block in stage]
        planned = plan.blocks(len(blocks))
        reducer: Reducer | None = None
        proof_pending = weights_unchecked = False
        pooled = _blocks_with_pooled_keys(plan, family, blocks, planned) if plan.keys > 1 else set()
        if planned or plan.fast or pooled:
            inner = [unwrapped(block) for block in blocks]
            for module in modules_holding(encoder, {*inner, *(block.attn for block in inner)}):
                if module not in inner or not is_recomputed_by_fairscale(module):
                    refuse_altered_forward(module)
            if not (proof_pending := is_on_meta(encoder)):
                prove(encoder, family, planned)
        if plan.reducer is not None and planned:
            reducer = _bind_reducer(plan, plan.reducer, family, [blocks[i] for i in planned])
            if plan.calibration is not None:
                plan.calibration.check_encoder(encoder)
                reducer = _with_calibration(reducer, plan.calibration, inner[planned.start].norm1.weight)
                # Weights may be loaded later.
                weights_unchecked = is_on_meta(encoder) or plan.calibration.deviation(encoder)[0] > TOLERANCE

        views = {
            block: family.placed(
                block, plan.fast, plan.published and i in planned, keys=plan.keys if block in pooled else 1
            )
            for i, block in enumerate(blocks)
            if plan.fast or i in planned or block in pooled
        }
        self.__dict__.update(with_children(encoder, dict(replaced(encoder, views)._modules)).__dict__)
        runs: dict[nn.Module, nn.Module] = {}
        first = 0
        for stage in stages:
            among = [views[block] for i, block in enumerate(stage, start=first) if i in planned]
            if among and reducer is not None:
                runs[among[0]] = Middle(reducer, among, plan.proportional, max(0, first - planned.start))
                runs |= {view: PassThrough() for view in among[1:]}
            first += len(stage)
        body = replaced(with_children(encoder, dict(self._modules)), runs)
        if reducer is not None:
            self._modules["reducer"] = reducer
        counterparts = [(self, body)] + [
            (module, twin)
            for name, twin in body.named_modules()
            if name and (module := self.get_submodule(name)) is not twin and not isinstance(twin, Middle | PassThrough)
        ]
        hide(self, plan=plan, _planned=planned, _unmodified=encoder, _body=body, _counterparts=counterparts)
        hide(self, _proof_pending=proof_pending, _weights_unchecked=weights_unchecked)

    def train(self, mode: bool = True) -> "Hourglass":
        super().train(mode)  # which in Mask2Former's Swin returns nothing
        return self

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """As the encoder's."""
        if self._proof_pending and not is_on_meta(self):
            prove(self._unmodified, family_of(self._unmodified), self._planned)
            hide(self, _proof_pending=False)
        if self._weights_unchecked and not is_on_meta(self):
            assert self.plan.calibration is not None
            self.plan.calibration.check_weights(self._unmodified)
            hide(self, _weights_unchecked=False)
        for module, twin in self._counterparts:
            if twin.training != module.training:
                hide(twin, training=module.training)
        return self._body.forward(*arguments, **options)


class Middle(nn.Module):
    """
    Where the encoder's forward pass calls the first of a stage's planned blocks: runs all of them on fewer tokens.

    Args:
        reducer: bound to the encoder.
        blocks: views of the planned blocks.
        proportional: see :class:`~hourglass.Plan`.
        first: number of the first block among the plan's.
    """

    reducer: Reducer
    blocks: list[nn.Module]
    proportional: bool
    first: int

    def __init__(self, reducer: Reducer, blocks: Sequence[nn.Module], proportional: bool, first: int):
        super().__init__()
        hide(self, reducer=reducer, blocks=list(blocks), proportional=proportional, first=first)

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        token_map = as_map(tokens, self)
        return self.reducer.run(token_map, self.blocks, self.proportional, self.first).reshape(tokens.shape)


class PassThrough(nn.Module):
    """Where the encoder's forward pass calls a block that has been run already."""

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        return tokens


def refuse_altered_forward(module: nn.Module) -> None:
    """
    Raises:
        InputError: for a module whose call does not run its class's forward pass, a compiled one or one whose
            ``forward`` was replaced, and for one that is sharded already.
    """
    name = type(module).__name__
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        raise InputError(f"{name} is compiled, and would run as it was: expedite the model first, then compile")
    if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
        raise InputError(f"{name} is sharded already: expedite the model first, then shard its blocks")
    if "forward" in module.__dict__:
        raise InputError(f"the forward pass of this {name} was replaced, and would run as it was: expedite it first")


def _bind_reducer(plan: Plan, reducer: Reducer, family: Family, blocks: list[nn.Module]) -> Reducer:
    """The plan's reducer, ready for these blocks."""
    where = f"in blocks {plan.start} to {plan.start + len(blocks) - 1}"
    inner = [unwrapped(block) for block in blocks]
    windows = {family.window_size(block) for block in inner} - {0}
    name = type(reducer).__name__
    if reducer.needs_calibration and plan.calibration is None:
        raise InputError(f"{name} needs a plan with a calibration, which train_net.py --calibrate makes")
    if reducer.takes_lists and not family.block.takes_lists:
        raise InputError(
            f"{name} needs an encoder whose windows do not shift, got a {family.name}: tokens that merge in one window "
            "would lie in two windows of the next block"
        )
    if plan.scope == "window" and len(windows) != 1:
        raise InputError(
            'scope "window" needs blocks with windows of one size among those of the plan, '
            f"got {sorted(windows) or 'none'} {where}"
        )
    like = inner[0].norm1.weight
    if plan.scope == "map" and windows and reducer.on_grid and not _is_built_in(reducer):
        _check_positions(reducer, like)
    if not reducer.on_grid and plan.scope == "map" and windows:
        raise InputError(
            f'{name} needs scope "window" where blocks have windows, got scope "map" and windows '
            f"of {sorted(windows)} {where}: its tokens lie on no grid that could be cut into windows"
        )
    if not reducer.on_grid and any(getattr(block, "use_residual_block", False) for block in inner):
        raise InputError(f"{name} needs blocks without convolutions, got blocks with them {where}")
    if plan.published:
        family.check_published(plan, inner)
    reducer.bind([block.norm1.weight.numel() for block in inner])
    reducer.to(like.device)
    window = windows.pop() if plan.scope == "window" else None
    return in_scope(reducer, window, family.pads_published and plan.published, like)


def _blocks_with_pooled_keys(plan: Plan, family: Family, blocks: list[nn.Module], planned: range) -> set[nn.Module]:
    """The blocks that attend to pooled keys."""
    if not family.pools_keys:
        raise InputError(f"keys needs an encoder with global attention, got keys={plan.keys} and a {family.name}")
    pooled = {block for i, block in enumerate(blocks) if i not in planned and family.window_size(block) == 0}
    if not pooled:
        where = f" outside blocks {planned.start} to {planned.stop - 1}" if planned else ""
        needed = f"keys={plan.keys} needs an encoder with a block of global attention{where}"
        raise InputError(f"{needed}, got none (keys=1 pools no keys)")
    return pooled


def _with_calibration(reducer: Reducer, calibration: Calibration, like: Tensor) -> Reducer:
    """A bound reducer with calibrated restoring, for tokens of the type and on the device of ``like`` (C,)."""
    check_restoring(reducer, (64, 64), like)
    return Calibrated(reducer, calibration.corrections).to(like)


def _is_built_in(reducer: Reducer) -> bool:
    return type(reducer).__name__ in reduction.__all__ and getattr(reduction, type(reducer).__name__) is type(reducer)


def _check_positions(reducer: Reducer, like: Tensor) -> None:
    """Whether a reducer gives positions may show only when it runs."""
    if reducer.each_block:
        return
    try:
        reduction = probe(reducer, (64, 64), like)
    except InputError:  # a grid for larger maps
        return
    if reduction.positions is not None:
        raise InputError(
            f"{type(reducer).__name__} must set on_grid = False, as its tokens have positions: got on_grid = True"
        )
