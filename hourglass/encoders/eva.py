"""
The encoders of EVA's forks of Detectron2: EVA-01's ViTDet (arXiv 2211.07636), ViTDet's ViT with LayerScale on both
updates of a block and, as in BEiT, biases of queries and values alone; and EVA-02's (arXiv 2303.11331), with rotary
positions and projections of their own for queries, keys and values.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hourglass.encoders.registry import register
from hourglass.encoders.vit.placed import ViTAttention, ViTBlock, ViTFamily


class EVAAttention(ViTAttention):
    """Attention whose ``q_bias`` and ``v_bias``, where ``beit_like_qkv_bias``, take the place of a bias in ``qkv``."""

    beit_like_qkv_bias: bool
    qkv: nn.Linear
    q_bias: Tensor
    v_bias: Tensor

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if not self.beit_like_qkv_bias:
            return super().project(tokens)
        projected = self.project_plain(tokens)
        return projected, self._bias().to(projected.dtype)

    def project_plain(self, tokens: Tensor) -> Tensor:
        if not self.beit_like_qkv_bias:
            return super().project_plain(tokens)
        return F.linear(tokens, self.qkv.weight, self._bias())

    def _bias(self) -> Tensor:
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


class EVABlock(ViTBlock):
    """A block whose updates are multiplied by ``gamma_1`` and ``gamma_2`` where ``beit_like_gamma``."""

    attention = EVAAttention

    beit_like_gamma: bool
    gamma_1: Tensor
    gamma_2: Tensor

    def _add(self, tokens: Tensor, update: Tensor, mask: Tensor | None, half: int) -> Tensor:
        if self.beit_like_gamma:
            update = (self.gamma_1 if half == 1 else self.gamma_2) * update
        return super()._add(tokens, update, mask, half)


@register
class EVAFamily(ViTFamily):
    """EVA-01's fork. Its class has the dotted name of Detectron2's own: it is told by its blocks, and proven."""

    name = "EVA-01 ViT"
    known = ()
    class_names = ("EVAViT",)  # detrex's copy
    parts = (*ViTFamily.parts, "beit_like_gamma")
    attention_parts = (*ViTFamily.attention_parts, "beit_like_qkv_bias")
    block = EVABlock


class EVA02Attention(ViTAttention):
    """Attention with ``q_proj``, ``k_proj``, ``v_proj``, ``q_bias``, ``v_bias``, and rotary positions in ``rope``."""

    uncalled = ("rope", "q_proj", "k_proj", "v_proj")

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    q_bias: Tensor | None
    v_bias: Tensor | None
    rope: Any

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        projected = self.project_plain(tokens)
        no_bias = torch.zeros_like(self.k_proj.weight[:, 0])
        zero = torch.cat([no_bias if bias is None else bias for bias in (self.q_bias, None, self.v_bias)])
        return projected, zero.to(projected.dtype)

    def project_plain(self, tokens: Tensor) -> Tensor:
        # As its own forward pass, which calls none of the three.
        linears = ((self.q_proj, self.q_bias), (self.k_proj, None), (self.v_proj, self.v_bias))
        return torch.cat([F.linear(tokens, linear.weight, bias) for linear, bias in linears], dim=-1)

    def frequencies(self) -> Tensor:
        cos, sin = self.rope.freqs_cos, self.rope.freqs_sin
        side = math.isqrt(len(cos))
        angles = torch.atan2(sin, cos)[..., ::2]  # each is there for both channels of a pair
        angles = torch.stack([angles[side].chunk(2)[0], angles[1].chunk(2)[1]])
        if angles.shape[1] > 1:
            # Between two tokens of a small window an angle may be over pi: angles are a geometric series.
            power = torch.arange(1 - angles.shape[1], 1, device=angles.device, dtype=angles.dtype)
            series = angles[:, -1:] * (angles[:, -1:] / angles[:, -2:-1]) ** power
            angles = angles + 2 * math.pi * ((series - angles) / (2 * math.pi)).round()
        return angles


class EVA02Block(ViTBlock):
    attention = EVA02Attention


@register
class EVA02Family(ViTFamily):
    """EVA-02's fork. Its global blocks take images of one size."""

    name = "EVA-02 ViT"
    known = ()
    class_names = ("EVA02_ViT",)
    attention_parts = ("q_proj", "k_proj", "v_proj", "q_bias", "v_bias", "rope", "proj", "num_heads")
    block = EVA02Block

    def fits(self, block: Any) -> bool:
        return super().fits(block) and hasattr(block.attn.rope, "freqs_cos")

    def small_variant(self, block: Any) -> tuple[tuple[int, int], dict[str, Tensor]] | None:
        if block.window_size > 0:
            return None
        side = math.isqrt(len(block.attn.rope.freqs_cos))
        n = min(6, side)
        return (n, n), {
            f"attn.rope.{name}": getattr(block.attn.rope, name).unflatten(0, (side, side))[:n, :n].flatten(0, 1)
            for name in ("freqs_cos", "freqs_sin")
        }
