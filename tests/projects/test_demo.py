import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO

import projects.demo
from projects.demo import STUFF, THINGS, draw_scene, register_demo, scenes, write_demo, writing


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    write_demo(root, {"train": 3, "val": 6})
    return root


def digests(folder: Path) -> dict:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def mtimes(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


class TestDrawScene:
    def test_masks_are_disjoint_and_well_visible(self):
        for i in range(5):
            scene = draw_scene(i)
            assert scene.image.shape == (512, 512, 3) and scene.image.dtype == np.uint8
            assert scene.masks.shape == (len(scene.labels), 512, 512) and scene.masks.dtype == bool
            assert scene.masks.sum(axis=0).max() == 1
            assert scene.masks.sum(axis=(1, 2)).min() >= 110
            assert scene.stuff.shape == (512, 512) and scene.stuff.max() < len(STUFF)

    def test_every_category_ground_and_size_occurs(self):
        scenes = [draw_scene((0, i)) for i in range(40)]
        labels = [label for scene in scenes for label in scene.labels]
        areas = np.concatenate([scene.masks.sum(axis=(1, 2)) for scene in scenes])
        assert set(labels) == set(range(len(THINGS)))
        assert {kind for scene in scenes for kind in np.unique(scene.stuff)} == set(range(len(STUFF)))
        assert all(3 <= len(scene.labels) <= 12 for scene in scenes)
        shares = np.histogram(areas, [0, 32**2, 96**2, 512**2])[0] / len(areas)
        assert shares.min() > 0.15

    def test_coloured_scenes_show_two_kinds_in_the_hue(self):
        """The median hue of a plain object lies in its pair's fifth of the circle, give or take the camera."""
        off = []
        for i in range(12):
            plain, coloured = draw_scene((3, i)), draw_scene((3, i), coloured=True)
            assert plain.labels == coloured.labels and np.array_equal(plain.masks, coloured.masks)
            assert not np.array_equal(plain.image, coloured.image)
            hsv = cv2.cvtColor(coloured.image, cv2.COLOR_RGB2HSV)
            for label, mask in zip(coloured.labels, coloured.masks):
                pixels = hsv[mask & (hsv[..., 1] > 100)]
                if len(pixels) > 500:
                    hue = np.median(np.exp(2j * np.pi * pixels[:, 0] / 180))
                    turn = np.angle(hue / np.exp(2j * np.pi * (label // 2) / 5)) / (2 * np.pi)
                    off.append(abs(turn) * 5)
        assert len(off) > 30 and np.median(off) < 0.4 and np.mean(np.array(off) < 0.6) > 0.9

    def test_a_mask_is_what_is_painted(self, monkeypatch):
        # The same scene with all objects in pure red before the camera: the red pixels are the masks.
        canvases = []
        monkeypatch.setattr(scenes, "_photograph", lambda rng, canvas: canvases.append(canvas))
        monkeypatch.setattr(scenes, "_cast_shadow", lambda *args: None)
        red = np.array([1000, 0, 0], np.float32)
        monkeypatch.setattr(scenes, "_ground", lambda rng: (np.zeros((512, 512, 3), np.float32), None))
        monkeypatch.setattr(scenes, "_vivid_colour", lambda *args: red)
        monkeypatch.setattr(scenes, "_related_colour", lambda *args: red)
        monkeypatch.setattr(scenes, "_new_object", without_rim(scenes._new_object))
        scene = draw_scene(3)
        visible, covered = canvases[0][..., 0], scene.masks.any(axis=0)
        assert visible[covered].min() > 127  # 255 * coverage, or less in the shade
        # Two objects that each cover less than half of a pixel may cover more than half of it together.
        assert np.count_nonzero(visible[~covered] > 128) < 0.001 * np.count_nonzero(covered)


def without_rim(new_object):
    return lambda rng, side: new_object(rng, side)._replace(rim=None)


class TestWriteDemo:
    def test_same_seed_same_bytes(self, root, tmp_path):
        write_demo(tmp_path, {"train": 3, "val": 6}, workers=1)
        assert digests(tmp_path) == digests(root)

    def test_another_seed_or_split_gives_other_images(self, root, tmp_path):
        write_demo(tmp_path, {"val": 1}, seed=1)
        images = [tmp_path / "val", root / "val", root / "train"]
        assert len({(folder / "000000000001.jpg").read_bytes() for folder in images}) == 3

    def test_an_image_does_not_depend_on_their_number(self, root, tmp_path):
        write_demo(tmp_path, {"val": 2})
        written, longer = digests(tmp_path), digests(root)
        images = [name for name in written if not name.endswith(".json")]
        assert len(images) == 4
        assert all(written[name] == longer[name] for name in images)

    def test_instances_load_in_pycocotools(self, root):
        coco = COCO(str(root / "annotations" / "instances_val.json"))
        assert coco.getImgIds() == [1, 2, 3, 4, 5, 6]
        assert [category["name"] for category in coco.loadCats(range(1, 11))] == list(THINGS)
        for image in coco.loadImgs(coco.getImgIds()):
            assert cv2.imread(str(root / "val" / image["file_name"])).shape == (image["height"], image["width"], 3)
            annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
            assert isinstance(annotations[0]["segmentation"]["counts"], str)
            masks = np.stack([coco.annToMask(annotation) for annotation in annotations])
            assert masks.sum(axis=0).max() == 1
            for mask, annotation in zip(masks, annotations):
                assert mask.sum() == annotation["area"]
                assert cv2.boundingRect(mask) == tuple(annotation["bbox"])

    def test_panoptic_masks_agree_with_their_json_and_the_instances(self, root):
        annotations = root / "annotations"
        panoptic = json.loads((annotations / "panoptic_val.json").read_text())
        instances = COCO(str(annotations / "instances_val.json"))
        isthing = {category["id"]: category["isthing"] for category in panoptic["categories"]}
        assert list(isthing) == list(range(1, len(THINGS) + len(STUFF) + 1))
        for annotation in panoptic["annotations"]:
            colours = cv2.imread(str(annotations / "panoptic_val" / annotation["file_name"]))[..., ::-1].astype(int)
            ids = colours @ [1, 256, 65536]
            assert set(np.unique(ids)) == {segment["id"] for segment in annotation["segments_info"]}
            for segment in annotation["segments_info"]:
                mask = (ids == segment["id"]).astype(np.uint8)
                assert mask.sum() == segment["area"]
                assert cv2.boundingRect(mask) == tuple(segment["bbox"])
            things = [segment for segment in annotation["segments_info"] if isthing[segment["category_id"]]]
            stuff = [s["category_id"] for s in annotation["segments_info"] if not isthing[s["category_id"]]]
            assert 0 < len(stuff) == len(set(stuff))
            expected = instances.loadAnns(instances.getAnnIds(annotation["image_id"]))
            assert len(things) == len(expected)
            for segment, instance in zip(things, expected):
                assert segment["category_id"] == instance["category_id"]
                assert np.array_equal(ids == segment["id"], rle.decode(instance["segmentation"]))

    def test_a_second_call_draws_nothing(self, root):
        before = mtimes(root)
        write_demo(root, {"train": 3, "val": 6})
        assert mtimes(root) == before

    def test_another_number_is_drawn_anew(self, tmp_path):
        write_demo(tmp_path, {"val": 3})
        write_demo(tmp_path, {"val": 2})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["annotations", "val"]
        assert len(list((tmp_path / "val").iterdir())) == 2
        assert len(COCO(str(tmp_path / "annotations" / "instances_val.json")).imgs) == 2

    def test_an_interrupted_split_leaves_nothing(self, tmp_path, monkeypatch):
        def interrupt(scene_seed, *arguments):
            if scene_seed[-1] == 2:
                raise KeyboardInterrupt
            return draw_scene(scene_seed, *arguments)

        monkeypatch.setattr(writing, "draw_scene", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_demo(tmp_path, {"val": 4})
        assert list(tmp_path.iterdir()) == []

    def test_the_remains_of_a_split_are_replaced(self, root, tmp_path):
        (tmp_path / "val").mkdir()
        (tmp_path / "val" / "000000000009.jpg").write_bytes(b"")
        (tmp_path / "annotations").mkdir()
        (tmp_path / "annotations" / "instances_val.json").write_text("{")
        write_demo(tmp_path, {"train": 3, "val": 6})
        assert digests(tmp_path) == digests(root)

    def test_errors_name_the_argument(self, tmp_path):
        with pytest.raises(ValueError, match="seed"):
            write_demo(tmp_path, {"val": 1}, seed=-1)
        with pytest.raises(ValueError, match="0 for 'val'"):
            write_demo(tmp_path, {"val": 0})
        with pytest.raises(ValueError, match="workers"):
            write_demo(tmp_path, {"val": 1}, workers=0)


class TestRegisterDemo:
    @pytest.fixture(autouse=True)
    def few_images(self, monkeypatch):
        pytest.importorskip("hourglass.compat")
        self.catalog = pytest.importorskip("detectron2.data")
        monkeypatch.setitem(projects.demo.DEMO_IMAGES, "val", 2)
        yield
        for name in self.catalog.DatasetCatalog.list():
            if name.startswith("hourglass_demo_"):
                self.catalog.DatasetCatalog.remove(name)
                self.catalog.MetadataCatalog.remove(name)
        register_demo()

    def test_loads_lazily_from_detectron2s_folder(self, tmp_path, monkeypatch):
        for name in self.catalog.DatasetCatalog.list():
            if name.startswith("hourglass_demo_"):
                self.catalog.DatasetCatalog.remove(name)
        register_demo()
        register_demo()
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
        assert list(tmp_path.iterdir()) == []
        records = self.catalog.DatasetCatalog.get("hourglass_demo_val")
        assert len(records) == 2
        assert all(Path(record["file_name"]).is_file() for record in records)
        assert Path(records[0]["file_name"]).parent == tmp_path / "hourglass_demo" / "val"
        assert not (tmp_path / "hourglass_demo" / "train").exists()
        panoptic = self.catalog.DatasetCatalog.get("hourglass_demo_panoptic_val")
        assert Path(panoptic[0]["pan_seg_file_name"]).is_relative_to(tmp_path / "hourglass_demo")

    def test_coloured_scenes_lie_beside_the_others(self, tmp_path):
        register_demo(tmp_path)
        plain = self.catalog.DatasetCatalog.get("hourglass_demo_panoptic_val")
        coloured = self.catalog.DatasetCatalog.get("hourglass_demo_coloured_val")
        assert len(plain) == len(coloured) == 2
        for record, coloured_record in zip(plain, coloured):
            assert Path(coloured_record["file_name"]) == tmp_path / "coloured" / "val" / Path(record["file_name"]).name
            assert [i["bbox"] for i in record["annotations"]] == [i["bbox"] for i in coloured_record["annotations"]]
            images = (cv2.imread(image_record["file_name"]) for image_record in (record, coloured_record))
            assert not np.array_equal(*images)
        metadata = self.catalog.MetadataCatalog.get("hourglass_demo_coloured_val")
        assert metadata.stuff_classes == [*THINGS, *STUFF] and Path(metadata.json_file).is_file()

    def test_the_evaluator_works_before_the_data_is_loaded(self, tmp_path):
        evaluation = pytest.importorskip("detectron2.evaluation")
        register_demo(tmp_path)
        metadata = self.catalog.MetadataCatalog.get("hourglass_demo_val")
        assert metadata.thing_classes == list(THINGS) and metadata.evaluator_type == "coco"
        evaluation.COCOEvaluator("hourglass_demo_val", output_dir=None, use_fast_impl=False)
        assert (tmp_path / "annotations" / "instances_val.json").is_file()

    def test_the_panoptic_names_draw_nothing_before_they_are_asked_for(self, tmp_path):
        register_demo(tmp_path)
        metadata = self.catalog.MetadataCatalog.get("hourglass_demo_panoptic_val")
        assert metadata.thing_classes == list(THINGS) and metadata.stuff_classes == [*THINGS, *STUFF]
        assert metadata.thing_dataset_id_to_contiguous_id == {i + 1: i for i in range(len(THINGS))}
        assert metadata.stuff_dataset_id_to_contiguous_id == {i + 1: i for i in range(len(THINGS) + len(STUFF))}
        assert (metadata.label_divisor, metadata.ignore_label) == (1000, 255)
        assert metadata.evaluator_type == "coco_panoptic_seg"
        assert list(tmp_path.iterdir()) == []
        assert Path(metadata.panoptic_json).is_file() and Path(metadata.panoptic_root).is_dir()

    def test_instances_and_segments_are_in_one_record(self, tmp_path):
        register_demo(tmp_path)
        records = self.catalog.get_detection_dataset_dicts("hourglass_demo_panoptic_val", filter_empty=False)
        plain = self.catalog.DatasetCatalog.get("hourglass_demo_val")
        for record, expected in zip(records, plain):
            segments = record.pop("segments_info")
            ids = cv2.imread(record.pop("pan_seg_file_name"))[..., 2]
            assert record == expected
            assert {segment["id"] for segment in segments} == set(np.unique(ids))
            things = [segment["category_id"] for segment in segments if segment["isthing"]]
            assert things == [instance["category_id"] for instance in record["annotations"]]
            stuff = [segment["category_id"] for segment in segments if not segment["isthing"]]
            assert stuff and set(stuff) <= set(range(len(THINGS), len(THINGS) + len(STUFF)))

    def test_instance_ap_of_the_panoptic_name(self, tmp_path):
        evaluation = pytest.importorskip("detectron2.evaluation")
        register_demo(tmp_path)
        name = "hourglass_demo_panoptic_val"
        evaluator = evaluation.COCOEvaluator(name, tasks=("bbox",), use_fast_impl=False)
        evaluator.reset()
        for record in self.catalog.DatasetCatalog.get(name):
            evaluator.process([record], [{"instances": perfect(record)}])
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def perfect(record: dict):
    from detectron2.structures import Boxes, BoxMode, Instances

    truth = record["annotations"]
    boxes = [BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS) for annotation in truth]
    return Instances(
        (record["height"], record["width"]),
        pred_boxes=Boxes(boxes),
        pred_classes=torch.tensor([annotation["category_id"] for annotation in truth]),
        scores=torch.ones(len(truth)),
    )
