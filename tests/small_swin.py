"""A small Swin, and images for it."""

import torch

from hourglass import AveragePooling, Plan, SkipBlocks, TokenClustering
from hourglass.encoders import Swin

# Windows of 6; blocks 4 to 7 are the third stage, of 8 x 12 tokens at 128 x 192 pixels.
TINY = dict(embed_dim=12, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 4), window_size=6, drop_path_rate=0.0)


def tiny_swin(**kwargs) -> Swin:
    """No parameter at a trivial value."""
    torch.manual_seed(0)
    swin = Swin(**{**TINY, **kwargs})
    with torch.no_grad():
        for parameter in swin.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return swin.eval()


def image(batch: int = 2, height: int = 128, width: int = 192) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def run(encoder, x) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return encoder(x)


PLANS = {
    "window": Plan(TokenClustering((4, 4)), 5, 8, scope="window"),
    "map": Plan(TokenClustering(0.6), 4, 7),
    "several stages": Plan(TokenClustering(0.6), 3, scope="window"),
    "published": Plan(TokenClustering.published((4, 4), neighborhood=3), 6, 8, scope="window", published=True),
    "pooled windows": Plan(AveragePooling((3, 4)), 4, 8, scope="window"),
    "control": Plan(SkipBlocks(), 4, 8),
}
