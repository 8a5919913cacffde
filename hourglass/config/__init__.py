"""The hourglass in Detectron2's two kinds of config: a factory for LazyConfigs, nodes and builders for yacs ones."""

from hourglass.config.lazy import build_hourglass, expedite, find_encoder_node, plan_node
from hourglass.config.yacs import (
    HOURGLASS_NODES,
    SWIN_NODES,
    VIT_NODES,
    D2HourglassSwinTransformer,
    add_hourglass_config,
    build_plan,
    build_swin_plan,
    build_vitdet_backbone,
)

__all__ = [
    "HOURGLASS_NODES",
    "SWIN_NODES",
    "VIT_NODES",
    "D2HourglassSwinTransformer",
    "add_hourglass_config",
    "build_hourglass",
    "build_plan",
    "build_swin_plan",
    "build_vitdet_backbone",
    "expedite",
    "find_encoder_node",
    "plan_node",
]
