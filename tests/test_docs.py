"""What the README and the other pages show is run, or read as the command would read it."""

import importlib
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog

import hourglass
import train_net
from benchmarks.encoder import MODELS
from hourglass import InputError, Plan
from hourglass.config import find_encoder_node
from hourglass.encoders import ViT
from hourglass.launch import build, load_config
from tests import small_swin as of_swin
from tests.small_vit import image, last, tiny_vit

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("*/*/README.md"))]
SNIPPETS = [
    pytest.param(code, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def commands(page: Path) -> list[str]:
    """The indented lines of a page that are commands, continued ones in one line, without comments."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^    ((?:[A-Z0-9_]+=\S+ )*(?:python|make) .*)$", text, re.MULTILINE)
    return [re.sub(r" {2,}# .*", "", line) for line in lines]


COMMANDS = sorted({(page.relative_to(ROOT).as_posix(), command) for page in ALL_PAGES for command in commands(page)})


def snippet(page: str, text: str) -> str:
    (code,) = (
        code for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL) if text in code
    )
    return code


def vit_of_12_blocks() -> torch.nn.Module:
    return ViT(
        img_size=64, patch_size=4, embed_dim=8, depth=12, num_heads=2, window_size=14, window_block_indexes=[1, 2]
    )


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_run(code, tmp_path, monkeypatch):
    if "my_config.py" in code:
        (tmp_path / "configs").symlink_to(ROOT / "configs")
        (tmp_path / "my_config.py").write_text(code)
        cfg = LazyConfig.load(str(tmp_path / "my_config.py"))
        assert cfg.model.roi_heads.num_classes == 3 and cfg.dataloader.test.dataset.names == "my_val"
        for name in ("my_val", "my_train"):
            assert MetadataCatalog.get(name).json_file == f"annotations/{name}.json"
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    elif "register_panoptic" in code:
        exec(code, {})  # nothing is read yet
        assert MetadataCatalog.get("my_panoptic_val").panoptic_root == "annotations/panoptic_my_val"
        with pytest.raises(InputError, match="panoptic JSON annotations/panoptic_my_val.json cannot be read"):
            DatasetCatalog.get("my_panoptic_val")
        DatasetCatalog.remove("my_panoptic_val")
        MetadataCatalog.remove("my_panoptic_val")
    elif "Predictor" in code:
        (tmp_path / "configs").symlink_to(ROOT / "configs")
        for name in ("a.jpg", "b.jpg"):
            cv2.imwrite(str(tmp_path / name), np.zeros((128, 128, 3), np.uint8))
        monkeypatch.chdir(tmp_path)
        scope = {}
        exec(code, scope)
        assert "instances" in scope["output"] and len(scope["outputs"]) == 2
    elif "LazyConfig.load" in code:
        published = LazyConfig.load(str(ROOT / "configs" / "vitdet" / "mask_rcnn_b.py"))
        monkeypatch.setattr(LazyConfig, "load", lambda path: published)
        scope: dict = {}
        with torch.device("meta"):
            exec(code, scope)
        assert "46" in str(scope["cfg"].model.backbone)
    elif "class EVAAttention" in code:
        module = importlib.import_module("hourglass.encoders.eva")
        scope = {**vars(module), "register": lambda family: family}  # it is registered already
        exec(code, scope)
        assert issubclass(scope["EVAFamily"], module.ViTFamily)
    elif "output/" in code:
        compile(code, "snippet", "exec")  # reads what the page's commands write
    else:
        model = vit_of_12_blocks()
        scope = {"model": model, "expedited": hourglass.expedite(model, Plan(attention="fast"))}
        exec(code, scope)
        assert last(scope["expedited"].eval(), image(1, 256, 256)).isfinite().all()


def check_plan(config_file: Path, overrides: list[str]) -> None:
    """The encoder can follow the plan."""
    # The files that earlier commands write are not there.
    cfg = load_config(str(config_file), [override for override in overrides if "output/" not in override])
    encoder = find_encoder_node(cfg)
    if encoder is not None and cfg.get("plan") is not None:
        with torch.device("meta"):
            model = instantiate(encoder)
        hourglass.expedite(model, build(cfg, "plan"))


@pytest.mark.parametrize("page, command", COMMANDS)
def test_commands_are_read(page, command):
    """Options and overrides are those that there are; what is run, and where, is in the pages."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z0-9_]+=\S+", word)]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[1] == "train_net.py":
        args = train_net.parse(words[2:])
        if args.search is not None:
            hourglass.search.goal.Goal.parse(args.search)
        if not args.config_file.startswith(("my_", "output/")):
            check_plan(ROOT / args.config_file, args.overrides)
    elif words[1] == "-m" and words[2] != "pip":
        module = importlib.import_module(words[2])
        if hasattr(module, "parse"):
            args = module.parse(words[3:])
            if hasattr(args, "overrides"):
                named = ROOT / "configs" / MODELS[args.model] if hasattr(args, "model") else ROOT / args.config_file
                check_plan(named, args.overrides)
    else:
        assert words[1] == "-m" or (ROOT / words[1]).is_file()


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
            }, target


@pytest.fixture
def strided():
    """The reducer of one's own."""
    scope: dict = {}
    exec(snippet("docs/new_reducer.md", "class Strided"), scope)
    assert scope["plan"].describe()["reducer"] == {"name": "Strided", "stride": 2}
    return scope["Strided"]


def test_a_reducer_of_ones_own_is_short():
    code = snippet("docs/new_reducer.md", "class Strided")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("size", [(64, 64), (56, 104), (8, 8)], ids=str)
def test_a_reducer_of_ones_own_runs_in_every_encoder(strided, size):
    tokens = torch.randn(2, 5, 6, 3)
    reduction = strided()(tokens)
    assert reduction.tokens.shape == (2, 3, 3, 3)
    assert torch.equal(reduction.restore(reduction.tokens), tokens)
    torch.testing.assert_close(reduction.restore(reduction.tokens + 1), tokens + 1)

    vit, x = tiny_vit(), image(2, *size)
    for scope in ("map", "window"):
        out = last(hourglass.expedite(vit, Plan(strided(), 1, 4, scope=scope)), x)
        assert out.shape == last(vit, x).shape and out.isfinite().all()
    kept = last(hourglass.expedite(vit, Plan(strided(1), 1, 4)), x)
    torch.testing.assert_close(kept, last(vit, x), atol=1e-5, rtol=1e-5)
    swin = of_swin.tiny_swin()
    out = of_swin.run(hourglass.expedite(swin, Plan(strided(), 4, 8)), x)
    expected = of_swin.run(swin, x)
    assert all(out[name].shape == expected[name].shape for name in expected)
