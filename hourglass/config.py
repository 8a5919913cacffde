"""The hourglass in Detectron2's two kinds of config: a factory for LazyConfigs, nodes and builders for yacs ones."""

import copy
import inspect
import math
from collections.abc import Iterator
from functools import partial
from pydoc import ErrorDuringImport
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from torch import nn

from hourglass import reduction
from hourglass.checks import check_choice
from hourglass.encoders import HourglassSwin, HourglassViT, Plan, SimpleFeaturePyramid, Swin, ViT
from hourglass.encoders import expedite as expedite_model
from hourglass.encoders.expedite import HOURGLASSES
from hourglass.errors import InputError
from hourglass.reduction import GridReducer, MergingReducer, Reducer, SelectingReducer, TokenClustering


def build_hourglass(plan: Plan, encoder: str | type, **arguments: Any) -> Backbone:
    """
    What :func:`expedite` puts in an encoder's place.

    Args:
        plan: which blocks run on fewer tokens.
        encoder: the encoder's class, or its dotted name.
        arguments: the encoder's own.

    Returns:
        the hourglass around the encoder.

    Raises:
        InputError: for a plan that is none or that the encoder cannot follow.
    """
    if isinstance(encoder, str):
        encoder = locate(encoder)
    return expedite_model(encoder(**arguments), plan)


def expedite(cfg: DictConfig, plan: Plan | DictConfig) -> DictConfig:
    """
    The same config with its encoder's middle blocks on fewer tokens.

    The encoder's node keeps its place and all its arguments, so overrides of them and interpolations that read them
    work as before; its target becomes :func:`build_hourglass`, and ``plan`` and ``encoder`` (the former target) join
    its arguments. The model's parameters keep their names.

    Args:
        cfg: a LazyConfig. Its ``model.backbone`` is, or holds at any depth, the node of an encoder: a ViT or a Swin,
            ours or Detectron2's, given as a class or by its dotted name. In an expedited config the plan is replaced.
        plan: a plan, or the node of one, ``L(Plan)(...)``: a config that is to be saved takes the node.

    Returns:
        a new config; ``cfg`` stays as it was.

    Raises:
        InputError: for a config without one such encoder, or a plan that is none.
    """
    if isinstance(plan, DictConfig) and "_target_" in plan:
        plan = copy.deepcopy(plan)
        with read_write(plan):
            OmegaConf.resolve(plan)  # it may read its neighbours, and moves away from them
    elif not isinstance(plan, Plan):
        raise InputError(f"plan takes a hourglass.Plan or a LazyCall of one, got {plan!r}")
    expedited = copy.deepcopy(cfg)
    node = find_encoder_node(expedited)
    target = _target(node)
    with read_write(node), open_dict(node):
        node._set_flag("allow_objects", True)  # a plan is an object, and so may the encoder's class be
        if target is not build_hourglass and not issubclass(target, (HourglassViT, HourglassSwin)):
            name = _convert_target_to_string(target)
            node.encoder = name if _locate(name) is target else target
            node._target_ = build_hourglass
        node.plan = plan
    return expedited


def find_encoder_node(cfg: DictConfig) -> DictConfig:
    """
    The node of the encoder in a LazyConfig's ``model.backbone``.

    Raises:
        InputError: where there is none or several.
    """
    backbone = OmegaConf.select(cfg, "model.backbone") if isinstance(cfg, DictConfig) else None
    if not isinstance(backbone, DictConfig):
        given = f"one with {', '.join(map(str, cfg)) or 'nothing'}" if isinstance(cfg, DictConfig) else repr(cfg)
        raise InputError(f"expedite takes a LazyConfig with a model.backbone, got {given}")
    nodes = dict(_call_nodes(backbone, "model.backbone"))
    found = [name for name, node in nodes.items() if _is_encoder(_target(node))]
    # The encoder that an hourglass's node holds is that one's.
    found = [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]
    if len(found) != 1:
        given = " and ".join(found) or f"none: {', '.join(f'{name} is {_name(nodes[name])}' for name in nodes)}"
        kinds = ", ".join(sorted({_convert_target_to_string(kind) for kind in HOURGLASSES}))
        raise InputError(f"model.backbone takes one encoder to expedite (of {kinds}), got {given}")
    return nodes[found[0]]


def _call_nodes(node: Any, name: str) -> Iterator[tuple[str, DictConfig]]:
    """The nodes with a ``_target_`` in a config, and their full names. Interpolations are not followed."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield name, node
        children = [(key, f"{name}.{key}") for key in node]
    elif isinstance(node, ListConfig):
        children = [(i, f"{name}[{i}]") for i in range(len(node))]
    else:
        return
    for key, child in children:
        if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
            yield from _call_nodes(node[key], child)


def _target(node: DictConfig) -> Any:
    target = node._target_
    return _locate(target) if isinstance(target, str) else target


def _locate(name: str) -> Any:
    try:
        return locate(name)
    except (ImportError, ErrorDuringImport):
        return None


def _is_encoder(target: Any) -> bool:
    return target is build_hourglass or isinstance(target, type) and issubclass(target, tuple(HOURGLASSES))


def _name(node: DictConfig) -> str:
    target = node._target_
    return target if isinstance(target, str) else getattr(target, "__qualname__", repr(target))


#: MODEL.VIT: a ViT's arguments, and under PYRAMID those of the feature pyramid. The defaults are ViTDet-B's.
VIT_NODES = {
    "IMG_SIZE": 1024,
    "PATCH_SIZE": 16,
    "EMBED_DIM": 768,
    "DEPTH": 12,
    "NUM_HEADS": 12,
    "MLP_RATIO": 4.0,
    "QKV_BIAS": True,
    "DROP_PATH_RATE": 0.1,
    "NORM_EPS": 1e-6,
    "USE_ABS_POS": True,
    "USE_REL_POS": True,
    "REL_POS_ZERO_INIT": True,
    "WINDOW_SIZE": 14,
    "WINDOW_BLOCK_INDEXES": [0, 1, 3, 4, 6, 7, 9, 10],
    "RESIDUAL_BLOCK_INDEXES": [],
    "USE_ACT_CHECKPOINT": False,
    "PRETRAIN_IMG_SIZE": 224,
    "PRETRAIN_USE_CLS_TOKEN": True,
    "PYRAMID": {
        "OUT_CHANNELS": 256,
        "SCALE_FACTORS": [4.0, 2.0, 1.0, 0.5],
        # One more level, of half the coarsest one's size.
        "TOP_BLOCK": True,
        "NORM": "LN",
        "SQUARE_PAD": 1024,
    },
}

#: MODEL.SWIN: a Swin's arguments and the published plan's, under the names of Mask2Former's and Expedit's own configs.
SWIN_NODES = {
    "PRETRAIN_IMG_SIZE": 224,
    "PATCH_SIZE": 4,
    "EMBED_DIM": 96,
    "DEPTHS": [2, 2, 6, 2],
    "NUM_HEADS": [3, 6, 12, 24],
    "WINDOW_SIZE": 7,
    "MLP_RATIO": 4.0,
    "QKV_BIAS": True,
    "QK_SCALE": None,
    "DROP_RATE": 0.0,
    "ATTN_DROP_RATE": 0.0,
    "DROP_PATH_RATE": 0.3,
    "APE": False,
    "PATCH_NORM": True,
    "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "USE_CHECKPOINT": False,
    # The block before which windows are reduced, to the end of its stage. None: a third into the deepest stage (10 of
    # Swin-L's); -1: no reduction.
    "CLUSTERING_LOCATION": None,
    "TOKEN_CLUSTERING_BLOCK": {
        # Tokens of a reduced window: a square number, or (rows, columns). None: two thirds a side, 8 x 8 of 12 x 12.
        "NUM_SPIXELS": None,
        "N_ITERS": 5,
        "TEMPERATURE": 0.05,
        # The neighbourhood: so many centres a side.
        "WINDOW_SIZE": 7,
    },
    "TOKEN_RECONSTRUCTION_BLOCK": {"K": 10, "TEMPERATURE": 0.05},
}

#: MODEL.HOURGLASS: a plan's arguments, and its reducer's. None leaves the choice to the constructor. The defaults suit
#: ViTDet-B on 1024 x 1024 pixels; a Swin's maps shrink from stage to stage and take a GRID of shares or an early STOP.
HOURGLASS_NODES = {
    # A class of hourglass.reduction: "TokenClustering", "AveragePooling", "DensityPeaks", "BipartiteMatching",
    # "TokenSelection" or "SkipBlocks"; "": no reduction.
    "REDUCER": "TokenClustering",
    "START": 3,
    "STOP": None,
    "SCOPE": "map",
    "PROPORTIONAL": True,
    # As the authors' code computes, for comparison with their figures.
    "PUBLISHED": False,
    # "fast" or "plain". None: fast under a reducer that is not run as published.
    "ATTENTION": None,
    # Rows and columns of the smaller map, or the shares of them that are kept, such as [0.7, 0.7].
    "GRID": [46, 46],
    # What a restored token gets.
    "RESTORE": "update",
    # How many centres TokenClustering restores from, and neighbours tell DensityPeaks a token's density.
    "K": None,
    # DensityPeaks only.
    "SPATIAL": None,
    # BipartiteMatching only: tokens that merge in each block, or their share.
    "R": None,
    # TokenSelection only: the file of selectors, and what they are trained for.
    "SELECTORS": None,
    "TARGET": None,
    "LOSS_WEIGHT": None,
    # TokenClustering only; TEMPERATURE is also that of TokenSelection's Gumbel softmax.
    "ITERATIONS": 2,
    "NEIGHBORHOOD": 5,
    "TEMPERATURE": None,
    "RESTORE_TEMPERATURE": None,
    "WEIGHTS": "sum",
    "CANDIDATES": "neighborhood",
}


def add_hourglass_config(cfg: CfgNode) -> None:
    """
    Add MODEL.VIT, MODEL.SWIN and MODEL.HOURGLASS to a config that ``get_cfg()`` made. What is there already stays. In a
    checkout of Mask2Former call it after ``add_maskformer2_config``, which makes a MODEL.SWIN of its own.

    The backbones that read them, as MODEL.BACKBONE.NAME: "build_vitdet_backbone" and "build_swin_backbone", the
    unmodified models; "build_hourglass_vitdet_backbone" and "build_hourglass_swin_backbone", the same under the plan
    of MODEL.HOURGLASS; "D2HourglassSwinTransformer", a Swin under the plan of MODEL.SWIN, as Expedit's configs have it.
    """
    _add_missing(cfg.MODEL, CfgNode({"VIT": VIT_NODES, "SWIN": SWIN_NODES, "HOURGLASS": HOURGLASS_NODES}))


def _add_missing(node: CfgNode, defaults: CfgNode) -> None:
    for name, default in defaults.items():
        if name not in node:
            node[name] = default
        elif isinstance(default, CfgNode):
            _add_missing(node[name], default)


def build_plan(cfg: CfgNode) -> Plan:
    """
    The plan of a config's MODEL.HOURGLASS.

    Raises:
        InputError: for a value out of range.
    """
    nodes = cfg.MODEL.HOURGLASS
    if not nodes.REDUCER:
        return Plan(attention=nodes.ATTENTION)
    kinds = {name: kind for name in reduction.__all__ if _is_reducer(kind := getattr(reduction, name))}
    check_choice("MODEL.HOURGLASS.REDUCER", nodes.REDUCER, ("", *kinds))
    kind = kinds[nodes.REDUCER]
    return Plan(kind(**_arguments(kind, nodes)), **_arguments(Plan, nodes))


def _is_reducer(kind: Any) -> bool:
    contracts = (Reducer, GridReducer, MergingReducer, SelectingReducer)
    return isinstance(kind, type) and issubclass(kind, Reducer) and kind not in contracts


def _arguments(kind: type, nodes: CfgNode, leave_out: tuple[str, ...] = ("reducer",)) -> dict[str, Any]:
    """The arguments of a constructor that are among the nodes, each named by its node in lower case."""
    names = [name for name in inspect.signature(kind).parameters if name not in leave_out]
    return {name: nodes[name.upper()] for name in names if nodes.get(name.upper()) is not None}


@BACKBONE_REGISTRY.register()
def build_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """ViTDet's backbone, a ViT and the simple feature pyramid, from MODEL.VIT."""
    nodes = cfg.MODEL.VIT
    vit = ViT(
        in_chans=input_shape.channels, norm_layer=partial(nn.LayerNorm, eps=nodes.NORM_EPS), **_arguments(ViT, nodes)
    )
    top_block = None
    if nodes.PYRAMID.TOP_BLOCK:
        top_block = LastLevelMaxPool()
        # It takes "p5", which the coarsest level is at a patch size of 16.
        top_block.in_feature = f"p{round(math.log2(nodes.PATCH_SIZE / nodes.PYRAMID.SCALE_FACTORS[-1]))}"
    arguments = _arguments(SimpleFeaturePyramid, nodes.PYRAMID, leave_out=("top_block",))
    return SimpleFeaturePyramid(vit, in_feature="last_feat", top_block=top_block, **arguments)


@BACKBONE_REGISTRY.register()
def build_hourglass_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """ViTDet's backbone from MODEL.VIT under the plan of MODEL.HOURGLASS."""
    return expedite_model(build_vitdet_backbone(cfg, input_shape), build_plan(cfg))


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Swin:
    """Swin from MODEL.SWIN."""
    nodes = cfg.MODEL.SWIN
    names = list(nodes.OUT_FEATURES)
    stages = {f"res{i + 2}": i for i in range(len(nodes.DEPTHS))}
    for name in names:
        check_choice("MODEL.SWIN.OUT_FEATURES", name, tuple(stages))
    return Swin(
        in_chans=input_shape.channels,
        out_indices=[stages[name] for name in names],
        out_names=names,
        **_arguments(Swin, nodes, leave_out=("in_chans", "out_indices", "out_names")),
    )


@BACKBONE_REGISTRY.register()
def build_hourglass_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> HourglassSwin:
    """Swin from MODEL.SWIN under the plan of MODEL.HOURGLASS."""
    return expedite_model(build_swin_backbone(cfg, input_shape), build_plan(cfg))


def D2HourglassSwinTransformer(cfg: CfgNode, input_shape: ShapeSpec) -> HourglassSwin:
    """
    Swin and its plan from MODEL.SWIN, as Expedit's configs have them: with ``MODEL.HOURGLASS.PUBLISHED`` as the
    authors' code computes, else (the default) corrected. Nodes that Mask2Former's own config lacks are at their
    defaults.

    Raises:
        InputError: for a value out of range.
    """
    cfg = cfg.clone()
    cfg.defrost()
    add_hourglass_config(cfg)
    return expedite_model(build_swin_backbone(cfg, input_shape), build_swin_plan(cfg))


# Expedit's own checkout registers this name itself: there, its mask2former is to be imported first.
if "D2HourglassSwinTransformer" not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(D2HourglassSwinTransformer)


def build_swin_plan(cfg: CfgNode) -> Plan:
    """
    The plan of a config's MODEL.SWIN.

    Raises:
        InputError: for a value out of range.
    """
    nodes, clustering = cfg.MODEL.SWIN, cfg.MODEL.SWIN.TOKEN_CLUSTERING_BLOCK
    depths, start = list(nodes.DEPTHS), nodes.CLUSTERING_LOCATION
    if start == -1:
        return Plan()
    if start is None:
        deepest = depths.index(max(depths))
        start = sum(depths[:deepest]) + depths[deepest] // 3
    grid = clustering.NUM_SPIXELS
    if grid is None:
        grid = round(nodes.WINDOW_SIZE * 2 / 3) ** 2
    if isinstance(grid, int):
        if math.isqrt(grid) ** 2 != grid:
            where = "MODEL.SWIN.TOKEN_CLUSTERING_BLOCK.NUM_SPIXELS"
            raise InputError(f"{where} takes a square number or (rows, columns), got {grid}")
        grid = (math.isqrt(grid), math.isqrt(grid))
    make = TokenClustering.published if cfg.MODEL.HOURGLASS.PUBLISHED else TokenClustering
    reducer = make(
        grid,
        iterations=clustering.N_ITERS,
        neighborhood=clustering.WINDOW_SIZE,
        temperature=clustering.TEMPERATURE,
        restore_temperature=nodes.TOKEN_RECONSTRUCTION_BLOCK.TEMPERATURE,
        k=nodes.TOKEN_RECONSTRUCTION_BLOCK.K,
    )
    ends = [sum(depths[: i + 1]) for i in range(len(depths))]
    stop = next((end for end in ends if start < end), None)
    return Plan(reducer, start, stop, scope="window", published=cfg.MODEL.HOURGLASS.PUBLISHED)
