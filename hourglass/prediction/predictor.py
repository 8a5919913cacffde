"""Prediction with a LazyConfig's expedited model on images as arrays."""

import copy
import logging
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

from hourglass.checkpoint import load_checkpoint
from hourglass.data.loading import check_square
from hourglass.data.opening import square_side
from hourglass.encoders import Plan, expedite
from hourglass.errors import InputError, reason
from hourglass.launch import build, find_device
from hourglass.reduction.selection import RANDOM

logger = logging.getLogger(__name__)


class Predictor:
    """
    Like Detectron2's ``DefaultPredictor``, for a LazyConfig and with the model under the config's plan::

        predictor = hourglass.Predictor(cfg)
        output = predictor(cv2.imread("image.jpg"))
        outputs = predictor([cv2.imread("image.jpg"), cv2.imread("other.jpg")])

    The model is built and its weights are loaded as ``train_net.py`` does it; images are prepared as by the config's
    mapper for tests: its ``augmentations`` and its ``image_format``.

    Args:
        cfg: a LazyConfig with ``model`` and ``dataloader.test.mapper``. Of what it may have besides, these are read:
            ``plan`` (without it the model runs as the config builds it, expedited where that says so),
            ``train.init_checkpoint``, ``train.allow_partial_checkpoint``, ``train.device`` ("cuda", "cpu" or "auto",
            which is CUDA where there is one) and ``evaluation.dtype`` ("float32", or "bfloat16" by autocast).

    Attributes:
        model: the expedited model, in evaluation mode.
        plan: the plan that it runs under; None where the config has none.
        metadata: Detectron2's metadata of the data set that the config is evaluated on.

    Raises:
        InputError: for a config without these nodes, a plan that the model cannot follow, a checkpoint that does not
            match the model, and a device that is not available.
    """

    def __init__(self, cfg: DictConfig):
        for key in ("model", "dataloader.test.mapper"):
            if not isinstance(cfg, DictConfig) or not isinstance(OmegaConf.select(cfg, key), DictConfig):
                raise InputError(f"cfg must be a LazyConfig with {key}, such as configs/demo/vitdet.py")
        cfg = copy.deepcopy(cfg)
        self.device = find_device(OmegaConf.select(cfg, "train.device", default="auto"))
        dtype = OmegaConf.select(cfg, "evaluation.dtype", default="float32")
        if dtype not in ("float32", "bfloat16"):
            raise InputError(f'evaluation.dtype must be "float32" or "bfloat16", got {dtype!r}')
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.plan: Plan | None = build(cfg, "plan") if isinstance(cfg.get("plan"), DictConfig) else None
        self._unmodified: nn.Module = build(cfg, "model").to(self.device)
        # Refuses a plan that does not fit before the weights are read.
        self.model = (self._unmodified if self.plan is None else expedite(self._unmodified, self.plan)).eval()
        checkpoint = OmegaConf.select(cfg, "train.init_checkpoint", default="")
        if checkpoint:
            partial = OmegaConf.select(cfg, "train.allow_partial_checkpoint", default=False)
            load_checkpoint(self._unmodified, checkpoint, partial)
        else:
            logger.warning("train.init_checkpoint is empty, the weights are random")
        if getattr(getattr(self.plan, "reducer", None), "selectors", None) == RANDOM:
            logger.warning('plan.reducer.selectors is "%s", what they select is random', RANDOM)
        mapper = instantiate(cfg.dataloader.test.mapper)
        if not hasattr(mapper, "augmentations") or not isinstance(getattr(mapper, "image_format", None), str):
            raise InputError(
                "dataloader.test.mapper must have augmentations and an image_format, as Detectron2's DatasetMapper has "
                f"them, got {type(mapper).__name__}"
            )
        augmentations = mapper.augmentations
        listed = isinstance(augmentations, T.Augmentation)
        self.augmentations = augmentations if listed else T.AugmentationList(augmentations)
        self.image_format: str = mapper.image_format
        self.metadata: Metadata = _metadata(OmegaConf.select(cfg, "dataloader.test.dataset.names"))
        self._square = square_side(self._unmodified)

    def under(self, plan: Plan) -> "Predictor":
        """
        A predictor of the same weights under another plan.

        Raises:
            InputError: for a plan that the model cannot follow.
        """
        view = copy.copy(self)
        view.plan = plan
        view.model = expedite(self._unmodified, plan).eval()
        return view

    def unmodified(self) -> "Predictor":
        """A predictor of the same weights, without the plan."""
        return self.under(Plan())

    @overload
    def __call__(self, image: np.ndarray) -> dict[str, Any]: ...

    @overload
    def __call__(self, image: Sequence[np.ndarray]) -> list[dict[str, Any]]: ...

    def __call__(self, image: np.ndarray | Sequence[np.ndarray]) -> dict[str, Any] | list[dict[str, Any]]:
        """
        Args:
            image: (H, W, 3) uint8 in BGR, as OpenCV reads it; or a list of some, of any sizes, which the model runs as
                one batch. It may pad the smaller ones of a batch further than it would alone.

        Returns:
            the model's output of the image, such as ``instances``, ``panoptic_seg`` and ``sem_seg`` at the image's
            size; of a list, a list of them.

        Raises:
            InputError: for what is no such image, and one that is too large for the model's square.
        """
        if isinstance(image, np.ndarray):
            return self.run([self.prepare(image)])[0]
        if not isinstance(image, Sequence) or isinstance(image, str):
            raise InputError(f"image must be a uint8 array (H, W, 3) or a list of them, got {_kind(image)}")
        return self.run([self.prepare(item) for item in image])

    def draw(
        self, image: np.ndarray, output: dict[str, Any], score: float = 0.5, reference: dict[str, Any] | None = None
    ) -> np.ndarray:
        """
        What the model found in an image, drawn over it as by ``train_net.py --predict``.

        Args:
            image: (H, W, 3) uint8 in BGR.
            output: the model's output of it.
            score: instances of at least this are drawn.
            reference: another model's output of the same image: an object that both find has the colour it has there.

        Returns:
            (H', W', 3) uint8 in BGR: small images are drawn larger, those over 2,400 pixels a side smaller.
        """
        from hourglass.prediction.drawing import draw  # takes matplotlib
        from hourglass.prediction.names import Names

        return draw(image, output, Names.from_metadata(self.metadata), score, reference)

    def draw_tokens(self, image: np.ndarray) -> np.ndarray:
        """
        The tokens that the plan's first block runs on, over the image: clusters have thin borders, attention windows
        orange ones, and tokens that do not run are dark.

        Args:
            image: (H, W, 3) uint8 in BGR.

        Returns:
            (H', W', 3) uint8 in BGR, the longer side 800 to 1,600 pixels.

        Raises:
            InputError: for a predictor whose plan has no reducer.
        """
        from hourglass.report.tokens import draw_tokens, find_tokens

        with self._autocast():
            tokens = None if self.plan is None else find_tokens(self.model, self.plan, self.prepare(image))
        if tokens is None:
            raise InputError(f"draw_tokens needs a predictor whose plan has a reducer, got {self.plan!r}")
        return draw_tokens(np.ascontiguousarray(image[:, :, ::-1]), tokens)[:, :, ::-1].copy()

    def prepare(self, image: np.ndarray, name: str | None = None) -> dict[str, Any]:
        """
        What the model takes of an image.

        Args:
            image: (H, W, 3) uint8 in BGR.
            name: of the image, for messages.

        Returns:
            ``image`` (C, H', W') uint8 in the config's format, and ``height`` and ``width`` of the output.
        """
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"image must be a uint8 array (H, W, 3) in BGR, got {_kind(image)}")
        height, width = image.shape[:2]
        if not height or not width:
            raise InputError(f"image must have at least one pixel, got {height} x {width}")
        values = image
        if self.image_format != "BGR":
            rgb = np.ascontiguousarray(image[:, :, ::-1])
            values = (
                rgb if self.image_format == "RGB" else convert_PIL_to_numpy(Image.fromarray(rgb), self.image_format)
            )
        inputs = T.AugInput(values)
        try:
            self.augmentations(inputs)
        except (RuntimeError, ValueError) as error:  # of a strip that would be resized to no pixel
            raise InputError(
                f"image {name or 'of the predictor'} of {height} x {width} pixels cannot be augmented ({reason(error)})"
            ) from error
        pixels = np.ascontiguousarray(inputs.image.transpose(2, 0, 1))
        if self._square:
            check_square(tuple(pixels.shape[-2:]), self._square, name or "of the predictor")
        return {"image": torch.as_tensor(pixels), "height": height, "width": width}

    def run(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The model's outputs of what :meth:`prepare` gave, as one batch."""
        if not inputs:
            return []
        with torch.no_grad(), self._autocast():
            return self.model(inputs)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)


def _metadata(names: Any) -> Metadata:
    if not isinstance(names, str) and names:
        names = names[0]
    return MetadataCatalog.get(names or "__unnamed__")


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} of {value.dtype}"
    return f"a {type(value).__name__}"
