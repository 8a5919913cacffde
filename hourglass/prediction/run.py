"""``train_net.py --predict``: predictions on images and videos."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.utils import comm
from omegaconf import DictConfig
from tqdm import tqdm

from hourglass.errors import InputError
from hourglass.files import check_folder, printable, write_whole
from hourglass.prediction.drawing import count, draw, side_by_side
from hourglass.prediction.names import Names
from hourglass.prediction.predictor import Predictor
from hourglass.prediction.results import Results
from hourglass.prediction.sources import Source, Video, VideoFile, find_sources, read_pixels

EXPEDITED, UNMODIFIED = "expedited", "unmodified"


class Request(NamedTuple):
    """
    A request for predictions.

    Attributes:
        paths: images, videos and folders of them.
        output: the folder that is written to; None: ``predictions`` in the config's ``train.output_dir``.
        compare: also by the unmodified model, drawn to the left.
        score: instances of at least this are drawn.
    """

    paths: list[str]
    output: str | None = None
    compare: bool = False
    score: float = 0.5


def run_prediction(cfg: DictConfig, request: Request) -> int:
    """
    Predict on images and videos, draw and write what is found.

    Returns:
        the command's exit code: 0, or 1 where some files were skipped.

    Raises:
        InputError: where nothing can be read, and for an output folder that cannot be written to or would have a file
            that is predicted on overwritten.
    """
    if comm.get_world_size() > 1:
        raise InputError("--predict runs in one process only")
    if not 0 <= request.score <= 1:
        raise InputError(f"--score must be a number from 0 to 1, got {request.score!r}")
    folder = Path(os.path.expanduser(request.output or os.path.join(cfg.train.output_dir, "predictions")))
    check_folder("--output", folder)
    sources = find_sources(request.paths)
    if not sources:
        raise InputError(f"--predict must be images, videos or folders of them, got none in {', '.join(request.paths)}")
    if not any(source.path.is_file() for source in sources):
        raise InputError(f"--predict: {_join_names([str(source.path) for source in sources])} missing")
    _refuse_overwriting(sources, folder)
    predictor = Predictor(cfg)
    models = {UNMODIFIED: predictor.unmodified()} if request.compare else {}
    return _Run(cfg, request, folder, {**models, EXPEDITED: predictor}).run(sources)


class _Run:
    """One run of the command."""

    def __init__(self, cfg: DictConfig, request: Request, folder: Path, models: dict[str, Predictor]):
        self.asked, self.folder, self.models = request, folder, models
        self.scaling, self.batch_size = cfg.dataloader.image_scaling, cfg.evaluation.batch_size
        self.names = Names.from_metadata(models[EXPEDITED].metadata)
        self.skipped: list[str] = []
        self.images = self.frames = self.videos = 0
        self.milliseconds: dict[str, list[float]] = {name: [] for name in models}

    def run(self, sources: list[Source]) -> int:
        if not self.names.known:
            name = self.models[EXPEDITED].metadata.get("name")
            tqdm.write(f"data set {name!r} has no class names here: classes are numbered, category ids from 1")
        self.results = {
            name: Results(self.folder if name == EXPEDITED else self.folder / name, self.names) for name in self.models
        }
        try:
            self._run_images([source for source in sources if not source.is_video])
            for source in sources:
                if source.is_video:
                    with self._skipping():
                        self._run_video(source)
        finally:
            # An interruption leaves what was found until then.
            any_output = bool(self.images or self.frames)
            written = [results.close(any_output) for results in self.results.values()][-1]
        if not any_output:
            raise InputError(f"--predict: none of {len(sources)} files could be read")
        self._report(len(sources), written)
        return 1 if self.skipped else 0

    def _run_images(self, sources: list[Source]) -> None:
        bar = tqdm(total=len(sources), desc="predicting", unit="image", disable=not sources)
        with bar:
            for batch in _batched(self._read(sources, bar), self.batch_size):
                pixels = [image for _, image in batch]
                for (source, image), outputs in zip(batch, self._predict(pixels)):
                    self.images += 1
                    picture = self._draw(image, outputs)
                    path = self.folder / f"{source.name}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(path, _encode(picture))
                    self._write({"file_name": str(source.path)}, image, outputs)
                    bar.update()

    def _read(self, sources: list[Source], bar: tqdm) -> Iterator[tuple[Source, np.ndarray]]:
        """The images that can be read, and that the model takes."""
        for source in sources:
            with self._skipping(bar):
                image = read_pixels(source.path, self.scaling)
                self.models[EXPEDITED].prepare(image, str(source.path))
                yield source, image

    def _run_video(self, source: Source) -> None:
        video = Video(source.path)
        drawn = VideoFile(self.folder / f"{source.name}.mp4", video.rate)
        start, frames, complete = time.perf_counter(), 0, False
        before = sum(self.milliseconds[EXPEDITED])
        bar = tqdm(total=video.length, desc=source.path.name, unit="frame")
        try:
            with bar:
                for batch in _batched(iter(video), self.batch_size):
                    for image, outputs in zip(batch, self._predict(batch)):
                        drawn.add(self._draw(image, outputs))
                        self.frames += 1
                        self._write({"file_name": str(source.path), "frame": frames}, image, outputs)
                        frames += 1
                        bar.update()
            complete = frames > 0
        finally:
            video.close()
            drawn.close(complete)
        if not frames:
            raise InputError(f"{source.path} has no frame that can be read")
        self.videos += 1
        rate = frames / (time.perf_counter() - start)
        model = 1000 * frames / (sum(self.milliseconds[EXPEDITED]) - before)
        print(f"{source.path}: {frames} frames, {rate:.2f} frames/s, the expedited model alone {model:.2f}", flush=True)
        if video.length and frames < video.length:
            raise InputError(f"{source.path} ends after {frames} of {video.length} frames, those are drawn")

    @contextlib.contextmanager
    def _skipping(self, bar: tqdm | None = None) -> Iterator[None]:
        """A file that cannot be read, or that the model does not take, is one line."""
        try:
            yield
        except InputError as error:
            self.skipped.append(str(error))
            tqdm.write(printable(f"skipped: {error}"))
            if bar is not None:
                bar.total -= 1
                bar.refresh()

    def _predict(self, images: list[np.ndarray]) -> list[dict[str, dict[str, Any]]]:
        """Of each image: model -> output."""
        predictions: list[dict[str, dict[str, Any]]] = [{} for _ in images]
        for name, predictor in self.models.items():
            inputs = [predictor.prepare(image) for image in images]
            start = time.perf_counter()
            outputs = predictor.run(inputs)
            if predictor.device == "cuda":
                torch.cuda.synchronize()
            milliseconds = 1000 * (time.perf_counter() - start) / len(images)
            self.milliseconds[name] += [milliseconds] * len(images)
            for of_image, output in zip(predictions, outputs):
                if output.get("panoptic_seg") is not None and output["panoptic_seg"][1] is None:
                    raise InputError(
                        "--predict needs panoptic segments with segments_info, the model gives a map of labels"
                    )
                of_image[name] = output
        return predictions

    def _draw(self, image: np.ndarray, outputs: dict[str, dict[str, Any]]) -> np.ndarray:
        reference = outputs.get(UNMODIFIED)
        pictures = [
            draw(image, output, self.names, self.asked.score, None if name == UNMODIFIED else reference)
            for name, output in outputs.items()
        ]
        if len(pictures) == 1:
            return pictures[0]
        captions = [f"{name}: {count(output, self.asked.score)}" for name, output in outputs.items()]
        return side_by_side(pictures, captions)

    def _write(self, about: dict[str, Any], image: np.ndarray, outputs: dict[str, dict[str, Any]]) -> None:
        number, (height, width) = self.images + self.frames, image.shape[:2]
        for name, output in outputs.items():
            self.results[name].add({"id": number, **about, "height": height, "width": width}, output)

    def _report(self, files: int, written: list[str]) -> None:
        done = []
        if self.images:
            done.append(f"{self.images} image{'s' if self.images > 1 else ''}")
        if self.videos:
            done.append(f"{self.frames} frames of {self.videos} video{'s' if self.videos > 1 else ''}")
        times = [f"{name} {np.median(times):.1f} ms" for name, times in self.milliseconds.items()]
        print(f"{' and '.join(done)}; median time of the model per image: {', '.join(times)}")
        print(printable(f"written to {self.folder}: drawings, {', '.join(written)}"), flush=True)
        if self.skipped:
            print(f"skipped {len(self.skipped)} of {files} files", flush=True)


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _encode(picture: np.ndarray) -> bytes:
    done, content = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])
    assert done, f"a picture {picture.shape} is encoded"
    return content.tobytes()


def _refuse_overwriting(sources: list[Source], folder: Path) -> None:
    files = {source.path.resolve() for source in sources}
    for source in sources:
        target = (folder / f"{source.name}{'.mp4' if source.is_video else '.jpg'}").resolve()
        if target in files:
            raise InputError(
                f"--output {folder} would overwrite {target}, which is one of the inputs: use another folder"
            )


def _join_names(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
