"""The command on data of a user's own."""

import json

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from projects.demo import write_demo
from tests.commands import read, refusal, run
from tests.models import UNTRAINED

pytestmark = pytest.mark.usefixtures("handlers")


@pytest.fixture
def two_images(tmp_path):
    """Two scenes of the demo: a folder for its images, and its annotations."""
    write_demo(tmp_path, {"val": 2})
    names = []

    def register(name: str, content: dict, deep: bool = False) -> None:
        folder = tmp_path / name
        folder.mkdir()
        content = json.loads(json.dumps(content))
        for image in content["images"]:
            pixels = cv2.imread(str(tmp_path / "val" / image["file_name"]))
            image["file_name"] = image["file_name"].replace(".jpg", ".png")
            cv2.imwrite(str(folder / image["file_name"]), pixels.astype(np.uint16) * 257 if deep else pixels)
        (folder / "instances.json").write_text(json.dumps(content))
        register_coco_instances(name, {}, str(folder / "instances.json"), str(folder))
        names.append(name)

    yield register, json.loads((tmp_path / "annotations" / "instances_val.json").read_text())
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_16_bits_and_mended_annotations_give_the_same_figures(two_images, tmp_path, caplog):
    register, content = two_images
    register("plain", content)
    for annotation in content["annotations"]:
        del annotation["iscrowd"], annotation["area"], annotation["bbox"]
    for i, annotation in enumerate(content["annotations"]):
        annotation["id"] = i
    register("bare", content, deep=True)
    accuracy = []
    for name in ("plain", "bare"):
        run(
            "--eval-only",
            "--only=unmodified",
            f"train.output_dir={tmp_path}/out",
            f"dataloader.test.dataset.names={name}",
            "dataloader.test.num_workers=0",
            "evaluation.warmup=0",
        )
        accuracy.append(read(tmp_path / "out")["models"]["unmodified"]["accuracy"])
    assert accuracy[0]["bbox"]["AP"] > 20 and accuracy[0]["segm"]["AP"] > 20
    for task, figures in accuracy[0].items():
        assert accuracy[1][task] == pytest.approx(figures, nan_ok=True)
    for problem in ("no iscrowd", "no area", "no bbox", "ids that are not whole numbers over 0"):
        assert len([line for line in caplog.messages if f"annotations have {problem}, such as" in line]) == 1


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_wrong_annotations_end_with_one_line_before_anything_is_written(two_images, tmp_path, capsys, training):
    register, content = two_images
    content["annotations"][3]["category_id"] = "1"
    register("wrong", content)
    part = "train" if training else "test"
    overrides = [*UNTRAINED, f"train.output_dir={tmp_path}/out", "dataloader.train.num_workers=0"]
    if training:  # evaluation's own is right
        content["annotations"][3]["category_id"] = 1
        register("right", content)
        overrides.append("dataloader.test.dataset.names=right")
    line = refusal(capsys, *([] if training else ["--eval-only"]), *overrides, f"dataloader.{part}.dataset.names=wrong")
    assert f"instances JSON {tmp_path}/wrong/instances.json has 1 annotations of {len(content['annotations'])}" in line
    assert f"such as annotation {content['annotations'][3]['id']} of image" in line and "which has '1'" in line
    assert not (tmp_path / "out").exists()


def test_a_model_of_other_classes_is_refused(two_images, tmp_path, capsys):
    register, content = two_images
    content["categories"].append({"id": 11, "name": "eleventh"})
    register("eleven", content)
    line = refusal(
        capsys, "--eval-only", *UNTRAINED, "dataloader.test.dataset.names=eleven", f"train.output_dir={tmp_path}/out"
    )
    assert "the model has 10 classes of things (model.roi_heads.num_classes), data set 'eleven' has 11" in line
    assert not (tmp_path / "out").exists()
