"""What tests need of small models: encoders, configs, detections."""

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from hourglass.encoders.registry import family_of
from hourglass.encoders.vit.model import absolute_positions

# Small enough for a test: 256 tokens, of which the plan keeps 100.
SMALL = [
    "model.backbone.net.patch_size=32",
    "model.backbone.net.window_size=8",
    "model.proposal_generator.anchor_generator.strides=[32,64]",
    "model.roi_heads.box_pooler.scales=[0.03125,0.015625]",
    "model.proposal_generator.in_features=[p5,p6]",
    "model.roi_heads.box_in_features=[p5,p6]",
    "plan.reducer.grid=[10,10]",
    "plan.scope=map",
    "plan.start=2",
    "plan.stop=8",
    "plan.keys=1",
    "dataloader.test.num_workers=0",
    "evaluation.warmup=1",
]
UNTRAINED = [*SMALL, "train.init_checkpoint="]


def embed_vit(vit: nn.Module, image: Tensor) -> Tensor:
    """What a ViT's blocks get: (B, H, W, C)."""
    tokens = vit.patch_embed(image)
    if vit.pos_embed is None:
        return tokens
    return tokens + absolute_positions(vit.pos_embed, vit.pretrain_use_cls_token, tokens.shape[1:3])


def embed_swin(swin: nn.Module, image: Tensor) -> Tensor:
    """What a Swin's first stage gets: (B, H, W, C)."""
    patches = swin.patch_embed(image)
    if swin.ape:
        positions = swin.absolute_pos_embed
        patches = patches + F.interpolate(positions, size=patches.shape[-2:], mode="bicubic", align_corners=False)
    return patches.permute(0, 2, 3, 1)


def placed(encoder: nn.Module, block: nn.Module, fast: bool = False) -> nn.Module:
    """A view of an encoder's block that runs on placed tokens."""
    return family_of(encoder).placed(block, fast)


def detector_output(size: tuple[int, int], boxes, scores, classes, masks: bool = True) -> dict:
    """A detector's output of an image of ``size``: boxes (left, top, right, bottom), and masks that fill them."""
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor(scores, dtype=torch.float32)
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    if masks:
        instances.pred_masks = torch.zeros(len(scores), *size, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(instances.pred_masks, boxes):
            mask[int(top) : int(bottom), int(left) : int(right)] = True
    return {"instances": instances}


def images(number: int, size: tuple[int, int] = (64, 64), first: int = 0) -> list[torch.Tensor]:
    """Smooth ones: of noise nothing can be left out."""
    batches = []
    for i in range(first, first + number):
        coarse = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(i))
        batches.append(nn.functional.interpolate(coarse, size=size, mode="bicubic"))
    return batches
