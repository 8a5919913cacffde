"""A small ViT, images for it, and reducers that keep every token."""

import torch

from hourglass import AveragePooling, Plan, Reducer, Reduction, SkipBlocks, TokenClustering
from hourglass.encoders import ViT

# Windows of 4 in blocks 0, 1 and 3; 8 x 8 tokens at 64 pixels.
TINY = dict(
    img_size=64,
    patch_size=8,
    embed_dim=16,
    depth=5,
    num_heads=2,
    window_size=4,
    window_block_indexes=(0, 1, 3),
    use_rel_pos=True,
    pretrain_img_size=32,
)


def tiny_vit(**kwargs) -> ViT:
    """No parameter at a trivial value."""
    torch.manual_seed(0)
    vit = ViT(**{**TINY, **kwargs})
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vit.eval()


def image(batch: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def last(encoder, x) -> torch.Tensor:
    with torch.no_grad():
        return encoder(x)["last_feat"]


class KeepAll(Reducer):
    """A reduction to the map itself, by a plain copy."""

    def forward(self, tokens):
        return Reduction(tokens.clone(), positions=None, sizes=None, restore=lambda refined: refined)


class Shuffle(Reducer):
    """All tokens in another order, and where they lie."""

    def forward(self, tokens):
        batch, height, width, channels = tokens.shape
        order = torch.randperm(height * width, generator=torch.Generator().manual_seed(0))
        lines = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        positions = torch.stack(lines, dim=-1).flatten(0, 1)[order].expand(batch, 1, -1, -1)
        shuffled = tokens.flatten(1, 2)[:, order][:, None]
        sizes = torch.ones(batch, 1, height * width)
        return Reduction(shuffled, positions, sizes, lambda refined: refined[:, 0, order.argsort()].view_as(tokens))


PLANS = {
    "clustering": Plan(TokenClustering((5, 5)), 1, 4),
    "share": Plan(TokenClustering(0.6), 1, 4),
    "window": Plan(TokenClustering((3, 3)), 1, 4, scope="window"),
    "published": Plan(TokenClustering.published((5, 5), neighborhood=3), 1, 4, proportional=False),
    "pooling": Plan(AveragePooling((5, 4)), 1),
    "pooled windows": Plan(AveragePooling((2, 3)), 1, scope="window"),
    "control": Plan(SkipBlocks(), 1, 4),
}
