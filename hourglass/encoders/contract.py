"""
The interface between an hourglass and an encoder. Each family of encoders implements it in one file, which registers
itself:

- an encoder has blocks, in one or several stages, each of which keeps the size of its map;
- its own forward pass calls each of them once, in order, with what the one before returned, a map (B, H, W, C) or a
  list (B, H * W, C) of the size that is set on the block as ``H`` and ``W``; it may do anything before the blocks,
  between stages and after;
- a block of the family can also be run on tokens that are fewer and lie apart (:class:`PlacedBlock`).

A block is seen through a view of it (:mod:`hourglass.encoders.sharing`), on which its family's :class:`PlacedBlock`
goes before its own class. Submodules are called and never reached into, so that hooks on them, adapters such as LoRA
and wrappers work as in the block's own forward pass.
"""

from typing import Any, ClassVar, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hourglass.encoders.sharing import hide, view_as, with_children
from hourglass.errors import InputError
from hourglass.reduction.reducer import Place
from hourglass.reduction.windows import map_size


class AttentionOptions(NamedTuple):
    """
    How a block's attention is run.

    Attributes:
        window_size: tokens a side of the block's windows; 0: attention is global.
        shifted: whether the windows are shifted by half of them.
        fast: whether it is the fast one of :mod:`hourglass.attention`, not the plain formula.
        published: whether reduced maps are treated as in the papers' own code.
        keys: side of the cells of tokens that are pooled to one key and one value; 1: no pooling.
    """

    window_size: int
    shifted: bool
    fast: bool
    published: bool
    keys: int = 1


class PlacedAttention(nn.Module):
    """Mixed in before the class of a block's attention: runs it on placed tokens (:class:`Place`)."""

    #: Children that the attention's own forward pass calls and this one does not: hooks on them are refused.
    uncalled: ClassVar[tuple[str, ...]] = ()

    attention_options: AttentionOptions
    num_heads: int
    qkv: nn.Module
    proj: nn.Module

    def forward(self, tokens: Tensor, place: Place) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            tokens: (B, h, w, C), normalised.
            place: where they lie.

        Returns:
            attention's result (B, h, w, C); with ``place.between`` also the keys, averaged over heads (B, h, w, D).
        """
        raise NotImplementedError


class PlacedBlock(nn.Module):
    """
    Mixed in before a block's class: runs it on the full map or on placed tokens. It uses the block's ``norm1``,
    ``attn``, ``norm2`` and ``mlp``, and, if present, ``drop_path`` and, with ``use_residual_block``, ``residual``.

    Attributes:
        windowed: whether the block's attention has windows.
    """

    #: What goes before the class of the block's attention.
    attention: ClassVar[type[PlacedAttention]]
    #: Whether it can be run on lists of tokens, of which windows may lose any number.
    takes_lists: ClassVar[bool] = True

    windowed: bool
    recompute: bool

    norm1: nn.Module
    norm2: nn.Module
    attn: nn.Module
    mlp: nn.Module
    residual: nn.Module
    drop_path: nn.Module

    def forward(self, tokens: Tensor, *arguments, **options) -> Tensor:
        """
        Args:
            tokens: (B, h, w, C).
            arguments: the tokens' :class:`Place`; else those of the block's own forward pass, and the map is full.

        Returns:
            (B, h, w, C)
        """
        if arguments and isinstance(arguments[0], Place):
            return self._recomputed(tokens, arguments[0])
        token_map = as_map(tokens, self)
        return self._recomputed(token_map, Place(map_size(token_map))).view_as(tokens)

    def _recomputed(self, tokens: Tensor, place: Place) -> Tensor:
        if self.training and (getattr(self, "use_act_checkpoint", False) or self.recompute):
            return checkpoint(self._run, tokens, place, use_reentrant=False)
        return self._run(tokens, place)

    def _run(self, tokens: Tensor, place: Place) -> Tensor:
        if tokens.numel() > 0:
            tokens = self._refine(tokens, place)
        if place.restore is not None:
            tokens = place.restore(tokens)
        if getattr(self, "use_residual_block", False):
            tokens = self.residual(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return tokens

    def _refine(self, tokens: Tensor, place: Place) -> Tensor:
        mask = place.mask
        attended = self.attn(self.norm1(tokens), place)
        if place.between is None:
            tokens = self._add(tokens, attended, mask, 1)
        else:
            attended, keys = attended
            tokens, mask = place.between(self._add(tokens, attended, mask, 1), keys)
        return self._add(tokens, self.mlp(self.norm2(tokens)), mask, 2)

    def _add(self, tokens: Tensor, update: Tensor, mask: Tensor | None, half: int) -> Tensor:
        """Add the update of attention (``half`` 1) or MLP (2)."""
        update = self.drop_path(update) if hasattr(self, "drop_path") else update
        return tokens + (update if mask is None else mask * update)


class Family:
    """
    A family of encoders: how they are recognised, and how their blocks are run on placed tokens.

    Attributes:
        name: of the family, for messages.
        known: classes of encoders, blocks and attention that need no verification. All others are verified first, also
            Detectron2's own, as forks have classes of the same dotted names.
        class_names: names of encoder classes that are recognised in a LazyConfig, before they are built.
        parts, attention_parts: attributes that a block of the family and its ``attn`` have.
        pools_keys: whether blocks with global attention can pool keys and values.
        pads_published: whether published plans also reduce the zeros that fill cut windows.
        block: mixed in before the class of a block.
        hourglass: mixed in before the class of an encoder.
    """

    name: str
    known: tuple[type, ...] = ()
    class_names: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("norm1", "attn", "norm2", "mlp")
    attention_parts: tuple[str, ...] = ("qkv", "proj", "num_heads")
    pools_keys: bool = False
    pads_published: bool = False
    block: type[PlacedBlock]
    hourglass: type

    def stages(self, encoder: nn.Module) -> list[list[nn.Module]] | None:
        """The encoder's blocks, stage by stage, as in its module lists; None for an encoder of another family."""
        raise NotImplementedError

    def stages_of(self, encoder: nn.Module) -> list[list[nn.Module]]:
        """:meth:`stages` of an encoder of the family."""
        stages = self.stages(encoder)
        assert stages is not None, f"{type(encoder).__name__} is no {self.name}"
        return stages

    def fits(self, block: Any) -> bool:
        """Whether a block, without its wrappers, has the attributes ``parts`` and ``attention_parts``."""
        has_parts = all(hasattr(block, name) for name in self.parts)
        return has_parts and all(hasattr(block.attn, name) for name in self.attention_parts)

    def window_size(self, block: Any) -> int:
        """Tokens a side of a block's windows; 0: its attention is global."""
        raise NotImplementedError

    def shifted(self, block: Any) -> bool:
        """Whether a block's windows are shifted."""
        return False

    def original_forward(self, encoder: Any, block: Any, tokens: Tensor) -> Tensor:
        """A block's own forward pass on a map, (B, H, W, C) -> (B, H, W, C), as the encoder calls it."""
        return block(tokens)

    def small_variant(self, block: Any) -> tuple[tuple[int, int], dict[str, Tensor]] | None:
        """
        For a block that only runs on maps of one size: a smaller size (H, W) that it is verified on, and the tensors
        that replace its own there, by name. None: it runs on maps of any size.
        """
        return None

    def check_published(self, plan: Any, blocks: list[Any]) -> None:
        """
        Raises:
            InputError: for a published plan that these blocks cannot follow.
        """

    def placed(self, block: Any, fast: bool = False, published: bool = False, keys: int = 1) -> nn.Module:
        """
        A view of a block that can be run on placed tokens, wrapped as the block is; the other arguments are those of
        :class:`AttentionOptions`.

        Raises:
            InputError: for hooks that would not be called.
        """
        if unwrapped(block) is not block:
            (name,) = block._modules
            return with_children(block, {name: self.placed(block._modules[name], fast, published, keys)})
        for name in self.block.attention.uncalled:
            child = getattr(block.attn, name, None)
            if isinstance(child, nn.Module) and (child._forward_hooks or child._forward_pre_hooks):
                raise InputError(
                    f"a hook on attn.{name} of {type(block).__name__} would not be called: remove it first"
                )
        attention = view_as(block.attn, self.block.attention)
        options = AttentionOptions(self.window_size(block), self.shifted(block), fast, published, keys)
        hide(attention, attention_options=options)
        view = view_as(with_children(block, {**block._modules, "attn": attention}), self.block)
        recompute = is_recomputed_by_fairscale(block)
        hide(view, windowed=self.window_size(block) > 0, recompute=recompute)
        if recompute:
            del view.__dict__["forward"]
        return view


def as_map(tokens: Tensor, block: Any) -> Tensor:
    """What an encoder's forward pass hands to a block, as a map (B, H, W, C)."""
    return tokens if tokens.dim() == 4 else tokens.unflatten(1, (block.H, block.W))


def unwrapped(block: Any) -> Any:
    """What a block's wrapper, such as torch's for activation checkpointing, wraps."""
    while hasattr(block, "_checkpoint_wrapped_module"):
        block = block._checkpoint_wrapped_module
    return block


def is_recomputed_by_fairscale(block: nn.Module) -> bool:
    """Whether fairscale's ``checkpoint_wrapper``, as Detectron2 uses it, has replaced the block's forward pass."""
    forward = block.__dict__.get("forward")
    function = getattr(forward, "func", None)
    return getattr(function, "__module__", "").startswith("fairscale.")


def project(linear: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """
    Project tokens, and a token of zeros, such as fills cut windows, along with them.

    Args:
        linear: C -> D channels; called once.
        tokens: (B, h, w, C).

    Returns:
        (B, h, w, D) and (D,).
    """
    if is_plain(linear):
        projected = linear(tokens)
        bias = linear.bias
        return projected, projected.new_zeros(projected.shape[-1]) if bias is None else bias.to(projected.dtype)
    rows = torch.cat([tokens.flatten(0, 2), tokens.new_zeros(1, tokens.shape[-1])])
    projected = linear(rows)
    return projected[:-1].unflatten(0, tokens.shape[:3]), projected[-1]


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling a module is the product with its weight, and nothing else."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) is nn.Linear and "forward" not in linear.__dict__ and not hooks


def key_mean(qkv: Tensor, heads: int) -> Tensor:
    """The keys of (B, h, w, 3 D), in the mean over heads: (B, h, w, D / heads)."""
    return qkv.unflatten(3, (3, heads, -1))[:, :, :, 1].mean(3)
