"""Learned token selection (SViT, arXiv 2306.07050)."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hourglass.errors import InputError, reason
from hourglass.reduction.reducer import Reduction, SelectingReducer
from hourglass.weights import read_weights

# Of the running mean of thresholds, in training.
MOMENTUM = 0.95

#: In place of a file: selectors as initialised, to be trained.
RANDOM = "random"


class Collected(NamedTuple):
    """
    What reducers add to a training step.

    Attributes:
        losses: name -> scalar tensor, to be added to the model's.
        figures: name -> number, for the log.
    """

    losses: dict[str, Tensor]
    figures: dict[str, float]


_collecting: ContextVar[Collected | None] = ContextVar("collecting", default=None)


@contextlib.contextmanager
def collect_losses() -> Iterator[Collected]:
    """
    Collect the losses of learned reducers while the model runs in training mode::

        with collect_losses() as collected:
            losses = model(batch)
        losses.update(collected.losses)
    """
    collected = Collected({}, {})
    token = _collecting.set(collected)
    try:
        yield collected
    finally:
        _collecting.reset(token)


class Selector(nn.Sequential):
    """
    The two-layer MLP that decides for each token whether to keep it: (..., C) -> (..., 2), log-probabilities of keeping
    and of skipping it (arXiv 2306.07050).

    Args:
        channels: C.
        share: approximate share of the tokens that it keeps at initialisation.
    """

    def __init__(self, channels: int, share: float = 0.5):
        hidden = max(1, channels // 4)
        last = nn.Linear(hidden, 2)
        super().__init__(nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.GELU(), last, nn.LogSoftmax(dim=-1))
        share = min(max(share, 0.01), 0.99)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([share, 1 - share]).log())

    @property
    def norm(self) -> nn.LayerNorm:
        return cast(nn.LayerNorm, self[0])


class TokenSelection(SelectingReducer):
    """
    Learned token selection, the reducer of SViT (arXiv 2306.07050): in each of the plan's blocks a small MLP keeps or
    skips each token. Skipped tokens stay in the map, and a later block may take them up again. How many are kept
    is chosen for each image.

    It needs trained selectors. In training, keeping is drawn with straight-through Gumbel noise, skipped tokens are
    masked out of attention, and the squared difference of the share kept over the batch and ``target``, in the mean
    over blocks and times ``loss_weight``, is a loss beside the model's (:func:`collect_losses`).

    The threshold differs from the paper, which keeps tokens with a probability over one half: only after long training
    does their share agree with the share that training draws (with all probabilities at 0.6 every token is kept). So
    training also tracks, in a running mean, the log-odds that a share ``target`` of the tokens exceeds, and inference
    keeps the tokens above it.

    Args:
        selectors: file of trained selectors: ``reducer.pth``, which training writes, or a checkpoint of the whole
            model; "random": as initialised, to be trained.
        target: share of the tokens that training aims at, for all blocks or one for each.
        loss_weight: weight of the loss on the share.
        temperature: of the Gumbel softmax.

    Raises:
        InputError: for an argument out of range, or a file without selectors.
    """

    def __init__(
        self,
        selectors: str | os.PathLike | None = None,
        target: float | Sequence[float] = 0.5,
        loss_weight: float = 4.0,
        temperature: float = 1.0,
    ):
        super().__init__()
        if not selectors or not isinstance(selectors, str | os.PathLike):
            raise InputError(
                f'selectors must be a file of trained selectors, or "{RANDOM}" to train new ones, got {selectors!r}'
            )
        shares: Any = [target] if isinstance(target, Real) else target
        if isinstance(shares, str) or not isinstance(shares, Sequence) or not shares or not all(map(_is_share, shares)):
            raise InputError(f"target must be a share of tokens in (0, 1], or one for each block, got {target!r}")
        for name, value in (("loss_weight", loss_weight), ("temperature", temperature)):
            if isinstance(value, bool) or not isinstance(value, Real) or not value > 0:
                raise InputError(f"{name} must be a number over 0, got {value!r}")
        self.selectors = os.fspath(selectors)
        self.target: float | tuple[float, ...] = tuple(shares) if isinstance(target, Sequence) else target
        self.loss_weight = loss_weight
        self.temperature = temperature
        self.blocks = nn.ModuleList()
        self.register_buffer("thresholds", torch.zeros(0))
        if self.selectors != RANDOM:
            self._read()

    def _read(self) -> None:
        try:
            weights = read_weights(os.path.expanduser(self.selectors), "selectors")
        except InputError:
            raise
        except Exception as error:  # whatever a file system or an unpickler may raise
            raise InputError(f"selectors {self.selectors} cannot be read ({reason(error)})") from error
        weights = weights.get("model", weights) if isinstance(weights, dict) else {}
        tensors = {
            name.rpartition("reducer.")[2]: value.float()
            for name, value in (weights.items() if isinstance(weights, dict) else ())
            if isinstance(value, Tensor) and (name.startswith(("blocks.", "thresholds")) or "reducer." in name)
        }
        try:
            count = len(tensors["thresholds"])
            self.thresholds = torch.zeros(count)
            self.blocks.extend(Selector(len(tensors[f"blocks.{i}.0.weight"])) for i in range(count))
            self.load_state_dict(tensors)
        except (KeyError, RuntimeError, TypeError) as error:
            raise InputError(
                f"selectors {self.selectors} holds no selectors, as training writes them to reducer.pth"
            ) from error
        if not count:
            raise InputError(f"selectors {self.selectors} holds no selectors, as training writes them to reducer.pth")

    def bind(self, channels: Sequence[int]) -> None:
        targets = self.targets(len(channels))
        if not self.blocks:
            self.blocks.extend(Selector(width, target) for width, target in zip(channels, targets))
            self.thresholds = torch.zeros(len(channels))
        have = [len(selector.norm.weight) for selector in self._selectors()]
        if have != list(channels):
            raise InputError(
                f"selectors {self.selectors} are for {len(have)} blocks of {_widths(have)} channels, the plan has "
                f"{len(channels)} of {_widths(channels)}"
            )

    def targets(self, blocks: int) -> list[float]:
        """The share aimed at in each of so many blocks."""
        targets = list(self.target) if isinstance(self.target, tuple) else [self.target] * blocks
        if len(targets) != blocks:
            raise InputError(f"target must be one share or {blocks}, one for each of the plan's blocks, got {targets}")
        return targets

    def _scores(self, tokens: Tensor, block: int) -> Tensor:
        """(..., C) -> (..., 2)"""
        selector = self._selectors()[block]
        return selector(tokens.to(selector.norm.weight.dtype)).float()

    def _selectors(self) -> list[Selector]:
        return cast(list[Selector], list(self.blocks))

    def forward(self, tokens: Tensor, block: int) -> Reduction:  # type: ignore[override]  # see SelectingReducer
        width, channels = tokens.shape[2:]
        flat = tokens.reshape(-1, channels)
        scores = self._scores(flat, block)
        kept = (scores[:, 0] - scores[:, 1] >= self.thresholds[block]).nonzero()[:, 0]
        positions = torch.stack([kept // width, kept % width], dim=-1).float()

        def restore(refined: Tensor) -> Tensor:
            return flat.index_copy(0, kept, refined.reshape(-1, channels).to(flat.dtype)).view_as(tokens)

        return Reduction(flat[kept][None, None], positions[None, None], None, restore)

    def mask(self, tokens: Tensor, block: int) -> Tensor:
        scores = self._scores(tokens, block)
        mask = F.gumbel_softmax(scores, tau=self.temperature, hard=True)[..., :1]
        target = self.targets(len(self.blocks))[block]
        odds = (scores[..., 0] - scores[..., 1]).detach()
        loss = self.loss_weight / len(self.blocks) * (mask.mean() - target).square()  # in recomputed passes too
        collected = _collecting.get()
        if collected is not None:
            collected.losses["loss_selection"] = collected.losses.get("loss_selection", 0) + loss
            collected.figures[f"kept/{block}"] = float((odds >= self.thresholds[block]).float().mean())
        skipped = min(odds.numel() - 1, round((1 - target) * odds.numel()))
        threshold = odds.flatten().kthvalue(skipped + 1).values
        self.thresholds[block].lerp_(threshold.to(self.thresholds.dtype), 1 - MOMENTUM)
        return mask


def _is_share(value: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < value <= 1


def _widths(channels: Sequence[int]) -> str:
    return ", ".join(str(width) for width in sorted(set(channels)))
