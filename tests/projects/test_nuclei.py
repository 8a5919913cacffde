import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from hourglass import AveragePooling, BipartiteMatching, InputError, Plan, TokenClustering, expedite
from hourglass.checkpoint import load_checkpoint
from hourglass.data import PanopticMapper
from hourglass.data.loading import build_loader
from hourglass.encoders import find_encoder
from hourglass.launch import build, load_config
from hourglass.reduction.scope import EachWindow
from projects.nuclei import deepen, pictures, prepare, register_nuclei, unwindow
from tests.detectors import tiny_vit

ROOT = Path(__file__).parents[2]
NAMES = {
    "train": {"fluorescence_small": ["b1", "a2"], "purple_on_white": ["c3"]},
    "val": {"fluorescence_small": ["d4"]},
}
# Three nuclei: the second overlaps the first in two pixels, which are the second's, as it is smaller.
MASKS = [np.zeros((8, 10), bool) for _ in range(3)]
MASKS[0][0:4, 0:4] = MASKS[1][3, 2:6] = MASKS[2][6:, 8:] = True


@pytest.fixture
def split(tmp_path, monkeypatch):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(NAMES))
    monkeypatch.setattr(prepare, "SPLIT", path)


@pytest.fixture
def source(tmp_path, split):
    rng = np.random.default_rng(0)
    for kinds in NAMES.values():
        for name in (name for names in kinds.values() for name in names):
            folder = tmp_path / "stage1_train" / name
            (folder / "images").mkdir(parents=True)
            (folder / "masks").mkdir()
            Image.fromarray(rng.integers(0, 256, (8, 10, 4), dtype=np.uint8)).save(folder / "images" / f"{name}.png")
            for i, mask in enumerate(MASKS):
                Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{i}.png")
    return tmp_path / "stage1_train"


@pytest.fixture
def nuclei(tmp_path, source, monkeypatch):
    """The small set in COCO's layout, found through HOURGLASS_NUCLEI."""
    folder = tmp_path / "made" / "nuclei"
    prepare.main(prepare.parse([str(source), str(folder)]))
    monkeypatch.setenv("HOURGLASS_NUCLEI", str(folder))
    register_nuclei()
    return folder


def test_the_split_is_the_published_one():
    split = json.loads((ROOT / "projects" / "nuclei" / "split.json").read_text())
    names = {part: [name for names in kinds.values() for name in names] for part, kinds in split.items()}
    assert len(names["train"]) == 471 and len(names["val"]) == 61
    assert len(set(names["train"] + names["val"])) == 532
    assert all(len(name) == 64 for part in names.values() for name in part)


def test_prepared_records(nuclei):
    records = DatasetCatalog.get("hourglass_nuclei_train")
    assert [Path(record["file_name"]).name for record in records] == ["a2.png", "b1.png", "c3.png"]
    record = records[0]
    assert [annotation["bbox"] for annotation in record["annotations"]] == [[0, 0, 4, 4], [2, 3, 4, 1], [8, 6, 2, 2]]
    content = json.loads((nuclei / "annotations" / "instances_train.json").read_text())
    assert [image["image_type"] for image in content["images"]] == ["fluorescence_small"] * 2 + ["purple_on_white"]
    assert [annotation["area"] for annotation in content["annotations"]] == [14, 4, 4] * 3
    val = json.loads((nuclei / "annotations" / "instances_val.json").read_text())
    assert val["images"][0]["id"] == 1001 and val["annotations"][0]["id"] == 100001

    entry = PanopticMapper([], stuff=False, semantic=True)(record)
    assert entry["image"].shape == (3, 8, 10)
    np.testing.assert_array_equal(entry["instances"].gt_masks.tensor[1].numpy(), MASKS[1])
    np.testing.assert_array_equal(entry["sem_seg"].numpy(), ~np.any(MASKS, axis=0))
    metadata = MetadataCatalog.get("hourglass_nuclei_train")
    assert metadata.thing_classes == ["nucleus"] and metadata.stuff_classes == ["nucleus", "background"]


def test_prepare_refuses_and_leaves_nothing(tmp_path, source, split):
    target = tmp_path / "nuclei"
    (target / "annotations").mkdir(parents=True)
    with pytest.raises(InputError, match="FOLDER must be a path that does not exist yet"):
        prepare.main(prepare.parse([str(source), str(target)]))
    with pytest.raises(InputError, match="lacks 4 of the 4 images, such as b1"):
        prepare.main(prepare.parse([str(tmp_path), str(tmp_path / "new")]))
    (source / "d4" / "masks" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="1.png cannot be read"):
        prepare.main(prepare.parse([str(source), str(tmp_path / "new")]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nuclei", "split.json", "stage1_train"]


def test_prepare_is_a_command(tmp_path):
    command = [sys.executable, "-m", "projects.nuclei.prepare", str(tmp_path), str(tmp_path / "x")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"error: {tmp_path} lacks 532 of the 532 images")


def load(split: str = "val"):
    cfg = load_config(str(ROOT / "configs" / "nuclei" / "vitdet.py"), [])
    return build_loader(cfg.dataloader.test if split == "val" else cfg.dataloader.train)


def test_the_folder_is_found_by_either_variable(nuclei, monkeypatch):
    assert len(load()[1]) == 1
    monkeypatch.delenv("HOURGLASS_NUCLEI")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(nuclei.parent))
    assert len(load()[1]) == 1 and len(load("train")[1]) == 3


def test_a_half_copied_folder_is_refused(nuclei, monkeypatch):
    (nuclei / "val" / "d4.png").unlink()
    with pytest.raises(InputError, match=r"1 of the 1 images .* are missing, such as .*d4.png \(HOURGLASS_NUCLEI is"):
        load()
    (nuclei / "annotations" / "panoptic_train" / "c3.png").unlink()
    with pytest.raises(InputError, match=r"1 of the 3 panoptic PNGs .* are missing, such as .*c3.png"):
        load("train")
    text = (nuclei / "annotations" / "instances_train.json").read_text()
    (nuclei / "annotations" / "instances_train.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=r"instances JSON .*instances_train.json cannot be read \(JSONDecodeError"):
        load("train")
    (nuclei / "annotations" / "instances_train.json").unlink()
    with pytest.raises(InputError, match="instances_train.json is missing"):
        load("train")


def test_a_wrong_folder_is_refused(tmp_path, nuclei, monkeypatch):
    path = nuclei / "annotations" / "panoptic_val.json"
    path.write_text(path.read_text().replace("background", "sky"))
    with pytest.raises(InputError, match=r"has the categories \['nucleus', 'sky'\], not \['nucleus', 'background'\]"):
        load()
    monkeypatch.setenv("HOURGLASS_NUCLEI", str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="elsewhere/annotations/instances_val.json is missing"):
        load()
    monkeypatch.delenv("HOURGLASS_NUCLEI")
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="HOURGLASS_NUCLEI is not set, and DETECTRON2_DATASETS is not set, so"):
        load()


class TestClusters:
    def test_of_pooling_are_the_cells(self):
        tokens = torch.randn(1, 12, 8, 5)
        labels = pictures.find_clusters(tokens, AveragePooling((3, 2))(tokens))
        cells = torch.arange(6).view(3, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)
        assert torch.equal(labels, cells)

    @pytest.mark.parametrize("restore_mode", ["update", "features"])
    def test_of_windows_lie_inside_them(self, restore_mode):
        torch.manual_seed(0)
        # Cut windows at the right and the lower edge.
        tokens = torch.randn(1, 20, 13, 7)
        reduction = EachWindow(TokenClustering((3, 3), restore_mode=restore_mode), 8)(tokens)
        labels = pictures.find_clusters(tokens, reduction)
        columns = reduction.tokens.shape[2]
        row, column = labels // columns, labels % columns
        assert (row[:8] < 3).all() and (row[8:16] // 3 == 1).all() and (column[:, :8] < 3).all()
        assert (column[:, 8:] >= 3).all() and len(labels.unique()) > 20

    def test_are_drawn_where_they_meet(self):
        labels = np.array([[0, 0, 1], [0, 2, 1]])
        drawn = pictures.draw_clusters(np.zeros((8, 12, 3), np.uint8), labels, 4)[..., 0] > 0
        assert drawn[:, 8].all() and drawn[4:, 4].all() and drawn[4, 4:8].all()
        assert not drawn[:4, :8].any() and not drawn[:, 9:].any() and not drawn[5:, 5:8].any()

    @pytest.mark.parametrize(
        "plan, name",
        [(Plan(), "none"), (Plan(BipartiteMatching(0.1), 1, scope="window"), "BipartiteMatching")],
    )
    def test_are_of_one_smaller_map(self, plan, name):
        with pytest.raises(InputError, match=f"a reducer of one smaller map, got {name}$"):
            pictures.Clusters(find_encoder(expedite(tiny_vit(), plan))[1], plan)


def test_pictures(nuclei, tmp_path, capsys):
    pictures.main(pictures.parse(["--images", "d4", "--output", str(tmp_path / "drawn")]))
    picture = cv2.imread(str(tmp_path / "drawn" / "d4.png"))
    # Four panels of 640 x 512, twice as large, with titles and gaps.
    assert picture.shape == (2 * (1024 + 40 + 12), 2 * (1280 + 12), 3)
    image, truth, _, expedited = (picture[y : y + 1024, x : x + 1280] for y in (40, 1116) for x in (0, 1292))
    assert (image != truth).any() and (image != expedited).any()
    with pytest.raises(InputError, match="--images must be names of the 1 validation images, got 'a2'"):
        pictures.main(pictures.parse(["--images", "a2"]))
    with pytest.raises(InputError, match="--score must be a number from 0 to 1, got 2"):
        pictures.main(pictures.parse(["--score", "2"]))


def test_the_committed_weights_are_evaluated(nuclei, tmp_path):
    """Boxes, masks and panoptic segments of the one small image."""
    command = [sys.executable, str(ROOT / "train_net.py"), "--eval-only", "--control", "--config-file"]
    options = ["evaluation.warmup=0", f"train.output_dir={tmp_path / 'out'}", "train.device=cpu"]
    result = subprocess.run(
        [*command, str(ROOT / "configs" / "nuclei" / "vitdet.py"), *options], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["max_detections"] == 500 and "mask AP (maxDets 500)" in result.stdout
    assert content["retention"].keys() == {"bbox.AP", "segm.AP", "panoptic_seg.PQ"}
    assert content["models"].keys() == {"unmodified", "fast attention", "expedited", "control", "linear control"}


def test_a_model_without_windows_starts_from_one_with_windows(tmp_path):
    """Tables keep what they say, and repeat it beyond a window; what was global computes the same."""
    config = str(ROOT / "configs" / "nuclei" / "vitdet.py")
    checkpoint, start = tmp_path / "windows.pth", tmp_path / "start.pth"
    torch.manual_seed(0)
    model = build(load_config(config, []), "model")
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter)
    before = model.state_dict()
    torch.save({"model": before}, checkpoint)
    unwindow.main([str(checkpoint), str(start)])
    # Of exactly this model: no name or shape is left over.
    model = build(load_config(config, ["model.backbone.net.window_block_indexes=[]"]), "model")
    load_checkpoint(model, str(start))
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        if value.shape == after[name].shape:
            assert torch.equal(after[name], value)
        else:  # windows of 16, a map of 64
            assert name.endswith(("rel_pos_h", "rel_pos_w")) and after[name].shape[0] == 127
            distances = torch.arange(-63, 64).clamp(-15, 15) + 15
            assert torch.equal(after[name], value[distances])
    table = "backbone.net.blocks.0.attn.rel_pos_h"
    for weights, message in (
        ({"backbone.net.norm.weight": torch.ones(3)}, "the model has no tables of relative positions"),
        ({table: torch.ones(9)}, f"{table} must be .2 . side - 1, channels of a head., got .9,."),
        ({table: torch.ones(8, 4)}, "got .8, 4."),
    ):
        torch.save({"model": weights}, checkpoint)
        with pytest.raises(InputError, match=message):
            unwindow.main([str(checkpoint), str(tmp_path / "again.pth")])
    assert not (tmp_path / "again.pth").exists()


def test_a_deepened_model_computes_the_same(tmp_path):
    """New blocks change nothing until they are trained."""
    config = str(ROOT / "configs" / "nuclei" / "vitdet.py")
    shallow = ["model.backbone.net.depth=8", "model.backbone.net.window_block_indexes=[0,1,3,4,6,7]"]
    checkpoint, start = tmp_path / "shallow.pth", tmp_path / "start.pth"
    torch.manual_seed(0)
    model = build(load_config(config, shallow), "model")
    for name, parameter in model.backbone.net.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.save({"model": model.state_dict()}, checkpoint)
    deepen.main([str(checkpoint), str(start)])
    image = torch.randn(1, 3, 256, 384, generator=torch.Generator().manual_seed(0))
    features = []
    for overrides, weights in ((shallow, checkpoint), ([], start)):
        model = build(load_config(config, overrides), "model").eval()
        load_checkpoint(model, str(weights))
        with torch.no_grad():
            features.append(expedite(model, Plan(attention="fast")).backbone(image))
    for name, expected in features[0].items():
        torch.testing.assert_close(features[1][name], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="the model must have 8 blocks, got 12"):
        deepen.main([str(start), str(tmp_path / "again.pth")])
    (tmp_path / "torn.pth").write_bytes(start.read_bytes()[:5000])
    with pytest.raises(InputError, match="checkpoint .*torn.pth cannot be read"):
        deepen.main([str(tmp_path / "torn.pth"), str(tmp_path / "again.pth")])
    with pytest.raises(InputError, match="checkpoint .*none.pth is missing"):
        deepen.main([str(tmp_path / "none.pth"), str(tmp_path / "again.pth")])
