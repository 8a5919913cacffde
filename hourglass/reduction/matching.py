"""Token merging by bipartite soft matching (ToMe, arXiv 2210.09461)."""

import copy
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from hourglass.checks import check_choice, renamed_argument
from hourglass.contexts import without_autocast
from hourglass.errors import InputError
from hourglass.operators import is_symbolic, operator
from hourglass.reduction.merging import merge, merge_sizes, restore_merged
from hourglass.reduction.reducer import PAIRS, RESTORE_MODES, MergingReducer, Reduction


def bipartite_matching(metric: Tensor, r: int, class_token: bool = False) -> Tensor:
    """
    Bipartite soft matching (arXiv 2210.09461, section 3): tokens alternate into the sets A and B, each A token takes
    its most similar B token, and the r most similar pairs merge. Of equal ones the first comes first.

    Args:
        metric: (B, L, D), features whose cosine is the similarity.
        r: how many tokens merge into others; at most half of them do.
        class_token: whether the first token is a class token, which is not merged.

    Returns:
        (B, L) int64, in [0, L - r): for each token its index after merging. The remaining A tokens come first, those
        with the most similar pair first (with a class token in their own order), then the B tokens.
    """
    return _bipartite_matching(metric.detach(), r, class_token)


@operator("Tensor metric, SymInt r, bool class_token", lambda metric, *_: list(metric.shape[:2]), torch.int64)
def _bipartite_matching(metric: Tensor, r: int, class_token: bool) -> Tensor:
    batch, length, _ = metric.shape
    r = most_merged(length - int(class_token), int(r))
    if r == 0:
        return torch.arange(length, device=metric.device).expand(batch, -1)
    metric = F.normalize(metric, dim=-1)
    a, b = metric[:, ::2], metric[:, 1::2].transpose(1, 2)
    parts = [a] if is_symbolic(batch, length) else a.split(max(1, PAIRS // (batch * b.shape[2])), dim=1)
    best = [(part @ b).max(dim=-1) for part in parts]
    score, partner = (torch.cat(values, dim=1) for values in zip(*best))
    if class_token:
        score[:, 0] = -torch.inf
    order = score.argsort(dim=1, descending=True, stable=True)
    merged, remaining = order[:, :r], order[:, r:]
    if class_token:
        remaining = remaining.sort(dim=1).values

    kept = a.shape[1] - r
    of_a = torch.empty_like(order)
    of_a.scatter_(1, remaining, torch.arange(kept, device=metric.device).expand(batch, -1))
    of_a.scatter_(1, merged, kept + partner.gather(1, merged))
    labels = order.new_empty(batch, length)
    labels[:, ::2] = of_a
    labels[:, 1::2] = kept + torch.arange(b.shape[2], device=metric.device)
    return labels


def most_merged(length: int, r: int) -> int:
    """How many of ``length`` tokens merge where ``r`` are to: at most half."""
    return min(r, length // 2)


class BipartiteMatching(MergingReducer):
    """
    Token merging, the reducer of ToMe (arXiv 2210.09461): in each of the plan's blocks, between attention and
    MLP, the r most similar of alternating tokens merge, weighted by their sizes. Similarity is the cosine of the
    attention's keys, in the mean over heads. After the plan's last block every merge is undone, the last one first.

    It takes ViTs: whole maps where all of the plan's blocks are global, scope "window" where some have windows.

    Args:
        r: how many tokens of the map (or of each window) merge in each block, a number or a share of the unreduced
            map's tokens, up to 0.5; never more than half of the remaining ones.
        restore_mode: "update": tokens keep the features that they had before they merged and get the change since;
            "features": those of the token that they are in, as published.

    Raises:
        InputError: for an argument out of range.
    """

    @renamed_argument("restore", "restore_mode")
    def __init__(self, r: int | float = 0.05, restore_mode: str = "update"):
        super().__init__()
        is_count = isinstance(r, Integral) and not isinstance(r, bool) and r >= 0
        if not is_count and (isinstance(r, bool) or not isinstance(r, Real) or not 0 <= r <= 0.5):
            raise InputError(f"r must be a number of tokens of at least 0, or a share of them in [0, 0.5], got {r!r}")
        check_choice("restore_mode", restore_mode, RESTORE_MODES)
        self.r: int | float = int(r) if is_count else float(r)
        self.restore_mode = restore_mode

    def relative_to(self, size: tuple[int, int]) -> "BipartiteMatching":
        if isinstance(self.r, float):
            return self
        most = size[0] * size[1] // 2
        if self.r > most:
            raise InputError(f"r must be at most half of the {2 * most} tokens of a window, got {self.r}")
        relative = copy.copy(self)
        relative.r = self.r / (size[0] * size[1])
        return relative

    def remaining(self, length: int, full: int) -> int:
        return length - most_merged(length, self.r if isinstance(self.r, int) else round(self.r * full))

    def forward(  # type: ignore[override]  # see MergingReducer
        self, tokens: Tensor, keys: Tensor, sizes: Tensor, positions: Tensor, n: int
    ) -> Reduction:
        shape = tokens.shape[:3]
        flat, keys, positions = (x.flatten(1, 2) for x in (tokens, keys, positions))
        sizes = sizes.flatten(1)
        with without_autocast(tokens):
            labels = bipartite_matching(keys.float(), flat.shape[1] - n)
            merged = merge(flat, labels, n, sizes)
            positions, merged_sizes = merge(positions, labels, n, sizes), merge_sizes(sizes, labels, n)

        def restore(refined: Tensor) -> Tensor:
            return restore_merged(flat, merged, labels, self.restore_mode, refined[:, 0]).view(*shape, -1)

        return Reduction(merged[:, None], positions[:, None], merged_sizes[:, None], restore)
