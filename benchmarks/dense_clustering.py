"""Token clustering as it is published, every token with every centre: what the linear one is timed against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hourglass.reduction import Reducer, Reduction, TokenClustering
from hourglass.reduction.pooling import average_pool
from hourglass.reduction.windows import map_size


class DenseClustering(Reducer):
    """
    Expedit (arXiv 2210.01035): the affinities of all tokens and all centres, masked to neighbourhoods, then restoring
    from the k most similar of all centres.

    Args:
        like: whose grid, iterations, neighbourhood, temperature (a number) and k are taken.
    """

    def __init__(self, like: TokenClustering):
        super().__init__()
        self.like = like

    def forward(self, tokens: Tensor) -> Reduction:
        like, size = self.like, map_size(tokens)
        grid = like.cells(size)
        features = tokens.float().flatten(1, 2)
        centers = average_pool(tokens.float(), grid).flatten(1, 2)
        near = _near(size, grid, like.neighborhood // 2, tokens.device)
        for _ in range(like.iterations):
            scores = -like.temperature * torch.cdist(features, centers).square()
            affinity = scores.masked_fill(~near, -torch.inf).softmax(-1).transpose(1, 2)
            centers = affinity @ features / affinity.sum(-1, keepdim=True).clamp(min=1e-16)
        batch, count, channels = centers.shape

        def restore(refined: Tensor) -> Tensor:
            weights = (-like.temperature * torch.cdist(features, centers).square()).exp()
            weights, nearest = weights.topk(min(like.k, count), dim=-1)
            weights = F.normalize(weights, dim=-1, eps=1e-12)
            index = nearest.flatten(1)[..., None].expand(-1, -1, channels)
            gathered = refined.flatten(1, 2).float().gather(1, index).view(*nearest.shape, channels)
            return (gathered * weights[..., None]).sum(2).view(tokens.shape)

        return Reduction(centers.view(batch, *grid, channels), positions=None, sizes=None, restore=restore)


def _near(size: tuple[int, int], grid: tuple[int, int], radius: int, device: torch.device) -> Tensor:
    """(tokens, centres) True for a centre in the token's neighbourhood."""
    axes = []
    for length, cells in zip(size, grid):
        home = torch.arange(length, device=device) * cells // length
        axes.append((home[:, None] - torch.arange(cells, device=device)).abs() <= radius)
    rows, columns = axes
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(size[0] * size[1], -1)
