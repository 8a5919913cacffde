"""Token clustering and reconstruction (Expedit, arXiv 2210.01035)."""

import inspect
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hourglass.checks import check_choice, check_count, renamed_argument
from hourglass.contexts import without_autocast
from hourglass.errors import InputError
from hourglass.operators import is_exporting, is_symbolic, operator
from hourglass.reduction.neighborhoods import PART, home_centers, neighborhoods
from hourglass.reduction.pooling import average_pool
from hourglass.reduction.reducer import PAIRS, RESTORE_MODES, GridReducer, Reduction
from hourglass.reduction.windows import map_size

WEIGHTS = ("sum", "l2")
CANDIDATES = ("neighborhood", "all")

# "auto" is this over the mean squared distance of tokens and their home centres.
AUTO_TEMPERATURE = 8.0

# A centre that stands for less than this share of a token stays where it was.
EMPTY = 1e-30


def cluster(
    tokens: Tensor, grid: tuple[int, int], iterations: int, neighborhood: int, temperature: float | Tensor
) -> tuple[Tensor, Tensor | None]:
    """
    Soft clustering around a grid of centres: from adaptive average pooling, each iteration makes every centre the mean
    of the tokens that reach it, weighted by their affinity to it. Gradients flow through the last mean; the
    affinities are constants to them, as in the authors' code.

    Args:
        tokens: (B, H, W, C), float32.
        grid: (h, w).
        iterations: how often the centres are refined.
        neighborhood: odd; a token reaches the cells of a square of this side around its home cell.
        temperature: multiplies the squared distance of token and centre; a number, or one for each map (B, 1, 1, 1).

    Returns:
        centres (B, h, w, C), and how many tokens each stands for (B, h, w), None after no iteration.
    """
    if iterations == 0:
        return average_pool(tokens, grid), None
    clustered = _cluster(tokens, *grid, iterations, neighborhood, _as_tensor(temperature, tokens))
    return clustered[..., :-1], clustered[..., -1]


def _as_tensor(temperature: float | Tensor, like: Tensor) -> Tensor:
    return temperature if isinstance(temperature, Tensor) else like.new_full((1, 1, 1, 1), temperature)


@operator(
    "Tensor tokens, SymInt h, SymInt w, int iterations, int neighborhood, Tensor temperature",
    lambda tokens, h, w, *_: [tokens.shape[0], h, w, tokens.shape[3] + 1],
)
def _cluster(tokens: Tensor, h: int, w: int, iterations: int, neighborhood: int, temperature: Tensor) -> Tensor:
    """(B, h, w, C + 1): centres, and in the last channel their sizes."""
    near = neighborhoods(map_size(tokens), (h, w), neighborhood // 2, tokens.device)
    parts = [(part, near.tile_tokens(tokens, part)) for part in near.parts(tokens)]
    centers = average_pool(tokens, (h, w))
    for _ in range(iterations):
        blocks = near.blocks(centers)
        norms = near.blocks(centers.detach().square().sum(-1, keepdim=True))
        sums, sizes = torch.zeros_like(blocks), torch.zeros_like(norms)
        for part, tiles in parts:
            with torch.no_grad():
                scores = _scores(
                    tiles, near.patches(blocks, part), near.patches(norms, part), near.reach(part), temperature
                )
                affinity = scores.softmax(-1) * near.real(part)
                sizes = near.add_patches(sizes, affinity.sum(-2)[..., None], part)
            sums = near.add_patches(sums, affinity.transpose(-2, -1) @ tiles, part)
        sizes = near.unblock(sizes)
        centers = torch.where(sizes > EMPTY, near.unblock(sums) / sizes.clamp(min=EMPTY), centers)
    return torch.cat([centers, sizes], dim=-1)


def mixture(
    tokens: Tensor,
    centers: Tensor,
    temperature: float | Tensor,
    k: int,
    neighborhood: int | None,
    weights: str,
) -> Callable[[Tensor], Tensor]:
    """
    The function that restores tokens from the centres' refined features (Expedit): each token mixes those of its ``k``
    most similar centres, with weights exp(-temperature x squared distance) from the features before. With all centres
    as candidates, those as similar as the k-th are kept too, as in the authors' code. Gradients do not flow through the
    weights.

    Args:
        tokens: (B, H, W, C), float32.
        centers: (B, h, w, C), float32.
        temperature: as in :func:`cluster`.
        k: number of centres.
        neighborhood: odd; only centres that many cells around home are candidates. None: all are.
        weights: "sum": they sum to 1. "l2": their squares sum to 1, as in the authors' code; those with a norm below
            1e-12 fade out.

    Returns:
        a function (B, h, w, D) -> (B, H, W, D), for any D.
    """
    temperature = _as_tensor(temperature, tokens)
    return lambda refined: _mix(tokens, centers, refined, temperature, k, neighborhood or 0, weights)


@operator(
    "Tensor tokens, Tensor centers, Tensor refined, Tensor temperature, int k, int neighborhood, str weights",
    lambda tokens, centers, refined, *_: [*tokens.shape[:3], refined.shape[3]],
    like=2,
)
def _mix(
    tokens: Tensor, centers: Tensor, refined: Tensor, temperature: Tensor, k: int, neighborhood: int, weights: str
) -> Tensor:
    """See :func:`mixture`; ``neighborhood`` 0 is None there."""
    if neighborhood == 0:
        return _mix_all(tokens, centers, refined, temperature, k, weights)
    near = neighborhoods(map_size(tokens), map_size(centers), neighborhood // 2, tokens.device)
    blocks, norms = near.blocks(centers), near.blocks(centers.square().sum(-1, keepdim=True))
    nearest, shares = [], []
    for part in near.parts(tokens):
        with torch.no_grad():
            tiles, reach = near.tile_tokens(tokens, part), near.reach(part)
            scores = _scores(tiles, near.patches(blocks, part), near.patches(norms, part), reach, temperature)
            top = scores.topk(min(k, scores.shape[-1]), dim=-1)
            nearest.append(near.untile_tokens(near.index_of(top.indices, part), part))
            shares.append(near.untile_tokens(_normalized(tiles, top.values, temperature, weights), part))
    return gather_mixture(refined, torch.cat(nearest, dim=1), torch.cat(shares, dim=1))


def gather_mixture(refined: Tensor, nearest: Tensor, shares: Tensor) -> Tensor:
    """
    Mix for each token the features of its nearest centres, without an array of tokens x k x channels.

    Args:
        refined: (B, h, w, D).
        nearest: (B, H, W, k) int64, numbers of centres.
        shares: (B, H, W, k).

    Returns:
        (B, H, W, D)
    """
    batch, h, w, channels = refined.shape
    of_image = torch.arange(batch, device=refined.device)[:, None, None, None] * (h * w)
    if is_exporting():  # ONNX has no such operator
        rows = refined.reshape(-1, channels)[(nearest + of_image).flatten(0, 2)]
        return (shares.to(refined.dtype).flatten(0, 2)[:, None] @ rows).view(*nearest.shape[:3], channels)
    mixed = F.embedding_bag(
        (nearest + of_image).flatten(0, 2),
        refined.reshape(-1, channels),
        per_sample_weights=shares.to(refined.dtype).flatten(0, 2),
        mode="sum",
    )
    return mixed.view(*nearest.shape[:3], channels)


def _mix_all(tokens: Tensor, centers: Tensor, refined: Tensor, temperature: Tensor, k: int, weights: str) -> Tensor:
    """All centres are candidates, for so many tokens at a time that memory stays bounded."""
    tiles, patches, features = (x.flatten(1, 2)[:, None] for x in (tokens, centers, refined))
    norms = patches.square().sum(-1)[:, :, None]
    mixed = []
    pairs = patches.shape[0] * patches.shape[2]
    for part in [tiles] if is_symbolic(pairs, tiles.shape[2]) else tiles.split(max(1, PAIRS // pairs), dim=2):
        with torch.no_grad():
            scores = _products(part, patches, norms) * temperature
            shares = _shares(part, scores, temperature, k, weights)
        mixed.append(shares.to(refined.dtype) @ features)
    return torch.cat(mixed, dim=2).view(*tokens.shape[:3], -1)


def _shares(tiles: Tensor, scores: Tensor, temperature: Tensor, k: int, weights: str) -> Tensor:
    """
    (B, T, n, m) what the token has of each centre, from the tokens (B, T, n, C) and their scores (B, T, n, m). Centres
    as similar as the k-th are kept too, as in the authors' code.
    """
    if k < scores.shape[-1]:
        smallest = scores.topk(k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    return _normalized(tiles, scores, temperature, weights)


def _normalized(tiles: Tensor, scores: Tensor, temperature: Tensor, weights: str) -> Tensor:
    if weights == "sum":
        return scores.softmax(-1)
    scores = scores - tiles.square().sum(-1, keepdim=True) * temperature
    return F.normalize(scores.clamp(max=0).exp(), p=2, dim=-1, eps=1e-12)


def _scores(tiles: Tensor, patches: Tensor, norms: Tensor, reach: Tensor, temperature: Tensor) -> Tensor:
    """
    Minus temperature times the squared distance, up to a constant for each token; -inf where a token does not reach.

    Args:
        tiles: (B, T, n, C).
        patches: (B, T, m, C), centres.
        norms: (B, T, m, 1), of the centres, squared.
        reach: (T, n, m).

    Returns:
        (B, T, n, m)
    """
    return (_products(tiles, patches, norms.transpose(-2, -1)) * temperature).masked_fill(~reach, -torch.inf)


def _products(tiles: Tensor, patches: Tensor, norms: Tensor) -> Tensor:
    """(B, T, n, m) twice the dot products of (B, T, n, C) and (B, T, m, C), less the latter's norms (B, T, 1, m)."""
    batch, count, n, channels = tiles.shape
    return torch.baddbmm(
        -norms.flatten(0, 1), tiles.reshape(batch * count, n, channels), patches.flatten(0, 1).transpose(1, 2), alpha=2
    ).view(batch, count, n, -1)


def auto_temperature(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """
    A temperature that fits the map: a constant over the mean squared distance of its tokens and their home centres.

    Args:
        tokens: (B, H, W, C), float32.
        grid: (h, w).

    Returns:
        (B, 1, 1, 1)
    """
    return _auto_temperature(tokens, *grid)


@operator("Tensor tokens, SymInt h, SymInt w", lambda tokens, h, w: [tokens.shape[0], 1, 1, 1])
def _auto_temperature(tokens: Tensor, h: int, w: int) -> Tensor:
    centers, size = average_pool(tokens, (h, w)), map_size(tokens)
    if tokens.device.type == "cpu" and not is_exporting():
        rows = max(1, PART // (tokens.shape[0] * size[1] * tokens.shape[3]))
        parts = [slice(first, first + rows) for first in range(0, size[0], rows)]
    else:
        parts = [slice(None)]
    total = tokens.new_zeros(tokens.shape[0])
    for part in parts:
        total = total + (tokens[:, part] - home_centers(centers, size, part)).square().sum((1, 2, 3))
    return AUTO_TEMPERATURE / (total / (size[0] * size[1])).clamp(min=1e-12)[:, None, None, None]


class TokenClustering(GridReducer):
    """
    Token clustering and reconstruction, the reducer of Expedit (arXiv 2210.01035). Restricted to neighbourhoods, it
    costs time and memory linear in the number of tokens.

    The defaults keep most accuracy; :meth:`published` has the authors' settings.

    Args:
        grid: see :class:`~hourglass.reduction.GridReducer`.
        iterations: how often the centres are refined; 0 leaves them as pooled.
        neighborhood: odd; a token is compared with the centres of so many cells a side around its home cell.
        temperature: multiplies squared distances before the softmax over centres. "auto" is relative to the
            map's own mean squared distance between tokens and their home centres, so that one value fits every model.
        restore_temperature: the same for restoring; None: as ``temperature``.
        k: number of centres, the most similar ones, that restoring mixes for a token.
        weights: "sum": the mixture's weights sum to 1. "l2": their squares sum to 1, as in the authors' code, which
            scales a constant map.
        candidates: the centres that restoring chooses from, "neighborhood" or "all", which takes time proportional to
            tokens x centres.
        restore_mode: "update": a token keeps its features and gets the mixture of the centres' changes; "features": the
            mixture of the centres' features, as published.

    Raises:
        InputError: for an argument out of range.
    """

    @renamed_argument("restore", "restore_mode")
    def __init__(
        self,
        grid: Sequence[int | float] | float,
        iterations: int = 2,
        neighborhood: int = 5,
        temperature: float | str = "auto",
        restore_temperature: float | str | None = None,
        k: int = 10,
        weights: str = "sum",
        candidates: str = "neighborhood",
        restore_mode: str = "update",
    ):
        super().__init__(grid)
        check_count("iterations", iterations, 0)
        check_count("neighborhood", neighborhood, 1)
        if neighborhood % 2 == 0:
            raise InputError(f"neighborhood must be an odd number of cells a side, got {neighborhood}")
        _check_temperature("temperature", temperature)
        if restore_temperature is not None:
            _check_temperature("restore_temperature", restore_temperature)
        check_count("k", k, 1)
        check_choice("weights", weights, WEIGHTS)
        check_choice("candidates", candidates, CANDIDATES)
        check_choice("restore_mode", restore_mode, RESTORE_MODES)
        self.iterations = iterations
        self.neighborhood = neighborhood
        self.temperature = temperature
        self.restore_temperature = restore_temperature
        self.k = k
        self.weights = weights
        self.candidates = candidates
        self.restore_mode = restore_mode

    @classmethod
    def published(
        cls,
        grid: Sequence[int | float] | float,
        iterations: int = 5,
        neighborhood: int = 7,
        temperature: float = 0.05,
        restore_temperature: float | None = None,
        k: int = 10,
    ) -> "TokenClustering":
        """
        The reducer as the authors' code computes it; the defaults are those of their Mask2Former on COCO. Use it in a
        ``Plan`` with ``published=True``.
        """
        return cls(
            grid,
            iterations,
            neighborhood,
            temperature,
            restore_temperature,
            k,
            weights="l2",
            candidates="all",
            restore_mode="features",
        )

    def published_form(self) -> "TokenClustering":
        """:meth:`published` with this one's figures, but those that are at the constructor's defaults as published."""
        if (self.weights, self.candidates, self.restore_mode) == ("l2", "all", "features"):
            return self
        defaults = inspect.signature(TokenClustering).parameters
        names = [name for name in inspect.signature(TokenClustering.published).parameters if name != "grid"]
        chosen = {name: value for name in names if (value := getattr(self, name)) != defaults[name].default}
        return TokenClustering.published(self.grid, **chosen)

    def forward(self, tokens: Tensor) -> Reduction:
        grid = self.cells(map_size(tokens))
        # Squared distances between wide features overflow float16 and drown in bfloat16's rounding. Without the mean
        # they are the same, and rounded less.
        with without_autocast(tokens):
            features = tokens.float()
            # The authors' code leaves it in: tokens of zeros, which fill cut windows there, then tie exactly.
            mean = features.mean((1, 2), keepdim=True) if self.weights == "sum" else 0
            features = features - mean if self.weights == "sum" else features
            auto = None
            if "auto" in (self.temperature, self.restore_temperature):
                auto = auto_temperature(features.detach(), grid)
            temperature: Any = auto if self.temperature == "auto" else self.temperature
            centers, sizes = cluster(features, grid, self.iterations, self.neighborhood, temperature)

            if self.restore_temperature is not None:
                temperature = auto if self.restore_temperature == "auto" else self.restore_temperature
            reach = self.neighborhood if self.candidates == "neighborhood" else None
            mix = mixture(features.detach(), centers.detach(), temperature, self.k, reach, self.weights)
            reduced = (centers + mean).to(tokens.dtype)

        def restore(refined: Tensor) -> Tensor:
            with without_autocast(refined):
                return tokens + mix(refined - reduced) if self.restore_mode == "update" else mix(refined)

        return Reduction(reduced, positions=None, sizes=sizes, restore=restore)


def _check_temperature(name: str, value: float | str) -> None:
    if value != "auto" and (isinstance(value, bool | str) or not isinstance(value, Real) or not value > 0):
        raise InputError(f'{name} must be a number over 0 or "auto", got {value!r}')
