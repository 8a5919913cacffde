"""The heads of Cascade Mask R-CNN: three box heads, each trained on the boxes of the one before."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, FastRCNNOutputLayers

from hourglass.encoders.vit import ChannelLayerNorm

from .mask_rcnn_vitdet import model

roi_heads = model.roi_heads
for name in ("box_head", "box_predictor", "proposal_matcher"):
    roi_heads.pop(name)
roi_heads.update(
    _target_=CascadeROIHeads,
    box_heads=[
        L(FastRCNNConvFCHead)(
            input_shape=L(ShapeSpec)(channels="${.....backbone.out_channels}", height=7, width=7),
            conv_dims=[256, 256, 256, 256],
            fc_dims=[1024],
            conv_norm=ChannelLayerNorm,
        )
        for _ in range(3)
    ],
    box_predictors=[
        L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels=1024),
            test_score_thresh=0.05,
            box2box_transform=L(Box2BoxTransform)(weights=(center, center, size, size)),
            cls_agnostic_bbox_reg=True,
            num_classes="${...num_classes}",
        )
        for center, size in ((10, 5), (20, 10), (30, 15))
    ],
    proposal_matchers=[
        L(Matcher)(thresholds=[threshold], labels=[0, 1], allow_low_quality_matches=False)
        for threshold in (0.5, 0.6, 0.7)
    ],
)
