"""Mask2Former (arXiv 2112.01527)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, ImageList, Instances, PolygonMasks
from detectron2.utils import comm
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerMaskedAttentionDecoderLayer,
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

from hourglass.compat import size_divisibility as backbone_divisibility
from hourglass.errors import InputError
from projects.mask2former.inference import (
    crop_and_resize,
    instance_inference,
    panoptic_inference,
    resize_masks,
    semantic_inference,
)
from projects.mask2former.weights import rename_weights


class Mask2Former(nn.Module):
    """
    Mask2Former around any Detectron2 backbone. The pixel decoder, the transformer decoder and the loss are those of
    Hugging Face's transformers. Checkpoints of the official implementation and of Hugging Face's load, see
    :func:`~projects.mask2former.rename_weights`.

    Args:
        backbone: with features at four strides, each twice the one before.
        num_classes: without "no object".
        pixel_mean, pixel_std: of each channel; images are normalised with them, then padded with zeros.
        in_features: names of the backbone's features, from the finest to the coarsest.
        num_queries: segments that are predicted for an image.
        hidden_dim: width of both decoders.
        mask_dim: width of the mask features.
        num_heads: attention heads in both decoders.
        encoder_layers: deformable layers in the pixel decoder.
        encoder_feedforward_dim: width of their MLP.
        decoder_layers: one more than the layers of the transformer decoder, counting the prediction before the first.
        dim_feedforward: width of their MLP.
        size_divisibility: images are padded to multiples of this.
        semantic_on, panoptic_on, instance_on: what inference returns.
        things: contiguous ids of the classes whose instances are told apart; None: all.
        object_mask_threshold, overlap_threshold: see :func:`~projects.mask2former.panoptic_inference`.
        detections_per_image: instances at most.
        class_weight, mask_weight, dice_weight: of the losses and of the costs that match queries to segments.
        class_cost: of the class in matching; None: ``class_weight``. A small one matches queries by their masks.
        no_object_weight: of "no object" in the class loss.
        deep_supervision: train each decoder layer's prediction, not only the last.
        train_num_points: points that a mask is sampled at for the losses.
        oversample_ratio, importance_sample_ratio: how many more points are drawn, and the share of
            ``train_num_points`` taken from the least certain of them.

    Raises:
        InputError: for features that the backbone lacks, a width or size that does not divide, or classes out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        in_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        num_queries: int = 100,
        hidden_dim: int = 256,
        mask_dim: int = 256,
        num_heads: int = 8,
        encoder_layers: int = 6,
        encoder_feedforward_dim: int = 1024,
        decoder_layers: int = 10,
        dim_feedforward: int = 2048,
        size_divisibility: int = 32,
        semantic_on: bool = False,
        panoptic_on: bool = True,
        instance_on: bool = False,
        things: Sequence[int] | None = None,
        object_mask_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        detections_per_image: int = 100,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        class_cost: float | None = None,
        no_object_weight: float = 0.1,
        deep_supervision: bool = True,
        train_num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
    ):
        super().__init__()
        shapes = backbone.output_shape()
        lacking = [name for name in in_features if name not in shapes]
        if lacking or len(in_features) != 4:
            raise InputError(f"in_features must be four of the backbone's {list(shapes)}, got {list(in_features)}")
        strides = [shapes[name].stride for name in in_features]
        if any(coarse != 2 * fine for fine, coarse in zip(strides, strides[1:])):
            raise InputError(f"in_features must have strides that double, got {strides}")
        if hidden_dim % 32 or hidden_dim % num_heads:  # the pixel decoder's group norms have 32 groups
            raise InputError(f"hidden_dim must be a multiple of 32 and of num_heads, {num_heads}, got {hidden_dim}")
        if size_divisibility % max(1, divisor := backbone_divisibility(backbone)):
            raise InputError(
                f"size_divisibility must be a multiple of the backbone's {divisor}, got {size_divisibility}"
            )
        self.things = frozenset(range(num_classes) if things is None else things)
        if not self.things <= set(range(num_classes)):
            raise InputError(f"things must be classes in [0, {num_classes}), got {sorted(self.things)}")

        self.num_classes = num_classes
        self.in_features = tuple(in_features)
        self.size_divisibility = size_divisibility
        self.semantic_on = semantic_on
        self.panoptic_on = panoptic_on
        self.instance_on = instance_on
        self.object_mask_threshold = object_mask_threshold
        self.overlap_threshold = overlap_threshold
        self.detections_per_image = detections_per_image
        self.deep_supervision = deep_supervision
        self.loss_weights = {
            "loss_cross_entropy": class_weight,
            "loss_mask": mask_weight,
            "loss_dice": dice_weight,
        }
        config = Mask2FormerConfig(
            feature_size=hidden_dim,
            mask_feature_size=mask_dim,
            hidden_dim=hidden_dim,
            num_attention_heads=num_heads,
            encoder_layers=encoder_layers,
            encoder_feedforward_dim=encoder_feedforward_dim,
            decoder_layers=decoder_layers,
            dim_feedforward=dim_feedforward,
            num_queries=num_queries,
            num_labels=num_classes,
            dropout=0.0,
            feature_strides=strides,
            common_stride=strides[0],
            class_weight=float(class_weight),
            mask_weight=float(mask_weight),
            dice_weight=float(dice_weight),
            no_object_weight=float(no_object_weight),
            train_num_points=train_num_points,
            oversample_ratio=float(oversample_ratio),
            importance_sample_ratio=float(importance_sample_ratio),
        )
        self.backbone = backbone
        self.pixel_decoder = Mask2FormerPixelDecoder(config, [shapes[name].channels for name in in_features])
        self.transformer_module = Mask2FormerTransformerModule(hidden_dim, config)
        self.class_predictor = nn.Linear(hidden_dim, num_classes + 1)
        self.criterion = _Loss(config, self.loss_weights)
        if class_cost is not None:
            self.criterion.matcher.cost_class = float(class_cost)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self._initialise(config)

    def _initialise(self, config: Mask2FormerConfig) -> None:
        # Built alone, the parts are not initialised by transformers. Convolutions and MLPs as in the official code.
        pixel_decoder = self.pixel_decoder
        for module in pixel_decoder.modules():
            if isinstance(module, nn.Conv2d):
                c2_xavier_fill(module)
        for parameter in pixel_decoder.encoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(pixel_decoder.level_embed)
        initialiser = Mask2FormerPreTrainedModel(config)
        for module in self.modules():
            if isinstance(module, _WITH_INITIALISER):
                initialiser._init_weights(module)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def rename_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :func:`~projects.mask2former.rename_weights`."""
        return rename_weights(weights)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """
        Args:
            batched_inputs: of each image, ``image`` (3, H, W), its channels in the order of ``pixel_mean`` and its
                values in [0, 255]. In training also ``instances``, with ``gt_classes`` (N,) and ``gt_masks``, a
                ``BitMasks``, ``PolygonMasks`` or tensor (N, H, W). In inference, ``height`` and ``width`` of the
                output (the image's where they are not given).

        Returns:
            in training, the weighted losses of the last layer and, ``_0`` and on, of those before it.
            In inference, of each image, as switched on: ``panoptic_seg``, ids (height, width) and the segments, see
            :func:`~projects.mask2former.panoptic_inference`; ``instances``, see
            :func:`~projects.mask2former.instance_inference`; ``sem_seg`` (num_classes, height, width).

        Raises:
            InputError: for training images without masks, or of classes that the model lacks.
        """
        # Padding after normalising: padded pixels are zero, as in the official implementation.
        images = [(entry["image"].to(self.device) - self.pixel_mean) / self.pixel_std for entry in batched_inputs]
        images = ImageList.from_tensors(images, self.size_divisibility)
        padded = tuple(images.tensor.shape[-2:])
        hidden, masks = self.decode(self.backbone(images.tensor))

        if self.training:
            targets = [self._targets(entry, padded) for entry in batched_inputs]
            return self._losses([self.class_predictor(state.transpose(0, 1)) for state in hidden], masks, targets)

        # Class logits (B, Q, K + 1), mask logits (B, Q, h, w).
        classes, masks = self.class_predictor(hidden[-1].transpose(0, 1)).float(), masks[-1].float()
        results = []
        # Sums over many queries and pixels, in float32 throughout.
        with torch.autocast(self.device.type, enabled=False):
            for entry, size, image_classes, image_masks in zip(batched_inputs, images.image_sizes, classes, masks):
                output = (entry.get("height", size[0]), entry.get("width", size[1]))
                results.append(self._infer(image_classes, image_masks, padded, tuple(size), output))
        return results

    def decode(self, features: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """
        Args:
            features: of the backbone, (B, C, H / stride, W / stride) each.

        Returns:
            of each decoder layer, and first of the queries as learned: states (Q, B, hidden_dim), which
            ``class_predictor`` takes, and mask logits (B, Q, h, w) at the stride of the finest feature.
        """
        # Sampling locations do not bear bfloat16: of a coordinate in [0, 1] it leaves 8 bits.
        with torch.autocast(self.device.type, enabled=False):
            dtype = self.pixel_decoder.mask_projection.weight.dtype  # float32 unless the model itself was converted
            pixels = self.pixel_decoder([features[name].to(dtype) for name in self.in_features])
        decoded = self.transformer_module(pixels.multi_scale_features, pixels.mask_features)
        return decoded.intermediate_hidden_states, decoded.masks_queries_logits

    def _infer(
        self,
        classes: Tensor,
        masks: Tensor,
        padded: tuple[int, int],
        image: tuple[int, int],
        output: tuple[int, int],
    ) -> dict[str, Any]:
        def resize(logits: Tensor) -> Tensor:
            return resize_masks(logits, padded, image, output)

        result = {}
        if self.semantic_on and (self.panoptic_on or self.instance_on):
            result["sem_seg"] = semantic_inference(classes, masks, resize)
        elif self.semantic_on:
            # The official order where nothing else is asked for: the classes, not the masks, come to the output's size.
            evidence = semantic_inference(classes, masks, lambda logits: resize_masks(logits, padded, padded, padded))
            result["sem_seg"] = crop_and_resize(evidence, image, output)
        if self.panoptic_on:
            result["panoptic_seg"] = panoptic_inference(
                classes, masks, self.things, self.object_mask_threshold, self.overlap_threshold, resize
            )
        if self.instance_on:
            things = self.things if self.panoptic_on else None
            result["instances"] = instance_inference(classes, masks, self.detections_per_image, things, resize)
        return result

    def _targets(self, entry: dict[str, Any], padded: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Classes (N,) and masks (N, *padded), 0 or 1."""
        if "instances" not in entry:
            raise InputError(
                f"image {entry.get('file_name', '')} has no instances: training needs those of PanopticMapper, or of "
                "Detectron2's DatasetMapper with use_instance_mask=True"
            )
        instances: Instances = entry["instances"]
        height, width = instances.image_size
        classes = instances.gt_classes
        if len(classes) and not 0 <= classes.min() <= classes.max() < self.num_classes:
            raise InputError(
                f"image {entry.get('file_name', '')} has classes {sorted(set(classes.tolist()))}, "
                f"they must be in [0, {self.num_classes}): set model.num_classes to the data set's"
            )
        if instances.has("gt_masks"):
            masks = instances.gt_masks
            if isinstance(masks, PolygonMasks):
                masks = BitMasks.from_polygon_masks(masks, height, width)
            masks = masks.tensor if isinstance(masks, BitMasks) else masks
        elif len(classes) == 0:  # what DatasetMapper makes of an image without annotations
            masks = torch.zeros((0, height, width))
        else:
            raise InputError(
                f"image {entry.get('file_name', '')} has instances without gt_masks: training needs a data set with "
                "segmentations, and a mapper with use_instance_mask=True"
            )
        masks = masks.to(self.device, torch.float32)
        return classes.to(self.device), F.pad(masks, (0, padded[1] - width, 0, padded[0] - height))

    def _losses(
        self, classes: list[Tensor], masks: Sequence[Tensor], targets: list[tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        auxiliary = None
        if self.deep_supervision:
            auxiliary = [
                {"class_queries_logits": layer_classes.float(), "masks_queries_logits": layer_masks.float()}
                for layer_classes, layer_masks in zip(classes[:-1], masks[:-1])
            ]
        # In float32: matching goes through numpy, which has no bfloat16.
        with torch.autocast(self.device.type, enabled=False):
            losses = self.criterion(
                masks[-1].float(),
                classes[-1].float(),
                [target_masks for _, target_masks in targets],
                [target_classes for target_classes, _ in targets],
                auxiliary,
            )
        weight_of = self.loss_weights
        return {name: loss * weight_of[name.rstrip("_0123456789")] for name, loss in losses.items()}


class _Loss(Mask2FormerLoss):
    """With the number of masks averaged over the processes that Detectron2 started, not over those of accelerate."""

    def get_num_masks(self, class_labels: list[Tensor], device: torch.device) -> Tensor:
        number = torch.tensor(float(sum(len(labels) for labels in class_labels)), device=device)
        if comm.get_world_size() > 1:
            dist.all_reduce(number)
        return (number / comm.get_world_size()).clamp(min=1)


_WITH_INITIALISER = (
    Mask2FormerMaskedAttentionDecoderLayer,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
)
