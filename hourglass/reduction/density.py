"""Density peaks as representative tokens (AiluRus, arXiv 2311.01197)."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from hourglass.checks import check_choice, check_count, renamed_argument
from hourglass.contexts import without_autocast
from hourglass.errors import InputError
from hourglass.operators import is_symbolic, operator
from hourglass.reduction.merging import merge, merge_sizes, restore_merged
from hourglass.reduction.reducer import PAIRS, RESTORE_MODES, GridReducer, Reduction
from hourglass.reduction.windows import grid_positions, map_size


def standardize(tokens: Tensor, spatial: float) -> Tensor:
    """
    The features that distances are taken in: those of the tokens, divided by their standard deviation over the map and
    all channels and by the square root of C, with the tokens' positions appended.

    Args:
        tokens: (B, H, W, C), float32.
        spatial: weight of the positions, in standard deviations per token.

    Returns:
        (B, H * W, C + 2)
    """
    (height, width), channels = map_size(tokens), tokens.shape[3]
    features = tokens.flatten(1, 2)
    features = features - features.mean(1, keepdim=True)
    variance = features.square().mean((1, 2), keepdim=True).clamp(min=1e-12)
    features = features / (variance * channels).sqrt()
    place = spatial * grid_positions((height, width), tokens.device).to(features.dtype)
    return torch.cat([features, place.flatten(0, 1).expand(len(tokens), -1, -1)], dim=-1)


@operator(
    "Tensor features, SymInt n, int k", lambda features, n, k: [features.shape[0], features.shape[1] + n], torch.int64
)
def _density_peaks(features: Tensor, n: int, k: int) -> Tensor:
    """:func:`density_peaks`, both results beside each other."""
    length = features.shape[1]
    parts = [features] if is_symbolic(*features.shape) else features.split(max(1, PAIRS // length**2))
    return torch.cat([_peaks_of_images(part, int(n), k) for part in parts])


def density_peaks(features: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """
    Representative tokens by density peaks with k nearest neighbours (arXiv 2311.01197 and the DPC-KNN that it
    extends). With d the distance of two tokens, a token's density is rho = exp(-mean of d^2 over its k nearest others)
    and its delta the distance of the nearest token that is denser; for the densest, of the farthest. The n tokens
    with the largest rho * delta are representatives, and every other token joins the nearest of them. Of equal ones
    the first comes first.

    Time is that of tokens x tokens, memory that of ``PAIRS`` distances.

    Args:
        features: (B, L, C), float32, distances are Euclidean.
        n: number of representatives, from 1 to L.
        k: number of neighbours.

    Returns:
        labels (B, L) in [0, n), the representative that each token joins, and the representatives (B, n), numbers of
        tokens in rising order.
    """
    length = features.shape[1]
    labels_and_chosen = _density_peaks(features.detach(), n, k)
    return labels_and_chosen[:, :length], labels_and_chosen[:, length:]


def _peaks_of_images(features: Tensor, n: int, k: int) -> Tensor:
    batch, length, _ = features.shape
    tokens = torch.arange(length, device=features.device).expand(batch, -1)
    if n == length:
        return torch.cat([tokens, tokens], dim=1)
    rows = [tokens[0]] if is_symbolic(batch, length) else tokens[0].split(max(1, PAIRS // (batch * length)))
    distances = [_squared_distances(features, features, rows[0])] if len(rows) == 1 else None

    def distances_of(i: int) -> Tensor:
        return _squared_distances(features, features, rows[i]) if distances is None else distances[i]

    # The logarithm of rho * delta has their order, and does not vanish where tokens are far apart.
    k = min(k, length - 1)
    # The nearest of a token is itself.
    nearest = [distances_of(i).topk(k + 1, largest=False).values[..., 1:] for i in range(len(rows))]
    density = -torch.cat(nearest, dim=1).mean(-1)
    rank = density.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    delta = []
    for i, row in enumerate(rows):
        denser = rank[:, None, :] < rank[:, row, None]
        least = distances_of(i).masked_fill(~denser, torch.inf).amin(-1)
        delta.append(torch.where(rank[:, row] == 0, distances_of(i).amax(-1), least))
    peaks = density + 0.5 * torch.cat(delta, dim=1).log()
    chosen = peaks.argsort(dim=1, descending=True, stable=True)[:, :n].sort(dim=1).values

    centers = features.gather(1, chosen[..., None].expand(-1, -1, features.shape[2]))
    labels = torch.cat([_squared_distances(features, centers, row).argmin(-1) for row in rows], dim=1)
    labels.scatter_(1, chosen, tokens[:, :n])  # a representative's double may come before it
    return torch.cat([labels, chosen], dim=1)


def _squared_distances(features: Tensor, centers: Tensor, rows: Tensor) -> Tensor:
    """(B, l, m) of the tokens ``rows`` (l,) of (B, L, C) and ``centers`` (B, m, C)."""
    part = features[:, rows]
    norms = centers.square().sum(-1)[:, None]
    distances = torch.baddbmm(norms, part, centers.transpose(1, 2), alpha=-2)
    distances = distances.add_(part.square().sum(-1, keepdim=True)).clamp_(min=0)
    if centers is features:
        distances[:, torch.arange(len(rows), device=rows.device), rows] = 0
    return distances


class DensityPeaks(GridReducer):
    """
    Adaptive resolution by density peaks, the reducer of AiluRus (arXiv 2311.01197): as many representative tokens as
    the grid has cells are picked where tokens differ, every other token joins the nearest of them, and the middle
    blocks run on the means. Relative positions are read at the representatives' own places.

    The paper mentions a spatial term without giving it; this one adds to the distance of the features, in standard
    deviations, that in the map times ``spatial``. Its default and that of ``k`` kept most AP on training images of the
    demo (benchmarks/README.md). In the smaller map the representatives are ordered by rows, then within a row by
    columns.

    Scope "map" is for ViTs whose planned blocks are all global; with windows use scope "window".

    Args:
        grid: see :class:`~hourglass.reduction.GridReducer`; rows x columns is the number of representatives.
        k: number of neighbours in a token's density.
        spatial: weight of the distance in the map; 0: none.
        restore_mode: "update": a token keeps its features and gets its representative's change; "features": its
            representative's features, as published.

    Raises:
        InputError: for an argument out of range.
    """

    on_grid = False

    @renamed_argument("restore", "restore_mode")
    def __init__(
        self, grid: Sequence[int | float] | float, k: int = 3, spatial: float = 0.07, restore_mode: str = "update"
    ):
        super().__init__(grid)
        check_count("k", k, 1)
        if isinstance(spatial, bool) or not isinstance(spatial, Real) or not 0 <= spatial < float("inf"):
            raise InputError(f"spatial must be a number of at least 0, got {spatial!r}")
        check_choice("restore_mode", restore_mode, RESTORE_MODES)
        self.k: int = k
        self.spatial: float = spatial
        self.restore_mode: str = restore_mode

    def forward(self, tokens: Tensor) -> Reduction:
        (rows, columns), (height, width) = self.cells(map_size(tokens)), map_size(tokens)
        batch, n = len(tokens), rows * columns
        with torch.no_grad(), without_autocast(tokens):
            labels, chosen = density_peaks(standardize(tokens.float(), self.spatial), n, self.k)
            # In rising order a row of the smaller map is a band of the full one; in it, columns count.
            across = (chosen % width * height + chosen // width).view(batch, rows, columns).argsort(dim=2)
            order = (across + columns * torch.arange(rows, device=tokens.device)[:, None]).flatten(1)
            labels, chosen = order.argsort(dim=1).gather(1, labels), chosen.gather(1, order)
            positions = torch.stack([chosen // width, chosen % width], dim=-1).view(batch, rows, columns, 2)
            sizes = merge_sizes(torch.ones_like(labels, dtype=torch.float32), labels, n).view(batch, rows, columns)
        flat = tokens.flatten(1, 2)
        merged = merge(flat, labels, n)

        def restore(refined: Tensor) -> Tensor:
            refined = refined.reshape(batch, n, -1)
            return restore_merged(flat, merged, labels, self.restore_mode, refined).unflatten(1, (height, width))

        return Reduction(merged.unflatten(1, (rows, columns)), positions.float(), sizes, restore)
