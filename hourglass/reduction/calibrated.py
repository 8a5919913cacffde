"""
Calibrated restoring: what restoring leaves out is put back by a linear map of it.

A smaller map's mixture of tokens misses d = x - U c of a token x, where c are the reduced tokens and U their mixture,
and restoring adds no more than the change of the mixture, x + U (c' - c). The blocks would have changed d too, and to
first order linearly. With B and b fitted to what is missing (:mod:`hourglass.fitting`), a token becomes

    y = x + U (c' - c) + d B + b,

or, with two more maps, of the token and of its update:  + d B + x B' + U (c' - c) B'' + b. As U mixes tokens and B
channels, U z B = U (z B), and only x is multiplied on the full map.

Such maps hold for images like those that they were fitted to, and a linear map of others can be far off. So an image's
reduced tokens are looked at, and the less they are like those that were seen, the less is corrected: with the mean
n of |c W|^2 over them, where W whitens, by the share 2 - n of the correction, within 0 and 1.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hourglass.errors import InputError
from hourglass.reduction.reducer import GridReducer, Reducer, Reduction, refine
from hourglass.reduction.windows import map_size

#: What a correction's tensors are called, and what each multiplies.
MAPS = ("tokens", "reduced", "refined")
# Along an axis, of the reduced tokens that an image is known by.
SIDE = 16


def sample(tokens: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, n, C), evenly spaced, about 16 x 16 of them or more."""
    h, w = tokens.shape[1:3]
    return tokens[:, :: max(1, h // SIDE), :: max(1, w // SIDE)].flatten(1, 2)


class Guard(nn.Module):
    """
    Tells how much of a correction an image gets.

    Args:
        whitening: (C, C), of reduced tokens, such that the sum of squares is 1 in the mean over the farthest image that
            was seen.
    """

    whitening: Tensor

    def __init__(self, whitening: Tensor):
        super().__init__()
        self.register_buffer("whitening", whitening)

    def forward(self, reduced: Tensor) -> Tensor:
        """(B, h, w, C), an image's reduced tokens -> (B, 1, 1, 1), its share, from 0 to 1."""
        novelty = (sample(reduced) @ self.whitening.to(reduced.dtype)).square().sum(-1).mean(1)
        return (2 - novelty).clamp(0, 1)[:, None, None, None].to(reduced.dtype)


class Correction(nn.Module):
    """
    The maps of one stage, of r = C channels, or of fewer that a last one brings back to C.

    Args:
        tensors: "tokens" (C, r), which a token x is multiplied with; "reduced" and "refined" (C, r), which c and c'
            are; "constant" (C,); "last" (r, C); "whitening" (C, C), of the :class:`Guard`. All but "tokens" and
            "constant" may be missing.
    """

    constant: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        for name in (*MAPS, "constant", "last"):
            self.register_buffer(name, tensors.get(name))
        self.guard = Guard(tensors["whitening"]) if "whitening" in tensors else None

    def forward(self, tokens: Tensor, reduction: Reduction, refined: Tensor) -> Tensor:
        """(B, H, W, C), its reduction, and the reduced tokens refined (B, h, w, C) -> (B, H, W, C)"""
        share = None if self.guard is None else self.guard(reduction.tokens)
        if refined.numel() > 0:
            of_refined = self._product("refined", refined, share)
            of_reduced = self._product("reduced", reduction.tokens, share)
            for change in (of_refined, of_reduced):
                refined = refined if change is None else refined + change
        correction = self._product("tokens", tokens, share)
        assert correction is not None
        constant = self.constant.to(correction.dtype)
        return reduction.restore(refined) + (correction + (constant if share is None else share * constant))

    def _product(self, name: str, tokens: Tensor, share: Tensor | None) -> Tensor | None:
        matrix, last = getattr(self, name), self.last
        if matrix is None:
            return None
        product = tokens @ matrix.to(tokens.dtype)
        if share is not None:
            product = product * share
        return product if last is None else product @ last.to(tokens.dtype)


class Calibrated(Reducer):
    """
    A reducer of one smaller map, with calibrated restoring.

    Args:
        reducer: restores what the blocks did to the smaller map's tokens, see :func:`check_restoring`.
        corrections: number of a stage's first block among those of the plan -> the tensors of :class:`Correction`.
    """

    def __init__(self, reducer: Reducer, corrections: Mapping[int, Mapping[str, Tensor]]):
        super().__init__()
        self.reducer = reducer
        self.on_grid = reducer.on_grid
        self.corrections = nn.ModuleDict({str(first): Correction(tensors) for first, tensors in corrections.items()})

    def extra_repr(self) -> str:
        return ""

    def forward(self, tokens: Tensor, first: int = 0) -> Reduction:
        reduction = self.reducer(tokens)
        correction = self.corrections[str(first)]
        return reduction._replace(restore=lambda refined: correction(tokens, reduction, refined))

    def run(self, tokens: Tensor, blocks: Sequence[nn.Module], proportional: bool, first: int = 0) -> Tensor:
        reduction = self(tokens, first)
        return reduction.restore(refine(reduction, map_size(tokens), blocks, proportional))


def check_restoring(reducer: Reducer, size: tuple[int, int], like: Tensor) -> None:
    """
    Whether a reducer's restoring is what is calibrated: x + U (c' - c), linear in the tokens' change c' - c and
    nothing without one.

    Args:
        reducer: of maps of ``size`` (H, W).
        like: (C,), of the tokens' device and type.

    Raises:
        InputError: for another.
    """
    if like.is_meta:
        return
    if reducer.each_block:
        raise InputError(
            f"calibration needs a reducer of one smaller map, got {_name(reducer)}, which reduces anew in each block"
        )
    if isinstance(reducer, GridReducer):  # of a grid for larger maps
        size = (max(size[0], int(reducer.grid[0])), max(size[1], int(reducer.grid[1])))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokens = torch.randn(1, *size, len(like), generator=generator).to(like)
        reduction = reducer(tokens)
        change = torch.randn(reduction.tokens.shape, generator=generator).to(like)
        unchanged, once, thrice = (reduction.restore(reduction.tokens + factor * change) for factor in (0, 1, 3))
    single, triple = once - unchanged, thrice - unchanged
    # Half precision keeps about three digits of sums of many tokens.
    tolerance = 1e-4 if like.dtype in (torch.float32, torch.float64) else 0.05
    if (unchanged - tokens).abs().max() > tolerance or (triple - 3 * single).abs().max() > 10 * tolerance:
        raise InputError(
            f"calibration needs a reducer that restores what the blocks changed, got {_name(reducer)}, which restores "
            'something else: use restore_mode="update" where the reducer has it'
        )


def _name(reducer: Reducer) -> str:
    inner = getattr(reducer, "reducer", reducer)
    return type(inner).__name__
