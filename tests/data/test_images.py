"""Images of more than 8 bits: the model sees the pixels of the 8-bit image, or the image is refused."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.utils.logger import _LOG_COUNTER
from PIL import Image

from hourglass import InputError
from hourglass.data import PanopticMapper
from hourglass.data.images import read_header, read_image, read_labels
from hourglass.data.loading import ReadableMapper

GREY = np.random.RandomState(0).randint(0, 256, (16, 24)).astype(np.uint8)
COLOURS = np.random.RandomState(1).randint(0, 256, (16, 24, 3)).astype(np.uint8)
GREY[0, :2], COLOURS[0, :2] = (0, 255), ((0, 0, 0), (255, 255, 255))


def write(path, pixels, **options) -> str:
    """Colours are RGB."""
    if pixels.ndim == 3 and pixels.dtype == np.uint16:
        assert cv2.imwrite(str(path), pixels[..., ::-1])
    else:
        Image.fromarray(pixels).save(path, **options)
    return str(path)


def deep(pixels):
    return pixels.astype(np.uint16) * 257


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("pixels", [GREY, COLOURS], ids=["grey", "colours"])
@pytest.mark.parametrize("format", ["RGB", "BGR", "L", None])
def test_an_image_that_is_257_times_an_8_bit_one_gives_the_same_pixels(tmp_path, suffix, pixels, format):
    shallow = write(tmp_path / f"8.{suffix}", pixels)
    expected = detection_utils.read_image(shallow, format)
    image = read_image(write(tmp_path / f"16.{suffix}", deep(pixels)), format)
    assert image.dtype == np.uint8 and np.array_equal(image, expected)
    assert np.array_equal(read_image(shallow, format), expected)


def test_of_16_bits_the_nearest_8_bit_value_is_taken(tmp_path):
    values = np.array([[0, 128, 129, 385, 386, 65406, 65407, 65535]], np.uint16)
    assert read_image(write(tmp_path / "a.png", values)).tolist() == [[0, 0, 1, 1, 2, 254, 255, 255]]


def test_a_portable_greymap_of_16_bits_and_one_with_transparency(tmp_path):
    path = str(tmp_path / "a.pgm")
    assert cv2.imwrite(path, deep(GREY))
    assert np.array_equal(read_image(path, "L")[..., 0], GREY)
    path = str(tmp_path / "a.png")
    assert cv2.imwrite(path, np.dstack([deep(COLOURS)[..., ::-1], np.full_like(deep(GREY), 65535)]))
    assert np.array_equal(read_image(path, "RGB"), COLOURS)


@pytest.mark.parametrize("pixels", [GREY, COLOURS], ids=["grey", "colours"])
def test_percentiles_stretch_what_a_camera_of_12_bits_gives(tmp_path, pixels, caplog):
    path = write(tmp_path / "a.png", pixels.astype(np.uint16) * 16)
    _LOG_COUNTER.clear()
    dark = read_image(path, "RGB")
    assert dark.max() == 16
    (line,) = caplog.messages
    assert f"the brightest value of image {path} is 4080 of 65535" in line and "image_scaling=percentiles" in line
    stretched = read_image(path, "RGB", "percentiles")
    low, high = np.percentile(pixels, (1, 99.8))
    expected = np.clip(np.round((pixels - low) * 255 / (high - low)), 0, 255)
    assert np.abs(stretched.astype(int) - (expected if pixels.ndim == 3 else expected[..., None])).max() <= 1
    # Each image its own range: how bright a camera's scale is makes no difference.
    assert np.array_equal(stretched, read_image(write(tmp_path / "b.png", deep(pixels)), "RGB", "percentiles"))


def test_an_image_of_one_value_is_not_stretched(tmp_path):
    path = write(tmp_path / "a.png", np.full((4, 4), 257 * 9, np.uint16))
    assert np.unique(read_image(path, "L", "percentiles")).tolist() == [9]


def test_images_of_16_bits_are_turned_as_those_of_8(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    paths = [write(tmp_path / f"{i}.png", pixels, exif=exif) for i, pixels in enumerate((GREY, deep(GREY)))]
    first, second = (read_image(path, "L") for path in paths)
    assert first.shape == (24, 16, 1) and np.array_equal(first, second)
    assert np.array_equal(first, detection_utils.read_image(paths[0], "L"))
    assert read_header(paths[0])[:3] == ((16, 24), (24, 16), 6)


@pytest.mark.parametrize(
    "pixels, mode", [(GREY.astype(np.float32), "F"), (GREY.astype(np.int32) * 2**20, "I")], ids=["float", "32 bits"]
)
def test_other_values_are_refused_with_file_and_mode(tmp_path, pixels, mode):
    path = write(tmp_path / "a.tif", pixels)
    with pytest.raises(
        InputError, match=f"image {path} is of Pillow's mode '{mode}' .TIFF.: values must be of 8 or 16 bits"
    ):
        read_image(path, "RGB")
    assert f"mode '{mode}'" in read_header(path).problem


def test_a_tiff_that_is_turned_is_refused(tmp_path):
    """Pillow's releases differ, and Detectron2 turns once more what Pillow has turned."""
    exif = Image.Exif()
    exif[274] = 3
    with pytest.raises(InputError, match="is a TIFF with an orientation: it must be upright"):
        read_image(write(tmp_path / "a.tif", GREY, exif=exif))


def test_another_scaling_is_refused(tmp_path):
    with pytest.raises(InputError, match="scaling must be 'full' or 'percentiles', got 'max'"):
        read_image(write(tmp_path / "a.png", GREY), scaling="max")


@pytest.mark.parametrize("kind", ["instances", "panoptic"])
def test_mappers_read_16_bits(tmp_path, kind):
    if kind == "panoptic":
        mapper = PanopticMapper([])
    else:
        mapper = DatasetMapper(is_train=False, augmentations=[T.NoOpTransform()], image_format="RGB")
    ids = write(tmp_path / "ids.png", np.zeros((16, 24, 3), np.uint8))
    records = [
        {"file_name": write(tmp_path / f"{i}.png", pixels), "pan_seg_file_name": ids, "segments_info": []}
        for i, pixels in enumerate((GREY, deep(GREY), GREY.astype(np.uint16)))
    ]
    full, stretched = (ReadableMapper(mapper, scaling) for scaling in ("full", "percentiles"))
    expected = torch.as_tensor(GREY).expand(3, -1, -1)
    assert torch.equal(full(records[0])["image"], expected) and torch.equal(full(records[1])["image"], expected)
    assert torch.equal(stretched(records[0])["image"], expected)
    assert stretched(records[2])["image"].max() == 255 and full(records[2])["image"].max() == 1
    # Nobody else's reading changes.
    assert detection_utils.read_image(records[0]["file_name"], "L").shape == (16, 24, 1)
    assert detection_utils.read_image(records[1]["file_name"]).dtype == np.uint16


def test_panoptic_mapper_on_its_own_reads_16_bits(tmp_path):
    ids = write(tmp_path / "ids.png", np.zeros((16, 24, 3), np.uint8))
    record = {"file_name": write(tmp_path / "a.png", deep(COLOURS)), "pan_seg_file_name": ids, "segments_info": []}
    assert np.array_equal(PanopticMapper([])(record)["image"].permute(1, 2, 0), COLOURS)


def test_class_ids_are_no_grey_values(tmp_path):
    """A palette's indices are the classes, whatever its colours; 16 bits are not scaled."""
    ids = np.array([[0, 1, 2, 255]], np.uint8)
    palette = Image.fromarray(ids, "P")
    palette.putpalette(np.random.RandomState(0).bytes(768))
    palette.save(tmp_path / "p.png")
    paths = [tmp_path / "p.png", write(tmp_path / "l.png", ids), write(tmp_path / "i.png", ids.astype(np.uint16))]
    for path in paths:
        assert read_labels(str(path))[..., 0].tolist() == ids.tolist()
    mapper = ReadableMapper(DatasetMapper(is_train=True, augmentations=[], image_format="RGB"))
    image = write(tmp_path / "image.png", np.zeros((1, 4), np.uint8))
    for path in paths:
        assert mapper({"file_name": image, "sem_seg_file_name": str(path)})["sem_seg"].tolist() == ids.tolist()


@pytest.mark.parametrize(
    "pixels, message",
    [
        (COLOURS, "is of Pillow's mode 'RGB': it must have one channel"),
        (deep(GREY), "has the class id 65535: ids must be from 0 to 255"),
    ],
)
def test_other_class_ids_are_refused(tmp_path, pixels, message):
    path = write(tmp_path / "a.png", pixels)
    with pytest.raises(InputError, match=f"semantic PNG {path} {message}"):
        read_labels(path)


def test_an_image_larger_than_the_square_is_refused_with_both_sizes(tmp_path):
    path = write(tmp_path / "a.png", GREY)
    mapper = DatasetMapper(is_train=True, augmentations=[T.Resize((20, 33))], image_format="RGB")
    assert ReadableMapper(mapper, square=33)({"file_name": path})["image"].shape == (3, 20, 33)
    with pytest.raises(InputError, match=f"image {path} is 20 x 33 pixels .* model.backbone.square_pad is 32: "):
        ReadableMapper(mapper, square=32)({"file_name": path})


def test_a_mapper_that_reads_16_bits_by_itself_is_said(tmp_path, caplog):
    _LOG_COUNTER.clear()
    mapper = ReadableMapper(lambda record: {"image": torch.zeros(3, 16, 24)})
    mapper({"file_name": write(tmp_path / "8.png", GREY)})
    assert not caplog.records
    for _ in range(2):
        mapper({"file_name": write(tmp_path / "16.png", deep(GREY))})
    (line,) = caplog.messages
    assert "16.png has 16 bits, and function reads it by itself" in line
