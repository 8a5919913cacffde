"""``hourglass.Predictor``: what evaluation would find, of images as they are."""

import copy
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

import hourglass
import projects.demo
from hourglass import InputError, Plan
from hourglass.data.opening import load_test, open_test
from hourglass.encoders import find_encoder
from hourglass.launch import DEMO, load_config
from hourglass.report import tokens
from hourglass.report.tokens import find_tokens


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two of the demo's, as files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path_factory.mktemp("datasets")))
        patch.setitem(projects.demo.DEMO_IMAGES, "val", 2)
        cfg = load_config(str(DEMO), ["dataloader.test.num_workers=0"])
        predictor = hourglass.Predictor(cfg)
        records = open_test(cfg, predictor.model, 2)
        yield [record["file_name"] for record in records], list(load_test(cfg, predictor.model, records)), predictor


def test_it_finds_what_evaluation_finds(images):
    paths, batches, predictor = images
    read = [cv2.imread(path) for path in paths]
    with torch.no_grad():
        expected = [predictor.model(batch)[0]["instances"] for batch in batches]
    alone = [predictor(image)["instances"] for image in read]
    together = [output["instances"] for output in predictor(read)]
    for (loaded,), image in zip(batches, read):
        assert torch.equal(predictor.prepare(image)["image"], loaded["image"])
    for single, batched, truth in zip(alone, together, expected):
        assert len(truth) > 3 and torch.equal(single.pred_boxes.tensor, truth.pred_boxes.tensor)
        assert torch.equal(single.scores, truth.scores) and torch.equal(single.pred_masks, truth.pred_masks)
        torch.testing.assert_close(batched.scores, truth.scores, rtol=1e-4, atol=1e-4)
    assert predictor([]) == []
    unmodified = predictor.unmodified()
    assert find_encoder(unmodified.model)[1].plan.reducer is None and predictor.plan.reducer is not None
    assert unmodified.model.roi_heads is predictor.model.roi_heads
    assert not torch.equal(unmodified(read[0])["instances"].scores, alone[0].scores)


def test_another_plan_and_pictures(images):
    paths, _, predictor = images
    image = cv2.imread(paths[0])
    fast = predictor.under(Plan(attention="fast"))
    assert find_encoder(fast.model)[1].plan.fast and find_encoder(predictor.model)[1].plan.reducer is not None
    assert fast.model.roi_heads is predictor.model.roi_heads
    with pytest.raises(InputError, match="start 8"):
        predictor.under(Plan(hourglass.TokenClustering((8, 8)), 8))

    plain, found = fast(image), predictor(image)
    drawn = predictor.draw(image, found, score=0.3, reference=plain)
    assert drawn.shape == (800, 800, 3) and drawn.dtype == np.uint8
    resized = cv2.resize(image, (800, 800))
    nothing = predictor.draw(image, found, score=1.0)
    assert np.abs(nothing.astype(int) - resized).mean() < 2 < np.abs(drawn.astype(int) - resized).mean()

    tokens = predictor.draw_tokens(image)
    assert tokens.shape == (800, 800, 3)
    # Windows of 16 tokens of 8 pixels have borders, drawn in orange.
    assert (tokens[:, 200] == (0, 120, 255)).all(axis=1).mean() > 0.9
    with pytest.raises(InputError, match="a predictor whose plan has a reducer, got Plan"):
        fast.draw_tokens(image)


def test_the_mappers_augmentations_and_format(images):
    *_, predictor = images
    cfg = load_config(str(DEMO), ["train.init_checkpoint="])
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    rgb = predictor.prepare(image)["image"]
    assert np.array_equal(rgb.numpy(), image[:, :, ::-1].transpose(2, 0, 1))
    cfg.dataloader.train.mapper.image_format = "BGR"  # which the test mapper's refers to
    cfg.dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=30, max_size=100)]
    second = hourglass.Predictor(cfg)
    inputs = second.prepare(image)
    assert tuple(inputs["image"].shape) == (3, 30, 45) and (inputs["height"], inputs["width"]) == (60, 90)
    flat = np.empty((60, 90, 3), np.uint8)
    flat[:] = (1, 2, 3)
    assert second.prepare(flat)["image"][:, 0, 0].tolist() == [1, 2, 3]
    # Without a plan the model runs as the config builds it.
    del cfg["plan"]
    assert hourglass.Predictor(cfg).plan is None
    expedited = hourglass.Predictor(hourglass.config.expedite(cfg, Plan(attention="fast")))
    assert expedited.plan is None and find_encoder(expedited.model)[1].plan.fast


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 4), np.uint8), r"an array \(4, 4\) of uint8"),
        (np.zeros((4, 4, 3), np.float32), "of float32"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel, got 0 x 4"),
        ("image.jpg", "or a list of them, got a str"),
        (None, "got a NoneType"),  # what OpenCV reads of a file that is not there
        ([None], "got a NoneType"),
        (np.zeros((10, 600, 3), np.uint8), "600 pixels for the model, whose model.backbone.square_pad is 512"),
    ],
    ids=str,
)
def test_what_is_no_image_is_refused(images, image, message):
    with pytest.raises(InputError, match=message):
        images[-1](image)


def test_an_image_that_cannot_be_resized_is_refused(images):
    resizing = copy.copy(images[-1])
    resizing.augmentations = T.AugmentationList([T.ResizeShortestEdge(512, 512)])
    assert resizing.prepare(np.zeros((8, 4000, 3), np.uint8))["image"].shape == (3, 1, 512)
    with pytest.raises(InputError, match="image strip.png of 3 x 4000 pixels cannot be augmented .ValueError"):
        resizing.prepare(np.zeros((3, 4000, 3), np.uint8), "strip.png")


def test_tokens_are_of_the_precision_that_the_model_runs_in(images, monkeypatch):
    paths, _, predictor = images
    half, seen = copy.copy(predictor), []
    half.dtype = torch.bfloat16

    def note(*arguments):
        seen.append(torch.is_autocast_enabled("cpu"))
        return find_tokens(*arguments)

    monkeypatch.setattr(tokens, "find_tokens", note)
    for each in (predictor, half):
        each.draw_tokens(cv2.imread(paths[0]))
    assert seen == [False, True]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda cfg: cfg.pop("model"), "a LazyConfig with model"),
        (lambda cfg: cfg.dataloader.pop("test"), "a LazyConfig with dataloader.test.mapper"),
        (lambda cfg: cfg.train.update(device="tpu"), "train.device must be"),
        (lambda cfg: cfg.evaluation.update(dtype="int8"), "evaluation.dtype must be"),
        (lambda cfg: cfg.plan.update(start=99), "start"),
        (lambda cfg: cfg.train.update(init_checkpoint="nowhere.pth"), "checkpoint nowhere.pth cannot be read"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(change, message):
    cfg = load_config(str(DEMO), [])
    change(cfg)
    with pytest.raises(InputError, match=message):
        hourglass.Predictor(cfg)


def test_the_package_does_not_import_it_before_it_is_asked_for():
    code = "import sys, hourglass; print([name for name in sys.modules if 'predict' in name and 'hourglass' in name])"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hourglass.nothing  # noqa: B018
