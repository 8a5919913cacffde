"""What opening a data set for a model refuses, and what it makes work."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, SemSegEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from pycocotools import mask as rle

from hourglass import InputError
from hourglass.data import PanopticMapper
from hourglass.data.opening import load_test, open_search, open_test, open_train, search_dataset, square_side
from hourglass.data.panoptic import register_panoptic
from hourglass.launch import CONFIGS, DEMO, build_evaluator, load_config

POLYGON = [4, 6, 14, 6, 14, 26, 4, 26]


def coco() -> dict:
    """Two images of 32 x 48, with an object each of two classes."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 32, "width": 48} for i in (1, 2)],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": i,
                "bbox": [4, 6, 10, 20],
                "area": 200,
                "iscrowd": 0,
                "segmentation": [POLYGON],
            }
            for i in (1, 2)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in (1, 2)],
    }


@pytest.fixture
def folder(tmp_path):
    for i in (1, 2):
        Image.new("RGB", (48, 32)).save(tmp_path / f"{i}.png")
    yield tmp_path
    for name in ("mine", "other"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)


def register(folder: Path, content: dict | None = None, name: str = "mine") -> None:
    (folder / f"{name}.json").write_text(json.dumps(coco() if content is None else content))
    register_coco_instances(name, {}, str(folder / f"{name}.json"), str(folder))


def records(folder: Path) -> list[dict]:
    """The same as a function gives it, without a JSON."""
    return [
        {
            "file_name": str(folder / f"{i}.png"),
            "image_id": i,
            "height": 32,
            "width": 48,
            "annotations": [
                {
                    "bbox": [4, 6, 14, 26],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": i - 1,
                    "segmentation": [POLYGON],
                }
            ],
        }
        for i in (1, 2)
    ]


def register_function(function, name: str = "mine") -> None:
    DatasetCatalog.register(name, function)
    MetadataCatalog.get(name).thing_classes = ["class 1", "class 2"]


SMALL = ["model.roi_heads.num_classes=2", "dataloader.test.num_workers=0", "dataloader.train.num_workers=0"]


def config(*overrides: str, file: Path = DEMO):
    names = [f"dataloader.{part}.dataset.names=mine" for part in ("test", "train")]
    return load_config(str(file), [*names, *(SMALL if file == DEMO else []), *overrides])


MODELS: dict = {}


def model_of(cfg):
    """Without weights; made once for all tests."""
    key = str(cfg.model)
    if key not in MODELS:
        with torch.device("meta"):
            MODELS[key] = instantiate(cfg.model)
    return MODELS[key]


def open_both(cfg):
    """The loader and its records."""
    records = open_test(cfg, model_of(cfg))
    return load_test(cfg, model_of(cfg), records), records


def test(*overrides: str, **options):
    return open_both(config(*overrides, **options))


def train(*overrides: str, **options):
    cfg = config(*overrides, **options)
    return open_train(cfg, model_of(cfg))


test.__test__ = False


def refusal(call, *overrides: str, **options) -> str:
    with pytest.raises(InputError) as refused:
        call(*overrides, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def score(cfg) -> dict:
    """What right predictions of all images score."""
    evaluator = build_evaluator(cfg)
    evaluator.reset()
    for record in get_detection_dataset_dicts(cfg.dataloader.test.dataset.names, filter_empty=False):
        instances = Instances((32, 48))
        instances.pred_boxes = Boxes(torch.tensor([[4.0, 6.0, 14.0, 26.0]]))
        instances.scores = torch.ones(1)
        instances.pred_classes = torch.tensor([record["annotations"][0]["category_id"]])
        instances.pred_masks = torch.zeros(1, 32, 48, dtype=torch.bool)
        instances.pred_masks[0, 6:26, 4:14] = True
        evaluator.process([record], [{"instances": instances}])
    return {task: figures["AP"] for task, figures in evaluator.evaluate().items()}


class TestNames:
    def test_a_list_of_one(self, folder):
        register(folder)
        cfg = config("dataloader.test.dataset.names=[mine]")
        assert len(open_test(cfg, model_of(cfg))) == 2
        assert score(cfg) == pytest.approx({"bbox": 100, "segm": 100})

    @pytest.mark.parametrize("names, first", [("[mine,other]", "mine"), ("[]", "my_val")])
    def test_a_list_of_others_is_refused_with_what_to_do(self, folder, names, first):
        register(folder)
        register(folder, name="other")
        line = refusal(test, f"dataloader.test.dataset.names={names}")
        assert "dataloader.test.dataset.names must be one data set, got [" in line
        assert line.endswith(f"run once for each, such as with dataloader.test.dataset.names={first}")

    def test_training_takes_several(self, folder):
        register(folder)
        register(folder, name="other")
        assert train("dataloader.train.dataset.names=[mine,other]") is not None


class TestRecords:
    def test_an_image_id_that_runs_twice(self, folder):
        register_function(lambda: records(folder) + records(folder))
        line = refusal(test)
        assert "2 of the 4 records of data set 'mine' have the image_id of another, such as 1 of" in line

    def test_records_without_image_id(self, folder):
        def without():
            second = {key: value for key, value in records(folder)[1].items() if key != "image_id"}
            return [records(folder)[0], second]

        register_function(without)
        line = refusal(test)
        assert f"1 of the 2 records of data set 'mine' have no image_id, such as number 1, {folder}/2.png" in line
        assert train() is not None  # which needs none

    @pytest.mark.parametrize("id", [[2], 2.5, {"id": 2}])
    def test_ids_of_other_types(self, folder, id):
        register_function(lambda: [records(folder)[0], {**records(folder)[1], "image_id": id}])
        line = refusal(test)
        assert "1 of the 2 records of data set 'mine' have an image_id that is neither a whole number nor text" in line

    def test_images_that_the_evaluators_json_lacks(self, folder):
        """A function that gives more than the JSON of its metadata has."""
        content = coco()
        content["images"], content["annotations"] = content["images"][:1], content["annotations"][:1]
        (folder / "part.json").write_text(json.dumps(content))
        register_function(lambda: records(folder))
        MetadataCatalog.get("mine").json_file = str(folder / "part.json")
        line = refusal(test)
        assert f"1 of the 2 images to be run are not in the instances JSON {folder}/part.json" in line
        assert "that dataloader.evaluator reads, such as 2 (" in line

    def test_an_evaluator_of_another_data_set(self, folder):
        register(folder)
        content = coco()
        for entry in content["images"] + content["annotations"]:
            entry["id"] += 10
        for entry in content["annotations"]:
            entry["image_id"] += 10
        register(folder, content, name="other")
        line = refusal(test, "dataloader.evaluator.dataset_name=other")
        assert "2 of the 2 images to be run are not in the instances JSON" in line and "other.json" in line

    def test_batches(self, folder):
        register(folder)
        cfg = config()
        cfg.dataloader.test.batch_size = 4
        with pytest.raises(InputError, match="dataloader.test.batch_size must be 1, as evaluation.batch_size sets"):
            open_test(cfg, model_of(cfg))
        cfg.dataloader.test.batch_size = 1  # which Detectron2 0.6 does not take
        assert len(open_test(cfg, model_of(cfg))) == 2

    @pytest.mark.parametrize("size, expected", [(1, [1, 1]), (2, [2]), (3, [2])])
    def test_batches_of_the_comparison(self, folder, size, expected):
        """Made of records, in their order, by any loader; the last one may have fewer."""
        register(folder)
        cfg = config()
        cfg.evaluation = {"batch_size": size}
        records = open_test(cfg, model_of(cfg))
        loader = load_test(cfg, model_of(cfg), records)
        batches = list(loader)
        assert [len(batch) for batch in batches] == expected and len(loader) == len(expected)
        assert [item["image_id"] for batch in batches for item in batch] == [item["image_id"] for item in records]
        assert all(item["image"].shape[0] == 3 for batch in batches for item in batch)

    def test_an_argument_that_the_loader_does_not_take(self, folder):
        register(folder)
        cfg = config()
        cfg.dataloader.test.total_batch_size = 4
        with pytest.raises(InputError, match="the loader of data set 'mine' cannot be built .*total_batch_size"):
            open_both(cfg)


class TestImages:
    @pytest.mark.parametrize("call", [test, train], ids=["test", "train"])
    def test_another_size_than_annotated(self, folder, call):
        register(folder)
        Image.new("RGB", (47, 32)).save(folder / "2.png")
        line = refusal(call)
        assert (
            "1 of the 2 images of data set 'mine' have another size than their annotation says, such as image 2" in line
        )
        assert "2.png is 32 x 47 pixels, annotated is 32 x 48 (height x width)" in line

    @pytest.mark.parametrize("suffix", ["png", "jpg"])
    def test_exif_rotation_is_said(self, folder, suffix):
        content = coco()
        content["images"][1]["file_name"] = f"turned.{suffix}"
        register(folder, content)
        exif = Image.Exif()
        exif[274] = 6
        Image.new("RGB", (48, 32)).save(folder / f"turned.{suffix}", exif=exif)
        line = refusal(test)
        assert "is 48 x 32 pixels upright (its EXIF orientation 6 turns 32 x 48, as which it was annotated)" in line
        # Annotated upright it is right.
        content["images"][1].update(height=48, width=32)
        (folder / "mine.json").write_text(json.dumps(content))
        assert len(test()[1]) == 2

    def test_values_of_other_types(self, folder):
        content = coco()
        content["images"][1]["file_name"] = "float.tif"
        register(folder, content)
        Image.fromarray(np.zeros((32, 48), np.float32)).save(folder / "float.tif")
        line = refusal(test)
        assert "1 of the 2 images of data set 'mine' cannot be read, such as" in line
        assert "float.tif, which is of Pillow's mode 'F' (TIFF): values must be of 8 or 16 bits without sign" in line

    def test_remote_images_are_left_to_the_loader(self, folder):
        def remote():
            return [{**record, "file_name": f"http://localhost/{record['image_id']}.png"} for record in records(folder)]

        register_function(remote)
        assert len(test()[1]) == 2

    def test_16_bits_are_scaled_as_the_switch_says(self, folder):
        register(folder)
        pixels = np.arange(32 * 48, dtype=np.uint16).reshape(32, 48) % 256
        Image.fromarray(pixels * 16).save(folder / "1.png")
        assert [
            next(iter(test(f"dataloader.image_scaling={scaling}")[0]))[0]["image"].max()
            for scaling in ("full", "percentiles")
        ] == [16, 255]
        assert "dataloader.image_scaling must be 'full' or 'percentiles', got 'max'" in refusal(
            test, "dataloader.image_scaling=max"
        )

    def test_an_image_larger_than_the_square(self, folder):
        register(folder)
        line = refusal(test, "model.backbone.square_pad=40")
        assert "1.png is 32 x 48 pixels for the model, whose model.backbone.square_pad is 40: resize" in line
        assert test("model.backbone.square_pad=48") and test("model.backbone.square_pad=0")

    def test_the_square_is_of_what_the_mapper_makes(self, folder):
        register(folder)
        cfg = config("model.backbone.square_pad=64")
        model = model_of(cfg)
        assert square_side(model) == 64
        cfg.dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=64, max_size=80)]
        with pytest.raises(InputError, match="1.png is 53 x 80 pixels for the model, .*square_pad is 64"):
            open_test(cfg, model)
        cfg.dataloader.test.mapper.augmentations[0].max_size = 64
        assert open_test(cfg, model)


class TestInstances:
    @pytest.mark.parametrize("call", [test, train], ids=["test", "train"])
    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"category_id": "2"}, "1 annotations of 2 whose category_id is not a whole number, such as annotation 2"),
            ({"bbox": [4, float("nan"), 10, 20]}, "1 annotations of 2 whose bbox is not"),
            ({"area": -1}, "1 annotations of 2 whose area is not a number of at least 0, such as annotation 2"),
            ({"segmentation": {"size": [48, 32], "counts": [48 * 32]}}, "whose RLE has the size (width, height)"),
        ],
    )
    def test_bad_values(self, folder, call, changes, message):
        content = coco()
        content["annotations"][1].update(changes)
        register(folder, content)
        line = refusal(call)
        assert f"instances JSON {folder}/mine.json" in line and message in line

    @pytest.mark.parametrize("lost", [{"iscrowd"}, {"area"}, {"bbox"}, {"id"}, {"iscrowd", "area", "id", "bbox"}])
    def test_the_evaluator_reads_what_was_mended(self, folder, lost, caplog):
        content = coco()
        content["annotations"] = [
            {key: value for key, value in entry.items() if key not in lost} for entry in content["annotations"]
        ]
        register(folder, content)
        cfg = config()
        open_test(cfg, model_of(cfg))
        assert score(cfg) == pytest.approx({"bbox": 100, "segm": 100})
        assert len([record for record in caplog.records if record.name.startswith("hourglass")]) == len(lost)
        assert json.loads((folder / "mine.json").read_text()) == content

    def test_tasks_that_the_data_do_not_have(self, folder):
        content = coco()
        del content["annotations"][1]["segmentation"]
        register(folder, content)
        line = refusal(test)
        assert "dataloader.evaluator.tasks has 'segm', but 1 of the 2 annotations of the instances JSON" in line
        assert "have no mask, such as annotation 2: 'dataloader.evaluator.tasks=[bbox]' leaves segm out" in line
        cfg = config("dataloader.evaluator.tasks=[bbox]")
        open_test(cfg, model_of(cfg))
        assert score(cfg) == pytest.approx({"bbox": 100})

    def test_tasks_that_the_model_does_not_have(self, folder):
        register(folder)
        boxes = "model.roi_heads.mask_in_features=null"
        line = refusal(test, boxes)
        assert line == (
            "dataloader.evaluator.tasks has 'segm', but the model gives no masks: "
            "'dataloader.evaluator.tasks=[bbox]' leaves segm out"
        )
        assert test(boxes, "dataloader.evaluator.tasks=[bbox]")
        assert "the model gives no keypoints: 'dataloader.evaluator.tasks=[bbox]'" in refusal(
            test, "dataloader.evaluator.tasks=[bbox,keypoints]"
        )
        assert "tasks must be bbox, segm or keypoints, got 'masks'" in refusal(
            test, "dataloader.evaluator.tasks=[masks]"
        )

    def test_detectron2s_own_evaluator_in_a_list(self, folder):
        content = coco()
        for entry in content["annotations"]:
            del entry["segmentation"]
        register(folder, content)
        cfg = config()
        cfg.dataloader.evaluator = [
            L(COCOEvaluator)(dataset_name="${...test.dataset.names}", tasks=(task,), use_fast_impl=False)
            for task in ("bbox", "segm")
        ]
        with pytest.raises(InputError, match=r"'dataloader.evaluator.1.tasks=\[bbox\]' leaves segm out"):
            open_test(cfg, model_of(cfg))

    def test_nothing_to_evaluate_against(self, folder):
        register(folder, {**coco(), "annotations": []})
        assert "has no annotation to evaluate against" in refusal(test)


class TestClasses:
    def test_of_another_number(self, folder):
        register(folder)
        for call in (test, train):
            line = refusal(call, "model.roi_heads.num_classes=10")
            assert "the model has 10 classes of things (model.roi_heads.num_classes), data set 'mine' has 2: " in line
            assert "model.roi_heads.num_classes=2 fits it" in line
        # The heads' own numbers, too.
        line = refusal(test, "model.roi_heads.box_predictor.num_classes=3")
        assert "the model has 3 classes of things (model.roi_heads.box_predictor.num_classes)" in line

    def test_of_a_cascade(self, folder):
        register(folder)
        cfg = config(file=CONFIGS / "vitdet" / "cascade_mask_rcnn_b.py")
        line = refusal(lambda: open_test(cfg, model_of(cfg)))
        assert "the model has 80 classes of things (model.roi_heads.num_classes), data set 'mine' has 2" in line

    def test_annotations_of_data_without_names(self, folder):
        """Detectron2 takes the class after the last for background."""

        def strange():
            second = records(folder)[1]
            second["annotations"][0]["category_id"] = 2
            return [records(folder)[0], second]

        DatasetCatalog.register("mine", strange)
        line = refusal(train)
        assert (
            "image 2 (" in line and "has an annotation of the category_id 2, the model has the classes 0 to 1" in line
        )


PANOPTIC = CONFIGS / "demo" / "mask2former_panoptic.py"
PANOPTIC_SMALL = ["model.num_classes=3", "model.things=[0,1]", "dataloader.test.num_workers=0"]


@pytest.fixture
def panoptic(folder):
    """Two things and a stuff."""
    (folder / "png").mkdir()
    ids = np.full((32, 48), 9)
    ids[6:26, 4:14] = 5
    Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], -1).astype(np.uint8)).save(folder / "png" / "1.png")
    Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], -1).astype(np.uint8)).save(folder / "png" / "2.png")
    segments = [{"id": 5, "category_id": 1, "iscrowd": 0}, {"id": 9, "category_id": 3, "iscrowd": 0}]
    content = {
        "images": coco()["images"],
        "annotations": [{"image_id": i, "file_name": f"{i}.png", "segments_info": segments} for i in (1, 2)],
        "categories": [
            *({**category, "isthing": 1} for category in coco()["categories"]),
            {"id": 3, "name": "sky", "isthing": 0},
        ],
    }
    (folder / "panoptic.json").write_text(json.dumps(content))
    (folder / "instances.json").write_text(json.dumps(coco()))
    register_panoptic("mine", folder, folder / "panoptic.json", folder / "png", folder / "instances.json")
    return folder


class TestPanoptic:
    def test_is_opened(self, panoptic):
        assert len(test(*PANOPTIC_SMALL, file=PANOPTIC)[1]) == 2
        assert train(*PANOPTIC_SMALL, file=PANOPTIC) is not None

    @pytest.mark.parametrize("call", [test, train], ids=["test", "train"])
    def test_other_classes(self, panoptic, call):
        line = refusal(call, *PANOPTIC_SMALL, "model.num_classes=4", file=PANOPTIC)
        assert "the model has 4 classes of things and stuff (model.num_classes), data set 'mine' has 3" in line
        line = refusal(call, *PANOPTIC_SMALL, "model.things=[0,2]", file=PANOPTIC)
        assert "the model's things are the classes [0, 2] (model.things), those of data set 'mine' are 0 to 1" in line

    def test_what_the_model_does_not_give(self, panoptic):
        line = refusal(test, *PANOPTIC_SMALL, "model.panoptic_on=false", file=PANOPTIC)
        assert line.startswith("dataloader.evaluator.0 evaluates what the model does not give, as model.panoptic_on is")
        line = refusal(test, *PANOPTIC_SMALL, "model.instance_on=false", file=PANOPTIC)
        assert line.startswith("dataloader.evaluator.1 ") and "model.instance_on=true" in line

    def test_an_image_that_the_instances_lack(self, panoptic):
        """It would have run, and its objects would not have counted."""
        content = coco()
        content["images"], content["annotations"] = content["images"][:1], content["annotations"][:1]
        (panoptic / "instances.json").write_text(json.dumps(content))
        line = refusal(test, *PANOPTIC_SMALL, file=PANOPTIC)
        assert "1 of the 2 images to be run are not in the instances JSON" in line
        assert "dataloader.evaluator.1 reads, such as 2 (" in line

    def test_classes_of_pixels(self, panoptic):
        cfg = config(file=CONFIGS / "nuclei" / "vitdet.py")
        cfg.model.roi_heads.num_classes = 2
        model = model_of(cfg)
        with pytest.raises(InputError, match=r"has 2 classes of pixels \(model.sem_seg_head.num_classes\), .* has 3"):
            open_train(cfg, model)
        cfg.model.sem_seg_head.num_classes = 3
        assert open_train(cfg, model_of(cfg)) is not None

    def test_a_semantic_model(self, panoptic):
        (panoptic / "semantic").mkdir()
        MetadataCatalog.get("mine").sem_seg_root = str(panoptic / "semantic")
        for i in (1, 2):
            Image.new("L", (48, 32)).save(panoptic / "semantic" / f"{i}.png")
        cfg = config(file=CONFIGS / "demo" / "swin_semantic.py")
        cfg.dataloader.evaluator = L(SemSegEvaluator)(dataset_name="mine")
        with pytest.raises(InputError, match=r"16 classes of pixels \(model.sem_seg_head.num_classes\), .* has 3"):
            open_test(cfg, model_of(cfg))


class TestFunctions:
    """Data sets without a JSON."""

    def test_are_evaluated(self, folder):
        register_function(lambda: records(folder))
        cfg = config()
        assert len(open_test(cfg, model_of(cfg))) == 2
        assert score(cfg) == pytest.approx({"bbox": 100, "segm": 100})

    def test_what_was_written_before_is_not_believed(self, folder, tmp_path):
        """Detectron2's evaluator would go on reading the first file that it wrote to its output_dir."""
        share = []

        def function():
            listed = records(folder)
            for record in listed:
                record["annotations"] *= len(share) + 1
            return listed

        register_function(function)
        cfg = config(f"+dataloader.evaluator.output_dir={tmp_path}/out".removeprefix("+"))
        scores = []
        for _ in range(2):
            open_test(cfg, model_of(cfg))
            scores.append(score(cfg)["bbox"])
            share.append(1)
        # Then one of two objects at the same place is found.
        assert scores[0] == pytest.approx(100) and scores[1] == pytest.approx(51 / 101 * 100)

    def test_numbers_of_numpy(self, folder):
        def function():
            listed = records(folder)
            for record in listed:
                record["image_id"] = np.int64(record["image_id"])
                record["annotations"][0]["bbox"] = np.array([4.0, 6.0, 14.0, 26.0])
                mask = np.zeros((32, 48), np.uint8, order="F")
                mask[6:26, 4:14] = 1
                record["annotations"][0]["segmentation"] = rle.encode(mask)
            return listed

        register_function(function)
        cfg = config()
        opened = open_test(cfg, model_of(cfg))
        assert [type(record["image_id"]) for record in opened] == [int, int]
        assert score(cfg) == pytest.approx({"bbox": 100, "segm": 100})

    @pytest.mark.parametrize("key", ["height", "width"])
    def test_without_a_size(self, folder, key):
        register_function(
            lambda: [{name: value for name, value in record.items() if name != key} for record in records(folder)]
        )
        assert f"image 1 of data set 'mine' has no {key}" in refusal(test)

    def test_without_names_of_classes(self, folder):
        DatasetCatalog.register("mine", lambda: records(folder))
        line = refusal(test)
        assert "data set 'mine' has neither a json_file nor thing_classes in its metadata" in line
        assert "MetadataCatalog.get('mine').thing_classes = [...]" in line

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"bbox": [4, 6, float("nan"), 26]}, "instances JSON of data set 'mine' has 1 annotations of 1 whose bbox"),
            ({"bbox_mode": None}, "data set 'mine' cannot be converted to COCO's format"),
            ({"category_id": 5}, "data set 'mine' cannot be loaded (AssertionError: Got an invalid category_id=5"),
        ],
    )
    def test_with_bad_values(self, folder, change, message):
        def function():
            listed = records(folder)[:1]
            listed[0]["annotations"][0].update(change)
            return listed

        register_function(function)
        assert message in refusal(test)


class TestTrainingMasks:
    @pytest.mark.parametrize("source", ["file", "function"])
    def test_rle_where_the_mapper_takes_polygons(self, folder, source):
        mask = {"size": [32, 48], "counts": [6, 20, 32 * 48 - 26]}
        if source == "file":
            content = coco()
            content["annotations"][1]["segmentation"] = mask
            register(folder, content)
        else:
            listed = records(folder)
            listed[1]["annotations"][0]["segmentation"] = rle.frPyObjects(mask, 32, 48)
            register_function(lambda: listed)
        line = refusal(train, "dataloader.train.mapper.instance_mask_format=polygon")
        assert f"1 of the 2 objects to be trained on have masks as RLE, such as one of image 2 ({folder}/2.png)" in line
        assert "dataloader.train.mapper.instance_mask_format=bitmask takes both" in line

    @pytest.mark.parametrize("form", ["polygon", "bitmask"])
    def test_polygons_go_with_both(self, folder, form):
        register(folder)
        loader = train(f"dataloader.train.mapper.instance_mask_format={form}", "dataloader.train.total_batch_size=1")
        assert len(next(iter(loader))[0]["instances"].gt_masks) == 1

    def test_no_masks(self, folder):
        content = coco()
        del content["annotations"][0]["segmentation"]
        register(folder, content)
        line = refusal(train)
        assert f"1 of the 2 objects to be trained on have no mask, such as one of image 1 ({folder}/1.png)" in line
        overrides = line.split(": ")[-1].removesuffix(" train boxes alone").split()
        assert train(*overrides) is not None  # what it says works

    def test_no_masks_for_a_model_that_learns_them(self, folder):
        register(folder)
        line = refusal(train, "dataloader.train.mapper.use_instance_mask=false")
        assert "the model learns masks, which dataloader.train.mapper does not give" in line

    def test_a_panoptic_mapper_is_left_alone(self, panoptic):
        cfg = config()
        cfg.dataloader.train.mapper = L(PanopticMapper)(augmentations=[], stuff=False)
        assert open_train(cfg, model_of(cfg)) is not None


class TestSearchImages:
    def test_they_are_the_training_images_unless_named(self, folder):
        register(folder)
        register(folder, name="other")
        for overrides, name in ((["search.dataset=null"], "mine"), (["search.dataset=other"], "other")):
            cfg = config(*overrides)
            assert search_dataset(cfg) == name and len(open_search(cfg, model_of(cfg))) == 2

    def test_each_process_gets_all_of_them(self, folder, monkeypatch):
        """What is fitted to them is one calibration, not another one in each process."""
        register(folder)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
        cfg = config("search.dataset=null")
        assert len(list(open_search(cfg, model_of(cfg)))) == 2

    def test_a_config_that_names_none(self):
        cfg = config("search.dataset=null")
        del cfg.dataloader["train"]
        for of_config in (search_dataset, lambda cfg: open_search(cfg, model_of(cfg))):
            with pytest.raises(InputError, match="search.dataset must be the name of a data set where there is no"):
                of_config(cfg)
