"""
Draw nuclei: the image, the ground truth, what the unmodified model finds, and the expedited one with its clusters.

    python -m projects.nuclei.pictures
    python -m projects.nuclei.pictures --images f29fd9c52e04403cd2c7d43b6fe2479292e53b2f61969d25256d2d2aca7c6a81
    python -m projects.nuclei.pictures 'plan.reducer.grid=[6,6]' plan.start=1
"""

import argparse
from pathlib import Path
from typing import Any

import hourglass  # first: it mends Detectron2 0.6

# isort: split
import cv2
import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor, nn
from tqdm import tqdm

from hourglass import InputError, Plan
from hourglass.checkpoint import load_checkpoint
from hourglass.data.loading import build_loader
from hourglass.encoders import find_encoder
from hourglass.files import check_folder
from hourglass.launch import build, load_config, one_line
from hourglass.reduction import Reducer, Reduction
from hourglass.report.tokens import draw_clusters, find_clusters

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "nuclei" / "vitdet.py"
# Of the validation images: nuclei that shine, small and large ones, and stained tissue.
IMAGES = [
    "564fa390d9a9c26f986bf860d9091cbd84244bc1c8e3c9369f2f2e5b5fd99b92",
    "03b9306f44e9b8951461623dcbd615550cdcf36ea93b203f2c8fa58ed1dffcbe",
    "947c0d94c8213ac7aaa41c4efc95d854246550298259cf1bb489654d0e969050",
    "708eb41a3fc8f2b6cd1f529cdf38dc4ad5d5f00ad30bdcba92884f37ff78d614",
]
SCALE = 2  # pixels of a picture for one of the model's input
GAP = 12
YELLOW = (255, 220, 0)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=str(CONFIG), help="a LazyConfig (default: configs/nuclei/vitdet.py)")
    parser.add_argument(
        "--images", nargs="+", default=IMAGES, metavar="NAME", help="published names (default: four validation images)"
    )
    parser.add_argument("--score", type=float, default=0.5, help="least score of drawn nuclei (default: 0.5)")
    parser.add_argument("--output", default="output/nuclei/pictures", metavar="FOLDER", help="folder of the PNGs")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the config, as for train_net.py"
    )
    return parser.parse_intermixed_args(arguments)


class Clusters:
    """Remembers what the reducer of an expedited encoder did in the last run."""

    def __init__(self, encoder: nn.Module, plan: Plan):
        reducer = next((module for module in encoder.modules() if isinstance(module, Reducer)), None)
        if reducer is None or reducer.each_block:
            name = "none" if plan.reducer is None else type(plan.reducer).__name__
            raise InputError(f"clusters are drawn for a reducer of one smaller map, got {name}")
        reducer.register_forward_hook(self._remember)
        self.labels = torch.zeros(0, 0)

    def _remember(self, reducer: nn.Module, inputs: tuple[Tensor], reduction: Reduction) -> None:
        self.labels = find_clusters(inputs[0], reduction)


def outline(picture: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """The picture with outlines of the masks (H, W), which are scaled to it."""
    picture = picture.copy()
    for mask in masks:
        mask = cv2.resize(mask.astype(np.uint8), picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, YELLOW, 2)
    return picture


def draw(panels: dict[str, np.ndarray]) -> np.ndarray:
    """The panels, of one size, two in a row, each under its title."""
    titled = []
    for title, panel in panels.items():
        bar = np.full((40, panel.shape[1], 3), 255, np.uint8)
        cv2.putText(bar, title, (4, 28), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (0, 0, 0), 2, cv2.LINE_AA)
        titled.append(np.pad(np.concatenate([bar, panel]), ((0, GAP), (0, GAP), (0, 0)), constant_values=255))
    return np.concatenate([np.concatenate(titled[i : i + 2], axis=1) for i in range(0, len(titled), 2)])


def find_nuclei(output: dict[str, Any], score: float) -> list[np.ndarray]:
    instances = output["instances"].to("cpu")
    return list(instances.pred_masks[instances.scores >= score].numpy())


def main(args: argparse.Namespace) -> None:
    if not 0 <= args.score <= 1:
        raise InputError(f"--score must be a number from 0 to 1, got {args.score}")
    check_folder("--output", args.output)
    cfg = load_config(args.config_file, ["train.device=cpu", *args.overrides])
    plan = build(cfg, "plan")
    model = build(cfg, "model").eval()
    expedited = hourglass.expedite(model, plan)
    _, encoder = find_encoder(expedited)
    clusters = Clusters(encoder, plan)
    patch = cfg.model.backbone.net.patch_size
    loader, records = build_loader(cfg.dataloader.test)
    wanted = {name.removesuffix(".png"): None for name in args.images}
    index_of = {Path(record["file_name"]).stem: i for i, record in enumerate(records)}
    missing = [name for name in wanted if name not in index_of]
    if missing:
        raise InputError(f"--images must be names of the {len(index_of)} validation images, got {missing[0]!r}")
    load_checkpoint(model, cfg.train.init_checkpoint)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name in tqdm(wanted, desc="drawing", unit="image"):
        inputs = loader.dataset[index_of[name]]
        with torch.no_grad():
            plain, fewer = (find_nuclei(detector([inputs])[0], args.score) for detector in (model, expedited))
        image = inputs["image"].permute(1, 2, 0).numpy()
        image = cv2.resize(image, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_CUBIC)
        truth = [rle.decode(annotation["segmentation"]) for annotation in records[index_of[name]]["annotations"]]
        reduced = draw_clusters(image, clusters.labels.numpy(), SCALE * patch)
        picture = draw(
            {
                "image": image,
                f"ground truth: {len(truth)} nuclei": outline(image, truth),
                f"unmodified: {len(plain)}": outline(image, plain),
                f"expedited: {len(fewer)}, and its clusters": outline(reduced, fewer),
            }
        )
        path = folder / f"{name[:8]}.png"
        if not cv2.imwrite(str(path), picture[..., ::-1]):
            raise InputError(f"--output must be a folder that can be written to, got {args.output!r}")
    print(f"written to {folder}")


if __name__ == "__main__":
    with one_line():
        main(parse())
