import importlib.util
import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools.cocoeval import COCOeval

without_extension = pytest.mark.skipif(
    importlib.util.find_spec("detectron2._C") is not None, reason="this Detectron2 has its compiled extension"
)


@without_extension
def test_who_tries_to_import_the_extension_learns_that_it_is_missing():
    with pytest.raises(ImportError):
        from detectron2 import _C  # noqa: F401
    with pytest.raises(ImportError):
        import detectron2._C  # noqa: F401


@without_extension
def test_the_fast_evaluation_is_pycocotools_own():
    """As Detectron2's main branch asks for it, and what its COCOEvaluator compares with to fall back."""
    try:
        from detectron2.evaluation.fast_eval_api import COCOeval_opt
    except ImportError:
        COCOeval_opt = COCOeval
    assert COCOeval_opt is COCOeval


@without_extension
def test_layers_that_need_the_extension_say_so():
    from detectron2.layers import ROIAlignRotated

    layer = ROIAlignRotated(2, 1.0, 1)  # importable, as everything else in detectron2.layers
    with pytest.raises((ImportError, AttributeError, RuntimeError), match="roi_align_rotated"):
        layer(torch.zeros(1, 1, 4, 4), torch.zeros(1, 6))


@pytest.fixture
def dataset(tmp_path):
    """One image with a box of 8 x 8 and one of 4 x 4."""
    boxes = [[2, 2, 8, 8], [16, 16, 4, 4]]
    content = {
        "info": {},
        "images": [{"id": 1, "file_name": "1.png", "width": 32, "height": 32}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    register_coco_instances("compat_boxes", {}, str(tmp_path / "boxes.json"), str(tmp_path))
    DatasetCatalog.get("compat_boxes")  # which sets what its metadata says of the classes
    yield "compat_boxes"
    DatasetCatalog.remove("compat_boxes")
    MetadataCatalog.remove("compat_boxes")


def test_detectron2s_evaluator_runs_as_it_is_by_default(dataset):
    evaluator = COCOEvaluator(dataset, tasks=("bbox",), distributed=False)
    instances = Instances((32, 32))
    instances.pred_boxes = Boxes(torch.tensor([[2.0, 2, 10, 10]]))  # one of the two
    instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    # 51 of the 101 recall thresholds.
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100 * 51 / 101)
