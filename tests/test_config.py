import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN, build_backbone
from omegaconf import DictConfig, OmegaConf
from torch import nn

import hourglass
from hourglass import (
    AveragePooling,
    BipartiteMatching,
    DensityPeaks,
    HourglassSwin,
    HourglassViT,
    InputError,
    Plan,
    Reducer,
    SkipBlocks,
    TokenClustering,
    TokenSelection,
)
from hourglass.compat import detectron2_encoder
from hourglass.config import SWIN_NODES, add_hourglass_config, build_plan, build_swin_plan, expedite
from hourglass.encoders import Swin, ViT
from hourglass.encoders.calibration import Calibration, describe_encoder, sample_weights

CONFIGS = Path(__file__).parents[1] / "configs"
VIT = dict(img_size=64, patch_size=8, embed_dim=16, depth=3, num_heads=2, use_rel_pos=True, pretrain_img_size=64)


class Strided(Reducer):
    """Every few tokens."""

    def __init__(self, stride: int = 2):
        super().__init__()
        self.stride = stride


def plan(stop: int | None = None) -> Plan:
    return Plan(TokenClustering(grid=(5, 5)), start=1, stop=stop)


def plan_node() -> DictConfig:
    return L(Plan)(reducer=L(TokenClustering)(grid=[5, 5]), start=1)


def bare(target=ViT, **options) -> DictConfig:
    return OmegaConf.create({"model": {"backbone": L(target)(**VIT, **options)}}, flags={"allow_objects": True})


def demo() -> DictConfig:
    cfg = LazyConfig.load(str(CONFIGS / "demo" / "vitdet.py"))
    # Smaller, for speed.
    cfg.model.backbone.net.embed_dim = 24
    cfg.model.backbone.square_pad = 128
    return cfg


def same_weights(cfg: DictConfig, model: nn.Module) -> nn.Module:
    second = instantiate(cfg.model).eval()
    second.load_state_dict(model.state_dict())
    return second


def assert_same(cfg: DictConfig, expedited: DictConfig, plan: Plan, size: int = 64) -> None:
    """Both ways to expedite give one model."""
    torch.manual_seed(0)
    plain = instantiate(cfg.model).eval()
    by_model = hourglass.expedite(plain, plan).eval()
    by_config = same_weights(expedited, plain)
    assert list(by_config.state_dict()) == list(plain.state_dict())
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected, outputs = by_model.backbone(image), by_config.backbone(image)
        assert expected.keys() == outputs.keys()
        for name in expected:
            assert torch.equal(outputs[name], expected[name])


class Model(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone


def with_model(cfg: DictConfig) -> DictConfig:
    cfg.model = L(Model)(backbone=cfg.model.backbone)
    return cfg


def test_demo_config():
    cfg = demo()
    before = copy.deepcopy(cfg)
    expedited = expedite(cfg, plan())
    assert cfg == before
    assert_same(cfg, expedited, plan(), size=128)

    model = instantiate(expedited.model).eval()
    assert isinstance(model, GeneralizedRCNN) and isinstance(model.backbone.net, HourglassViT)
    with torch.no_grad():
        assert "instances" in model([{"image": torch.zeros(3, 96, 128)}])[0]


@pytest.mark.parametrize("received", [plan, plan_node])
@pytest.mark.parametrize("target", [ViT, "hourglass.encoders.ViT", "hourglass.encoders.vit.ViT"], ids=str)
def test_bare_encoder(target, received):
    cfg = with_model(bare(target))
    assert_same(cfg, expedite(cfg, received()), plan())


def test_node_keeps_its_place_and_arguments():
    cfg = expedite(demo(), plan_node())
    assert cfg.model.backbone.in_feature == "last_feat"
    cfg = LazyConfig.apply_overrides(
        cfg, ["model.backbone.net.depth=2", "model.backbone.net.out_feature=tokens", "model.backbone.net.plan.start=0"]
    )
    backbone = instantiate(cfg.model.backbone)
    assert len(backbone.net.blocks) == 2 and backbone.net.plan.start == 0
    assert backbone.in_feature == "tokens"


def test_a_plan_that_does_not_fit_is_refused_when_the_model_is_built():
    cfg = expedite(bare(), plan(stop=4))
    with pytest.raises(InputError, match="number of blocks"):
        instantiate(cfg.model.backbone)
    cfg.model.backbone.depth = 4
    instantiate(cfg.model.backbone)


def test_expedited_config_gets_the_new_plan():
    cfg = with_model(bare())
    again = expedite(expedite(cfg, Plan(SkipBlocks(), 0, 2)), plan())
    assert_same(cfg, again, plan())


def test_a_hourglass_node_gets_the_new_plan():
    cfg = with_model(bare())
    wrapped = copy.deepcopy(cfg)
    wrapped.model.backbone = L(HourglassViT)(encoder=cfg.model.backbone, plan=L(Plan)())
    assert_same(cfg, expedite(wrapped, plan_node()), plan())


def test_plan_of_the_config_itself():
    cfg = with_model(bare())
    cfg.grid = [5, 5]
    cfg.plan = L(Plan)(reducer=L(TokenClustering)(grid="${...grid}"), start=1)
    assert_same(cfg, expedite(cfg, cfg.plan), plan())


def test_round_trips(tmp_path):
    cfg = with_model(bare(norm_layer=partial(nn.LayerNorm, eps=1e-6)))
    expedited = expedite(cfg, plan_node())
    merged = OmegaConf.create(OmegaConf.to_container(expedited), flags={"allow_objects": True})
    assert_same(cfg, merged, plan())
    LazyConfig.save(expedited, str(tmp_path / "config.yaml"))
    loaded = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert loaded.model.backbone._target_ == "hourglass.config.build_hourglass"
    assert loaded.model.backbone.encoder == "hourglass.encoders.ViT"
    assert_same(cfg, loaded, plan())


def test_subclass_that_has_no_dotted_name():
    class Ours(ViT):
        pass

    cfg = with_model(bare(Ours))
    assert_same(cfg, expedite(cfg, plan()), plan())


def test_read_only_config():
    cfg = with_model(bare())
    cfg.start, cfg.plan = 1, plan_node()
    cfg.plan.start = "${..start}"
    OmegaConf.set_readonly(cfg, True)
    OmegaConf.set_struct(cfg, True)
    assert_same(cfg, expedite(cfg, cfg.plan), plan())


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (OmegaConf.create({"train": {}}), "model.backbone, got one with train"),
        ({"model": {}}, "needs a LazyConfig with a model.backbone, got {"),
        (OmegaConf.create({"model": {"backbone": {"_target_": "torch.nn.Identity"}}}), "none: .* torch.nn.Identity"),
        (OmegaConf.create({"model": {"backbone": {"_target_": "no.such.thing"}}}), "none: .* no.such.thing"),
        (
            OmegaConf.create({"model": {"backbone": {"parts": [L(ViT)(), L(ViT)()]}}}, flags={"allow_objects": True}),
            r"parts\[0\] and model.backbone.parts\[1\]",
        ),
    ],
    ids=["no model", "no LazyConfig", "no encoder", "no such target", "several"],
)
def test_config_without_one_encoder(cfg, message):
    with pytest.raises(InputError, match=message):
        expedite(cfg, plan())


@pytest.mark.parametrize("wrong", [None, "plan", TokenClustering(0.5)], ids=repr)
def test_plan_that_is_none(wrong):
    with pytest.raises(InputError, match="plan must be"):
        expedite(bare(), wrong)


def test_node_that_is_no_plan():
    with pytest.raises(InputError, match="plan must be"):
        instantiate(expedite(bare(), L(TokenClustering)(grid=0.5)).model.backbone)


@pytest.mark.skipif(detectron2_encoder("ViT") is None, reason="this Detectron2 has no ViT of its own")
def test_detectron2s_own_vit():
    pytest.importorskip("timm")
    import detectron2.modeling

    for target in (detectron2.modeling.ViT, "detectron2.modeling.ViT"):
        cfg = with_model(bare(target, window_size=4, window_block_indexes=[0, 2]))
        assert_same(cfg, expedite(cfg, plan_node()), plan())


def small_yacs(name: str = "build_hourglass_vitdet_backbone"):
    cfg = get_cfg()
    add_hourglass_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    options = ["IMG_SIZE", 64, "PATCH_SIZE", 8, "EMBED_DIM", 16, "DEPTH", 3, "NUM_HEADS", 2, "PRETRAIN_IMG_SIZE", 64]
    options += ["WINDOW_SIZE", 4, "WINDOW_BLOCK_INDEXES", [0, 2], "PYRAMID.SQUARE_PAD", 64, "PYRAMID.OUT_CHANNELS", 8]
    cfg.merge_from_list([f"MODEL.VIT.{o}" if isinstance(o, str) else o for o in options])
    cfg.merge_from_list(["MODEL.HOURGLASS.GRID", [5, 5], "MODEL.HOURGLASS.START", 1])
    return cfg


def test_yacs_backbones():
    torch.manual_seed(0)
    plain = build_backbone(small_yacs("build_vitdet_backbone")).eval()
    expedited = build_backbone(small_yacs()).eval()
    assert isinstance(expedited.net, HourglassViT) and not isinstance(plain.net, HourglassViT)
    assert list(expedited.state_dict()) == list(plain.state_dict())
    assert plain.size_divisibility == 64
    expedited.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        unmodified, outputs = plain(image), expedited(image)
        expected = hourglass.expedite(plain, plan())(image)
    assert list(outputs) == list(plain.output_shape()) == ["p1", "p2", "p3", "p4", "p5"]
    for name in outputs:
        assert torch.equal(outputs[name], expected[name])
        assert not torch.equal(outputs[name], unmodified[name])


def test_yacs_without_a_reducer_is_unmodified():
    cfg = small_yacs()
    cfg.merge_from_list(["MODEL.HOURGLASS.REDUCER", ""])
    assert build_plan(cfg).describe() == Plan().describe()
    torch.manual_seed(0)
    expedited = build_backbone(cfg).eval()
    torch.manual_seed(0)
    plain = build_backbone(small_yacs("build_vitdet_backbone")).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(expedited(image).values(), plain(image).values()))


def test_yacs_defaults_are_the_constructors():
    cfg = get_cfg()
    add_hourglass_config(cfg)
    assert build_plan(cfg).describe() == Plan(TokenClustering((46, 46)), start=3).describe()
    with torch.device("meta"):
        yacs = hourglass.config.build_vitdet_backbone(cfg, ShapeSpec(channels=3))
        lazy = instantiate(LazyConfig.load(str(CONFIGS / "common" / "mask_rcnn_vitdet.py")).model.backbone)
    assert {k: v.shape for k, v in yacs.state_dict().items()} == {k: v.shape for k, v in lazy.state_dict().items()}
    assert [b.window_size for b in yacs.net.blocks] == [b.window_size for b in lazy.net.blocks]
    assert repr(yacs.net) == repr(lazy.net)  # epsilons and stochastic depth too
    assert yacs.output_shape() == lazy.output_shape() and yacs.size_divisibility == lazy.size_divisibility


def test_yacs_plans():
    cfg = small_yacs()
    nodes = ["TEMPERATURE", 0.05, "RESTORE_TEMPERATURE", "auto", "K", 3, "STOP", 2, "PROPORTIONAL", False]
    cfg.merge_from_list([f"MODEL.HOURGLASS.{o}" if isinstance(o, str) and o.isupper() else o for o in nodes])
    reducer = TokenClustering((5, 5), temperature=0.05, restore_temperature="auto", k=3)
    assert build_plan(cfg).describe() == Plan(reducer, 1, 2, proportional=False).describe()
    # Back to the default in a later file or on the command line.
    cfg.merge_from_list(["MODEL.HOURGLASS.TEMPERATURE", None, "MODEL.HOURGLASS.GRID", [0.5, 0.75]])
    assert build_plan(cfg).reducer.temperature == "auto"
    cfg.MODEL.HOURGLASS.REDUCER = "AveragePooling"
    assert build_plan(cfg).reducer.describe() == AveragePooling((0.5, 0.75)).describe()
    cfg.MODEL.HOURGLASS.REDUCER = "SkipBlocks"
    assert isinstance(build_plan(cfg).reducer, SkipBlocks)
    cfg.merge_from_list(["MODEL.HOURGLASS.SPATIAL", 0.5, "MODEL.HOURGLASS.REDUCER", "DensityPeaks"])
    assert build_plan(cfg).reducer.describe() == DensityPeaks((0.5, 0.75), k=3, spatial=0.5).describe()
    cfg.merge_from_list(["MODEL.HOURGLASS.R", 0.2, "MODEL.HOURGLASS.REDUCER", "BipartiteMatching"])
    assert build_plan(cfg).reducer.describe() == BipartiteMatching(0.2).describe()
    cfg.merge_from_list(["MODEL.HOURGLASS.SELECTORS", "random", "MODEL.HOURGLASS.TARGET", [0.7, 0.5]])
    cfg.MODEL.HOURGLASS.REDUCER = "TokenSelection"
    assert build_plan(cfg).reducer.describe() == TokenSelection("random", [0.7, 0.5]).describe()


def test_yacs_takes_the_former_name_of_restore_mode():
    cfg = small_yacs()
    cfg.MODEL.HOURGLASS.RESTORE = "features"
    assert build_plan(cfg).reducer.restore_mode == "features"
    cfg.MODEL.HOURGLASS.RESTORE_MODE = "update"
    with pytest.raises(InputError, match="restore_mode must be given once"):
        build_plan(cfg)
    cfg.MODEL.HOURGLASS.RESTORE = None
    assert build_plan(cfg).reducer.restore_mode == "update"
    cfg.MODEL.HOURGLASS.RESTORE_MODE, cfg.MODEL.HOURGLASS.ARGUMENTS.RESTORE = None, "features"
    assert build_plan(cfg).reducer.restore_mode == "features"


@pytest.mark.parametrize("reducer", ["GridReducer", "MergingReducer", "Reduction", "pooling"])
def test_yacs_reducer_that_is_none(reducer):
    cfg = small_yacs()
    cfg.MODEL.HOURGLASS.REDUCER = reducer
    with pytest.raises(InputError, match="MODEL.HOURGLASS.REDUCER must be '' or .*'TokenClustering'"):
        build_backbone(cfg)


def test_nodes_are_added_once():
    cfg = small_yacs()
    before = cfg.clone()
    add_hourglass_config(cfg)
    assert cfg == before
    second = get_cfg()
    add_hourglass_config(second)
    second.MODEL.VIT.WINDOW_BLOCK_INDEXES.append(2)
    fresh = get_cfg()
    add_hourglass_config(fresh)
    assert 2 not in fresh.MODEL.VIT.WINDOW_BLOCK_INDEXES


def swin_yacs(name: str, **nodes):
    cfg = get_cfg()
    add_hourglass_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.SWIN.merge_from_other_cfg(
        CfgNode({"EMBED_DIM": 12, "DEPTHS": [2, 2, 6, 2], "NUM_HEADS": [1, 2, 2, 2], "WINDOW_SIZE": 6, **nodes})
    )
    return cfg


def test_a_swin_in_a_lazyconfig():
    arguments = dict(embed_dim=12, depths=(2, 2), num_heads=(1, 2), window_size=4, out_indices=(0, 1))
    cfg = with_model(OmegaConf.create({"model": {"backbone": L(Swin)(**arguments)}}, flags={"allow_objects": True}))
    node = L(Plan)(reducer=L(TokenClustering)(grid=[3, 3]), start=1, stop=3, scope="window")
    expedited = expedite(cfg, node)
    assert_same(cfg, expedited, instantiate(node))
    assert_same(cfg, expedite(expedited, L(Plan)()), Plan())


def test_yacs_swin_backbones():
    torch.manual_seed(0)
    plain = build_backbone(swin_yacs("build_swin_backbone", OUT_FEATURES=["res3", "res5"])).eval()
    assert isinstance(plain, Swin) and list(plain.output_shape()) == ["res3", "res5"]
    image = torch.randn(1, 3, 96, 128)
    plans = {
        "build_hourglass_swin_backbone": Plan(TokenClustering((5, 5)), 3),
        "D2HourglassSwinTransformer": build_swin_plan(swin_yacs("D2HourglassSwinTransformer")),
    }
    for name, expected_plan in plans.items():
        cfg = swin_yacs(name, OUT_FEATURES=["res3", "res5"])
        cfg.MODEL.HOURGLASS.GRID = [5, 5]
        cfg.MODEL.HOURGLASS.STOP = 10 if name.startswith("build") else None
        cfg.MODEL.HOURGLASS.START = 6
        expected_plan = Plan(TokenClustering((5, 5)), 6, 10) if name.startswith("build") else expected_plan
        expedited = build_backbone(cfg).eval()
        assert isinstance(expedited, HourglassSwin) and list(expedited.state_dict()) == list(plain.state_dict())
        expedited.load_state_dict(plain.state_dict())
        with torch.no_grad():
            outputs, expected = expedited(image), hourglass.expedite(plain, expected_plan)(image)
            assert not torch.equal(outputs["res5"], plain(image)["res5"])
        assert all(torch.equal(outputs[level], expected[level]) for level in ("res3", "res5"))
    cfg = swin_yacs("build_swin_backbone", OUT_FEATURES=["p2"])
    with pytest.raises(InputError, match="MODEL.SWIN.OUT_FEATURES must be 'res2' or"):
        build_backbone(cfg)


def test_expedits_nodes_make_the_plan():
    """The nodes of the authors' Swin-L configs on COCO, panoptic and instance."""
    cfg = swin_yacs("D2HourglassSwinTransformer", DEPTHS=[2, 2, 18, 2], WINDOW_SIZE=12)
    nodes = {"CLUSTERING_LOCATION": 10, "TOKEN_CLUSTERING_BLOCK": {"NUM_SPIXELS": 64}}
    cfg.MODEL.SWIN.merge_from_other_cfg(CfgNode(nodes))
    cfg.MODEL.HOURGLASS.PUBLISHED = True
    panoptic = Plan(TokenClustering.published((8, 8), restore_temperature=0.05), 10, 22, "window", published=True)
    assert build_swin_plan(cfg).describe() == panoptic.describe()
    # What the config leaves open is that plan too.
    cfg.MODEL.SWIN.merge_from_list(["CLUSTERING_LOCATION", None, "TOKEN_CLUSTERING_BLOCK.NUM_SPIXELS", None])
    assert build_swin_plan(cfg).describe() == panoptic.describe()

    nodes["CLUSTERING_LOCATION"] = 12
    nodes["TOKEN_CLUSTERING_BLOCK"] |= {"NUM_SPIXELS": (8, 8), "N_ITERS": 5, "TEMPERATURE": 0.01, "WINDOW_SIZE": 11}
    nodes["TOKEN_RECONSTRUCTION_BLOCK"] = {"K": 60, "TEMPERATURE": 0.01}
    cfg.MODEL.SWIN.merge_from_other_cfg(CfgNode(nodes))
    cfg.MODEL.HOURGLASS.PUBLISHED = False
    reducer = TokenClustering((8, 8), 5, 11, 0.01, 0.01, 60)
    assert build_swin_plan(cfg).describe() == Plan(reducer, 12, 22, "window").describe()
    cfg.MODEL.SWIN.CLUSTERING_LOCATION = -1
    assert build_swin_plan(cfg).reducer is None
    cfg.MODEL.SWIN.CLUSTERING_LOCATION, cfg.MODEL.SWIN.TOKEN_CLUSTERING_BLOCK.NUM_SPIXELS = 10, 60
    with pytest.raises(InputError, match="NUM_SPIXELS must be a square number"):
        build_swin_plan(cfg)


def test_expedits_files_merge_into_mask2formers_config():
    """Its add_maskformer2_config makes a MODEL.SWIN; the nodes that it lacks take the numbers of Expedit's files."""
    cfg = get_cfg()
    cfg.MODEL.SWIN = CfgNode({name: value for name, value in SWIN_NODES.items() if name.isupper() and "_" not in name})
    add_hourglass_config(cfg)
    file = {"CLUSTERING_LOCATION": 10, "TOKEN_CLUSTERING_BLOCK": {"NUM_SPIXELS": 64, "TEMPERATURE": 0.01}}
    cfg.merge_from_other_cfg(CfgNode({"MODEL": {"SWIN": {**file, "DEPTHS": [2, 2, 18, 2], "WINDOW_SIZE": 12}}}))
    plan = build_swin_plan(cfg)
    assert (plan.start, plan.stop, plan.reducer.grid, plan.reducer.temperature) == (10, 22, (8, 8), 0.01)


def test_a_config_of_mask2formers_own_suffices():
    """Its MODEL.SWIN has none of Expedit's nodes, and no MODEL.HOURGLASS."""
    cfg = get_cfg()
    nodes = {name: value for name, value in SWIN_NODES.items() if not name.startswith(("CLUSTERING", "TOKEN_"))}
    cfg.MODEL.SWIN = CfgNode({**nodes, "EMBED_DIM": 12, "NUM_HEADS": [1, 1, 1, 1]})
    cfg.MODEL.BACKBONE.NAME = "D2HourglassSwinTransformer"
    cfg.freeze()
    backbone = build_backbone(cfg)
    assert (backbone.plan.start, backbone.plan.stop, backbone.plan.reducer.grid) == (6, 10, (5, 5))
    assert backbone(torch.zeros(1, 3, 64, 64))["res5"].shape == (1, 96, 2, 2)


@pytest.mark.parametrize("config_kind", ["file", "code"])
def test_arguments_of_a_reducer_of_ones_own(config_kind, tmp_path):
    cfg = get_cfg()
    hourglass.add_hourglass_config(cfg)
    if config_kind == "file":
        nodes = "{REDUCER: tests.test_config.Strided, ARGUMENTS: {STRIDE: 3}}"
        (tmp_path / "own.yaml").write_text(f"MODEL:\n  HOURGLASS: {nodes}\n")
        cfg.merge_from_file(str(tmp_path / "own.yaml"))
    else:
        cfg.MODEL.HOURGLASS.REDUCER, cfg.MODEL.HOURGLASS.ARGUMENTS.STRIDE = "tests.test_config.Strided", 3
    # As a run's own config.yaml has it.
    saved = get_cfg()
    hourglass.add_hourglass_config(saved)
    saved.merge_from_other_cfg(CfgNode.load_cfg(cfg.dump()))
    for config in (cfg, saved):
        plan = build_plan(config)
        assert type(plan.reducer).__name__ == "Strided" and plan.reducer.stride == 3
    cfg.MODEL.HOURGLASS.ARGUMENTS.STEP = 3
    with pytest.raises(InputError, match="MODEL.HOURGLASS.ARGUMENTS of Strided must be 'stride', got 'step'"):
        build_plan(cfg)


def test_a_calibrated_plan_keeps_its_calibration():
    cfg = bare(window_size=0)
    encoder = instantiate(cfg.model.backbone)
    bare_plan = Plan(AveragePooling((4, 4)))
    tensors = {0: {"tokens": torch.zeros(16, 16), "constant": torch.zeros(16)}}
    about = describe_encoder(encoder), sample_weights(encoder)
    calibration = Calibration(tensors, bare_plan.describe(), *about, {"images": 1})
    expedited = instantiate(expedite(cfg, bare_plan.calibrated(calibration)).model.backbone)
    assert expedited.plan.calibration.digest() == calibration.digest()
