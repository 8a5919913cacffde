"""
Verifies that an hourglass runs an encoder's blocks as their own forward passes do. An encoder of an unknown class (a
copy, a fork, a subclass) is accepted only then: otherwise a difference would silently affect every figure.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hourglass.contexts import evaluating
from hourglass.encoders.contract import Family, as_map, unwrapped
from hourglass.encoders.registry import family_of, find_encoder, is_known
from hourglass.encoders.sharing import base_class, hide, replaced, unmodified, with_children
from hourglass.errors import InputError, reason
from hourglass.reduction.reducer import Place

# Largest difference of a block's own result and ours, relative to what the block adds to its tokens: in float64, and
# where a block runs only in its own type, in epsilons of that.
TOLERANCE = 1e-6
EPSILONS = 64

_ACROSS = "no plan may run blocks on fewer tokens across that: end it there, or start it after"


class Proof(NamedTuple):
    """
    The result of running one kind of an encoder's blocks both ways on a small random map.

    Attributes:
        blocks: numbers of the blocks of this kind.
        kind: class of the blocks and of their attention.
        difference: largest absolute difference between the block's own forward pass and the hourglass's (plain or
            fast), divided by the largest absolute update of the block.
        tolerance: largest difference that rounding explains.
    """

    blocks: list[int]
    kind: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        verdict = "equal" if self.holds else "DIFFERENT"
        limits = f"{self.difference:.1e} (at most {self.tolerance:.0e})"
        return f"{verdict} {limits}: {self.kind}, blocks {_ranges(self.blocks)}"


def verify(model: nn.Module) -> list[Proof]:
    """
    Run each distinct kind of block of a model's encoder both ways, by its own forward pass and as an hourglass runs it
    on a full map (plain and fast), with random parameters in float64::

        for proof in hourglass.verify(model):
            print(proof)

    Args:
        model: has, or is, one encoder of a registered family.

    Returns:
        a proof for each kind of block; ``proof.holds`` says whether both ways agree.

    Raises:
        InputError: for a model without such an encoder, with blocks that cannot be run, or on the meta device.
    """
    encoder = unmodified(find_encoder(model)[1])
    if is_on_meta(encoder):
        raise InputError(f"{_name(encoder)} is on the meta device: its blocks cannot be run without values")
    family = family_of(encoder)
    blocks = [block for stage in family.stages_of(encoder) for block in stage]
    return [_prove_kind(encoder, family, blocks, numbers) for numbers in _kinds(blocks)]


def prove(encoder: nn.Module, family: Family, planned: range) -> None:
    """
    Prove an encoder that is not known by its class.

    Args:
        encoder: unmodified.
        family: its family.
        planned: the blocks that are to run on fewer tokens.

    Raises:
        InputError: where a block's own forward pass gives something else than ours, or the encoder's uses a map between
            blocks that are to run on fewer tokens.
    """
    if is_known(encoder):
        return
    blocks = [block for stage in family.stages_of(encoder) for block in stage]
    for numbers in _kinds(blocks):
        proof = _prove_kind(encoder, family, blocks, numbers)
        if not proof.holds:
            raise InputError(
                f"{_name(encoder)} looks like {family.name}, but its block {numbers[0]}, a {proof.kind}, gives another "
                f"result than {family.name}'s would: they differ by {100 * proof.difference:.2g} % of what the block "
                "adds to its tokens. It needs a family of its own, see hourglass.encoders.contract"
            )
    _check_calls(encoder, family, blocks, planned)


def is_on_meta(encoder: nn.Module) -> bool:
    """Whether an encoder has no values yet."""
    return any(tensor.is_meta for tensor in (*encoder.parameters(), *encoder.buffers()))


def _name(module: nn.Module) -> str:
    kind = base_class(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def _kinds(blocks: Sequence[nn.Module]) -> list[list[int]]:
    """The numbers of the blocks of each kind: of the same classes, shapes, buffers and attributes."""
    kinds: dict[Any, list[int]] = {}
    for i, block in enumerate(blocks):
        block = unwrapped(block)
        described = [(name, base_class(module), _attributes(module)) for name, module in block.named_modules()]
        shapes = [(name, tuple(parameter.shape)) for name, parameter in block.named_parameters()]
        buffers = [(name, _content(buffer)) for name, buffer in block.named_buffers()]
        kinds.setdefault((str(described), str(shapes), str(buffers)), []).append(i)
    return list(kinds.values())


def _attributes(module: nn.Module) -> list[tuple[str, str]]:
    # What a pass sets (a size, say) or what grows from block to block (the rate of stochastic depth) tells no kind.
    ignored = {*vars(nn.Module()), "H", "W", "drop_prob", "p", "recompute"}
    return sorted((name, _content(value)) for name, value in vars(module).items() if name not in ignored)


def _content(value: Any) -> str:
    """A text that differs where values do. Objects that cannot be looked into are the same only if they are one."""
    if isinstance(value, Tensor):
        plain = value.detach().int_repr() if value.is_quantized else value.detach()
        data = plain.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_content(key)}: {_content(item)}' for key, item in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_content, value))})"
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    return f"{type(value).__qualname__} {id(value)}"


class _BlockBothWays(nn.Module):
    """A block by its own forward pass, and as an hourglass runs it, plain and fast, on one map."""

    encoder: nn.Module
    family: Family
    views: list[nn.Module]

    def __init__(self, encoder: nn.Module, family: Family, block: nn.Module):
        super().__init__()
        self.block = unwrapped(block)
        hide(self, encoder=encoder, family=family, views=[family.placed(self.block, fast) for fast in (False, True)])

    def forward(self, tokens: Tensor) -> list[Tensor]:
        size = (tokens.shape[1], tokens.shape[2])
        return [
            self.family.original_forward(self.encoder, self.block, tokens),
            *(view(tokens, Place(size)) for view in self.views),
        ]


def _prove_kind(encoder: nn.Module, family: Family, blocks: Sequence[nn.Module], numbers: list[int]) -> Proof:
    block = unwrapped(blocks[numbers[0]])
    window = family.window_size(block)
    kind = f"{type(block).__name__} of {f'windows of {window}' if window else 'global attention'}"
    # Neither square nor in whole windows, and more than one of them.
    size = (window + 2, 2 * window - 1) if window > 1 else (5, 7)
    size, instead = family.small_variant(block) or (size, {})
    both = _BlockBothWays(encoder, family, block)
    random = torch.Generator().manual_seed(0)
    weight = block.norm1.weight
    tokens = torch.randn(1, *size, len(weight), generator=random, dtype=torch.float64).to(weight.device)
    with evaluating(block), torch.no_grad():
        try:
            # Parameters as they are may hide a difference: a scale that starts at one, a projection that starts at 0.
            drawn = {
                **{name: tensor.double() + _noise(tensor, random) for name, tensor in both.named_parameters()},
                **dict(both.named_buffers()),
                **{f"block.{name}": tensor for name, tensor in instead.items()},
            }
            drawn = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in drawn.items()}
            results, tolerance = torch.func.functional_call(both, drawn, (tokens,)), TOLERANCE
        except Exception:  # what does not run in float64, such as quantised layers, runs as it is
            tokens = tokens.to(weight.dtype)
            try:
                results, tolerance = both(tokens), EPSILONS * torch.finfo(weight.dtype).eps
            except Exception as error:
                raise InputError(
                    f"{_name(encoder)} looks like {family.name}, but its block {numbers[0]}, a {kind}, cannot be run "
                    f"on placed tokens ({reason(error)})"
                ) from error
    expected, *results = (result.double() for result in results)
    added = (expected - tokens.double()).abs().max()
    difference = max(
        float((result - expected).abs().max() / added) if result.shape == expected.shape else math.inf
        for result in results
    )
    return Proof(numbers, kind, math.inf if math.isnan(difference) else difference, tolerance)


def _noise(tensor: Tensor, random: torch.Generator) -> Tensor:
    return 0.1 * torch.randn(tensor.shape, generator=random, dtype=torch.float64).to(tensor.device)


class _HeldMap:
    """In place of a map between blocks that run on fewer tokens: whoever uses it is told that there is none."""

    def __init__(self, number: int):
        self.number = number


class _RecordingBlock(nn.Module):
    """In a block's place: notes that it was called, and with what."""

    number: int
    calls: list[tuple[int, bool]]
    last: dict[str, Any]
    held: bool

    def __init__(self, number: int, calls: list[tuple[int, bool]], last: dict[str, Any], held: bool):
        super().__init__()
        hide(self, number=number, calls=calls, last=last, held=held)

    def forward(self, tokens: Any, *_: Any) -> Any:
        last = self.last.get("output")
        self.calls.append((self.number, self.last.get("inside", False) and tokens is not last))
        given = self.last["tokens"] if isinstance(tokens, _HeldMap) else tokens
        as_map(given, self)
        output = _HeldMap(self.number) if self.held else given.clone()
        self.last.update(output=output, inside=self.held, tokens=given)
        return output


def _check_calls(encoder: nn.Module, family: Family, blocks: Sequence[nn.Module], planned: range) -> None:
    """Whether the encoder's own forward pass, run without data, calls each block once, in order, one on the other."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    ends = {sum(len(stage) for stage in family.stages_of(encoder)[: i + 1]) - 1 for i in range(len(blocks))}
    calls: list[tuple[int, bool]] = []
    last: dict[str, Any] = {}
    runs: dict[nn.Module, nn.Module] = {
        block: _RecordingBlock(i, calls, last, i in planned and i != planned.stop - 1 and i not in ends)
        for i, block in enumerate(blocks)
    }
    body = replaced(with_children(encoder, dict(encoder._modules)), runs)
    first = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    side = _image_side(encoder)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            image = torch.empty(1, first.in_channels, side, side, dtype=first.weight.dtype, device=first.weight.device)
            returned = body.forward(image)
    except (AttributeError, TypeError, RuntimeError) as error:
        if isinstance(last.get("output"), _HeldMap):
            raise InputError(
                f"{_name(encoder)} uses the map after block {last['output'].number}, and {_ACROSS} ({reason(error)})"
            ) from error
        raise InputError(f"the forward pass of {_name(encoder)} could not be followed ({reason(error)})") from error
    if [number for number, _ in calls] != list(range(len(blocks))):
        raise InputError(f"{_name(encoder)} does not call each of its blocks once and in order: it cannot be expedited")
    changed = next((number for number, changed in calls if changed), None)
    if changed is not None:
        raise InputError(f"{_name(encoder)} changes the map between blocks {changed - 1} and {changed}, and {_ACROSS}")
    held = next((leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, _HeldMap)), None)
    if held is not None:
        raise InputError(f"{_name(encoder)} returns the map after block {held.number}, and {_ACROSS}")


def _image_side(encoder: nn.Module) -> int:
    """An image that the encoder takes: what it says, or a multiple of all usual patches."""
    for module in (encoder, getattr(encoder, "patch_embed", None)):
        side = getattr(module, "img_size", None)
        if isinstance(side, (tuple, list)):
            side = side[0]
        if isinstance(side, int) and side > 0:
            return side
    return 448


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5" """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
