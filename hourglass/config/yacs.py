"""The hourglass in yacs configs: nodes, and the backbones that read them."""

import inspect
import math
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.utils.registry import locate
from torch import nn

from hourglass import reduction
from hourglass.checks import check_choice, former_names
from hourglass.encoders import Plan, SimpleFeaturePyramid, Swin, ViT, expedite
from hourglass.errors import InputError
from hourglass.reduction import GridReducer, MergingReducer, Reducer, SelectingReducer, TokenClustering

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
    # A class of hourglass.reduction: "TokenClustering", "DensityPeaks", "GridMerging", "AveragePooling",
    # "BipartiteMatching", "TokenSelection" or "SkipBlocks"; or a reducer of one's own by its dotted name. "": no
    # reduction.
    "REDUCER": "TokenClustering",
    # The reducer's arguments by their own names, in capitals: in a file or in code, as yacs's command line adds no
    # nodes. Those of this project's reducers may stand below as well.
    "ARGUMENTS": {},
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
    # What a restored token gets, "update" or "features". RESTORE is the former name.
    "RESTORE_MODE": None,
    "RESTORE": None,
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
    of MODEL.HOURGLASS; "D2HourglassSwinTransformer", a Swin under the plan of MODEL.SWIN, as Expedit's configs have it,
    where Expedit's own checkout, which registers that name itself, is not imported.
    """
    if "D2HourglassSwinTransformer" not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY.register(D2HourglassSwinTransformer)
    _add_missing(cfg.MODEL, CfgNode({"VIT": VIT_NODES, "SWIN": SWIN_NODES, "HOURGLASS": HOURGLASS_NODES}))
    cfg.MODEL.HOURGLASS.ARGUMENTS.set_new_allowed(True)


def _nodes(cfg: CfgNode, name: str) -> CfgNode:
    if name not in cfg.MODEL:
        raise InputError(f"the config has no MODEL.{name}: call hourglass.add_hourglass_config(cfg) after get_cfg()")
    return cfg.MODEL[name]


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
    nodes = _nodes(cfg, "HOURGLASS")
    if not nodes.REDUCER:
        return Plan(attention=nodes.ATTENTION)
    kind = _reducer_class(nodes.REDUCER)
    explicit = {name.lower(): value for name, value in nodes.ARGUMENTS.items()}
    names, former = list(inspect.signature(kind).parameters), former_names(kind)
    for name in explicit:
        if name not in former:
            check_choice(f"MODEL.HOURGLASS.ARGUMENTS of {kind.__name__}", name, names)
    named = _arguments(kind, nodes, [*names, *former]) if kind.__module__.startswith("hourglass.") else {}
    return Plan(kind(**{**named, **explicit}), **_arguments(Plan, nodes, leave_out=("reducer",)))


def _reducer_class(name: str) -> type[Reducer]:
    kinds = {name: kind for name in reduction.__all__ if _is_reducer(kind := getattr(reduction, name))}
    if name in kinds:
        return kinds[name]
    try:
        kind = locate(name) if "." in name else None
    except Exception:  # whatever importing it may raise
        kind = None
    if not _is_reducer(kind):
        raise InputError(
            f"MODEL.HOURGLASS.REDUCER must be '' or one of {', '.join(map(repr, kinds))}, or the dotted name of a "
            f"hourglass.Reducer, got {name!r}"
        )
    return kind


def _is_reducer(kind: Any) -> bool:
    contracts = (Reducer, GridReducer, MergingReducer, SelectingReducer)
    return isinstance(kind, type) and issubclass(kind, Reducer) and kind not in contracts


def _arguments(kind: type, nodes: CfgNode, names: Iterable[str] = (), leave_out: Collection[str] = ()) -> dict:
    """
    The arguments of a constructor that are among the nodes, each named by its node in lower case.

    Args:
        kind: the class.
        nodes: are read where they are not None.
        names: of the arguments; none: those of the constructor's signature.
        leave_out: arguments that are not read.
    """
    names = [name for name in names or inspect.signature(kind).parameters if name not in leave_out]
    return {name: nodes[name.upper()] for name in names if nodes.get(name.upper()) is not None}


@BACKBONE_REGISTRY.register()
def build_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """ViTDet's backbone, a ViT and the simple feature pyramid, from MODEL.VIT."""
    nodes = _nodes(cfg, "VIT")
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
    return expedite(build_vitdet_backbone(cfg, input_shape), build_plan(cfg))


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Swin:
    """Swin from MODEL.SWIN."""
    nodes = _nodes(cfg, "SWIN")
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
def build_hourglass_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Swin:
    """Swin from MODEL.SWIN under the plan of MODEL.HOURGLASS."""
    return expedite(build_swin_backbone(cfg, input_shape), build_plan(cfg))


def D2HourglassSwinTransformer(cfg: CfgNode, input_shape: ShapeSpec) -> Swin:
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
    return expedite(build_swin_backbone(cfg, input_shape), build_swin_plan(cfg))


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
            node = "MODEL.SWIN.TOKEN_CLUSTERING_BLOCK.NUM_SPIXELS"
            raise InputError(f"{node} must be a square number or (rows, columns), got {grid}")
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
