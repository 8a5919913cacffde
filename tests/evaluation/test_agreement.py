"""Agreement of a model's outputs with another's, on outputs that are drawn."""

import zlib
from functools import partial

import msgpack
import numpy as np
import pytest
import torch

from hourglass import InputError
from hourglass.evaluation.agreement import OutputRecorder, _Map, agreement, recording
from hourglass.evaluation.journal import _describe_evaluator, members
from hourglass.evaluation.resampling import draw_samples
from tests.models import detector_output

SIZE = (60, 80)
instances = partial(detector_output, SIZE)


def recorder(*outputs: dict) -> OutputRecorder:
    recorder = OutputRecorder()
    for i, output in enumerate(outputs):
        recorder.process([{"image_id": i}], [output])
    return recorder


def compared(first: list[dict], second: list[dict], **options) -> dict[str, np.ndarray]:
    ids = range(len(first))
    return agreement(recorder(*first), recorder(*second), ids, draw_samples(len(first), 20), **options)


BOXES = [[2, 2, 20, 20], [30, 10, 60, 40], [5, 30, 25, 55]]
FIRST = instances(BOXES, [0.9, 0.8, 0.3], [0, 1, 0])


@pytest.mark.parametrize("masks", [True, False])
def test_what_agrees_is_found_again(masks):
    first = instances(BOXES, [0.9, 0.8, 0.3], [0, 1, 0], masks)
    figures = compared([first, first], [first, first])
    assert set(figures) == ({"bbox.AP", "segm.AP"} if masks else {"bbox.AP"})
    for samples in figures.values():
        np.testing.assert_allclose(samples, 100)


def test_only_what_the_first_model_is_sure_of_counts():
    """The one at 0.3 is not missed, and finding it costs nothing where it is found last."""
    for second in (instances(BOXES[:2], [0.5, 0.4], [0, 1]), instances(BOXES, [0.9, 0.8, 0.3], [0, 1, 0])):
        assert compared([FIRST], [second])["segm.AP"][0] == pytest.approx(100)
    missed = instances(BOXES[:1], [0.9], [0])
    assert compared([FIRST], [missed])["segm.AP"][0] == pytest.approx(50)  # one of two classes
    assert compared([FIRST], [missed], score=0.85)["segm.AP"][0] == pytest.approx(100)


def test_a_moved_box_a_wrong_class_and_nothing_at_all_agree_less():
    moved = instances([[3, 2, 21, 20], *BOXES[1:]], [0.9, 0.8, 0.3], [0, 1, 0])
    wrong = instances(BOXES, [0.9, 0.8, 0.3], [1, 1, 0])
    nothing = instances([], [], [])
    nothing["instances"].pred_masks = torch.zeros(0, *SIZE, dtype=torch.bool)
    figures = [float(compared([FIRST], [second])["segm.AP"][0]) for second in (FIRST, moved, wrong, nothing)]
    assert 100 == pytest.approx(figures[0]) and figures == sorted(figures, reverse=True)
    assert figures[1] > 80 and figures[3] == 0
    assert np.isnan(compared([nothing], [FIRST])["segm.AP"][0])


def test_without_a_limit_all_detections_count():
    """As of images without labels: crowded ones have more than COCO's 100 of a class."""
    boxes = [[4 * (i % 20), 4 * (i // 20), 4 * (i % 20) + 3, 4 * (i // 20) + 3] for i in range(120)]
    crowded = instances(boxes, [0.9 - 0.001 * i for i in range(120)], [0] * 120, False)
    (of_all,), (_, limited) = (members(recording(evaluators)) for evaluators in ([], [OutputRecorder(100)]))
    for recorder in (of_all, limited):
        recorder.process([{"image_id": 0}], [crowded])
    assert agreement(of_all, of_all, [0], draw_samples(1))["bbox.AP"][0] == pytest.approx(100)
    assert agreement(limited, limited, [0], draw_samples(1))["bbox.AP"][0] < 90


def test_a_journal_tells_recorders_that_keep_less_from_others():
    names = [_describe_evaluator(OutputRecorder(lowest=lowest)) for lowest in (0.0, 0.25)]
    assert names == ["OutputRecorder", "OutputRecorder over 0.25"]


def test_panoptic_segments_agree_as_panoptic_quality_says():
    segments = torch.zeros(SIZE, dtype=torch.int32)
    segments[:, :40], segments[:, 40:] = 1, 2
    info = [{"id": 1, "category_id": 0, "isthing": True}, {"id": 2, "category_id": 0, "isthing": False}]
    first = {"panoptic_seg": (segments, info)}
    np.testing.assert_allclose(compared([first], [first])["panoptic_seg.PQ"], 100)
    smaller = segments.clone()
    smaller[:, 36:40] = 2
    second = compared([first], [{"panoptic_seg": (smaller, info)}])["panoptic_seg.PQ"][0]
    assert second == pytest.approx(100 * (36 / 40 + 40 / 44) / 2)
    swapped = [{**segment, "isthing": not segment["isthing"]} for segment in info]
    assert compared([first], [{"panoptic_seg": (segments, swapped)}])["panoptic_seg.PQ"][0] == 0


def test_classes_of_pixels_agree_as_iou_says():
    scores = torch.zeros(3, *SIZE)
    scores[0, :, :40], scores[2, :, 40:] = 1, 1
    second = scores.clone()
    second[1, :, 60:] = 2
    assert compared([{"sem_seg": scores}], [{"sem_seg": scores}])["sem_seg.mIoU"][0] == pytest.approx(100)
    assert compared([{"sem_seg": scores}], [{"sem_seg": second}])["sem_seg.mIoU"][0] == pytest.approx(75)


def test_samples_are_those_of_the_images():
    bad = instances(BOXES[:1], [0.9], [0])
    first, second = recorder(FIRST, FIRST, FIRST), recorder(FIRST, bad, FIRST)
    weights = draw_samples(3, 50)
    samples = agreement(first, second, range(3), weights)["bbox.AP"]
    for weight, sample in zip(weights, samples):
        drawn = [i for i in range(3) for _ in range(weight[i])]
        again = recorder(*([FIRST] * 3)), recorder(*[(FIRST, bad, FIRST)[i] for i in drawn])
        assert sample == pytest.approx(agreement(*again, range(3), np.ones((1, 3), int))["bbox.AP"][0])


def test_what_was_kept_comes_back_from_a_journal():
    segments = torch.zeros(SIZE, dtype=torch.int32)
    segments[:, 40:] = 3
    output = {
        **FIRST,
        "panoptic_seg": (segments, [{"id": 3, "category_id": 1, "isthing": True}]),
        "sem_seg": torch.rand(3, *SIZE),
    }
    first, again = recorder(output, output), OutputRecorder()
    for i in range(2):
        record = msgpack.unpackb(msgpack.packb(first.dump(i)))
        again.restore(i, record)
    figures = agreement(first, again, [0, 1], draw_samples(2))
    assert set(figures) == {"bbox.AP", "segm.AP", "panoptic_seg.PQ", "sem_seg.mIoU"}
    for samples in figures.values():
        np.testing.assert_allclose(samples, 100)


@pytest.mark.parametrize("lowest, largest, width", [(0, 255, 1), (0, 256, 2), (0, 65536, 4), (-1, 3, 4)])
def test_a_map_is_kept_in_as_few_bytes_as_its_values_take(lowest, largest, width):
    values = torch.arange(6).view(2, 3)
    values[0, 0], values[1, 2] = lowest, largest
    kept = _Map.from_tensor(values)
    assert len(zlib.decompress(kept.content)) == 6 * width
    assert kept.read().dtype == np.int32 and kept.read().tolist() == values.tolist()


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match="second model did not run on 1 images, such as 1"):
        agreement(recorder(FIRST, FIRST), recorder(FIRST), [0, 1], draw_samples(2))
    with pytest.raises(InputError, match="score must be a number from 0 to 1, got 1.5"):
        compared([FIRST], [FIRST], score=1.5)
    assert compared([FIRST], [{"sem_seg": torch.zeros(2, *SIZE)}]) == {}
