"""
Encoders and models as programs for other runtimes: written, loaded again in the format's own runtime, and compared with
the eager model.

Formats: TorchScript by tracing, ``torch.export``'s program, ONNX, and AOTInductor's package. Under export the operators
of this package (:mod:`hourglass.operators`) are run as they are, so that a program is of torch's own operators, and
loads without this package.
"""

import importlib.util
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from hourglass.checks import check_choice
from hourglass.compat import tracing_adapter
from hourglass.contexts import evaluating
from hourglass.encoders.contract import as_map
from hourglass.encoders.hourglass import Hourglass
from hourglass.encoders.plan import Plan
from hourglass.encoders.registry import family_of, find_encoder
from hourglass.encoders.sharing import unmodified
from hourglass.errors import InputError, reason
from hourglass.files import check_folder
from hourglass.reduction.reducer import Reducer
from hourglass.version import __version__

#: Format -> what its files end with.
FORMATS = {"torchscript": ".ts", "torch.export": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}
#: Largest difference from the eager model, as a share of the output's scale.
TOLERANCE = 1e-3
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# A protocol buffer holds 2 GB: weights of more go into a file beside it.
LARGEST_PROTOBUF = 1_800_000_000
# Timed runs of each image, by turns.
RUNS = 3
# By so much of its scale an image is changed to see whether the eager model's output hangs on rounding, so often.
ROUNDING, PERTURBATIONS = 1e-7, 8

#: A program in its runtime: tensors -> the outputs, in the eager model's order.
Runtime = Callable[..., list[Tensor]]


@dataclass(eq=False)
class Program:
    """
    What is exported.

    Attributes:
        module: tensors -> a dictionary or tuple of tensors.
        inputs: an example of what it takes.
        outputs: the names of what it returns.
        step: what the image's height and width may be multiples of; None: the program is for the example's size.
        about: what it is, as plain values: it is written into the file.
        least: how many steps a side has at least.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    outputs: list[str]
    step: int | None
    about: dict[str, Any]
    least: int = 2

    @cached_property
    def captured(self) -> torch.export.ExportedProgram:
        """The program as ``torch.export`` has it, which ONNX and AOTInductor start from."""
        shapes = None
        if self.step is not None:
            rows, columns = (torch.export.Dim(name, min=self.least) for name in ("rows", "columns"))
            shapes = ({2: self.step * rows, 3: self.step * columns},)
        with evaluating(self.module), torch.no_grad():
            return torch.export.export(self.module, self.inputs, dynamic_shapes=shapes, strict=False)


class Difference(NamedTuple):
    """
    An exported program beside the eager model, on one image.

    Attributes:
        size: (height, width) of the image.
        largest: difference of any output, as a share of that output's largest value. Infinite where shapes differ or
            values are not finite.
        eager, exported: milliseconds, the median of some runs.
    """

    size: tuple[int, int]
    largest: float
    eager: float
    exported: float


class _Encoder(nn.Module):
    """An encoder, (B, C, height, width) -> its maps by name."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return _by_name(self.encoder(image))


def _by_name(outputs: Any) -> dict[str, Tensor]:
    if isinstance(outputs, Mapping):
        return dict(outputs)
    several = list(outputs) if isinstance(outputs, Sequence) else [outputs]
    return {f"feature{i}" if len(several) > 1 else "feature": feature for i, feature in enumerate(several)}


def encoder_program(model: nn.Module, image: Tensor, dynamic: bool = False) -> Program:
    """
    The encoder of a model, with its plan.

    Args:
        model: holds, or is, the encoder, in evaluation mode.
        image: (1, C, height, width), normalised and padded as the encoder gets it.
        dynamic: for images of any height and width that are whole windows, in place of the example's alone.

    Raises:
        InputError: for a plan that cannot be exported so.
    """
    encoder = find_encoder(model)[1]
    plan = encoder.plan.describe() if isinstance(encoder, Hourglass) else {}
    refuse_reducers(encoder, dynamic)
    step, least = _steps(encoder, image) if dynamic else (None, 2)
    if step is not None and any(side % step or side < least * step for side in image.shape[-2:]):
        raise InputError(
            f"dynamic sizes of this encoder and plan must be multiples of {step} pixels, whole windows, and "
            f"at least {least * step}, got an image of {image.shape[-2]} x {image.shape[-1]}"
        )
    with evaluating(encoder), torch.no_grad():
        outputs = list(_by_name(encoder(image)))
    about = {"hourglass": __version__, "part": "encoder", "plan": plan, "image": list(image.shape), "step": step}
    return Program(_Encoder(encoder).eval(), (image,), outputs, step, about, least)


def model_program(model: nn.Module, image: Tensor) -> Program:
    """
    A whole model, by Detectron2's ``TracingAdapter``: an image (C, height, width), as the model takes it, to what it
    finds, as tensors in that adapter's order. Detections are in the image's pixels, their masks of 28 x 28, say, not
    pasted into it.

    Raises:
        InputError: for a model whose output is more than tensors.
    """
    refuse_reducers(find_encoder(model)[1], dynamic=False)
    with evaluating(model), torch.no_grad():
        try:
            adapter = tracing_adapter()(model, [{"image": image}], _infer).eval()
            outputs = adapter(image)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{type(model).__name__} returns more than tensors, which a trace cannot ({reason(error)}): export its "
                "encoder"
            ) from error
    about = {"hourglass": __version__, "part": "model", "image": list(image.shape)}
    return Program(adapter, (image,), [f"output{i}" for i in range(len(outputs))], None, about)


def _infer(model: Any, inputs: list[dict[str, Tensor]]) -> Any:
    # Without pasting masks and scaling boxes to another size, which the runtime's user does.
    return model.inference(inputs, do_postprocess=False)[0] if hasattr(model, "roi_heads") else model(inputs)


def refuse_reducers(encoder: nn.Module, dynamic: bool) -> None:
    """
    Raises:
        InputError: for a plan whose reducer chooses by the data how many tokens run and, with ``dynamic``, for one
            whose steps are as many as the image's size says.
    """
    plan: Plan | None = encoder.plan if isinstance(encoder, Hourglass) else None
    if plan is None:
        return
    if dynamic and plan.keys > 1:
        raise InputError(f"dynamic sizes need keys=1, got pooled keys, keys={plan.keys}: export for one size")
    if plan.reducer is None:
        return
    reducer, name = plan.reducer, type(plan.reducer).__name__
    if reducer.selects:
        raise InputError(
            f"{name} selects another number of tokens for each image, and a program's steps do not "
            "branch on data: use another reducer"
        )
    if not dynamic:
        return
    if reducer.each_block or not reducer.on_grid:
        raise InputError(
            f"dynamic sizes need a reducer to a regular grid, got {name}, which chooses tokens: export for one size"
        )
    grid = reducer.describe().get("grid")
    if plan.scope == "window" or grid is None:
        return
    if not reducer.any_size:
        raise InputError(
            f"dynamic sizes need scope 'window' for {name}, got scope 'map', where an image's size says how many steps "
            "it takes"
        )
    if not all(isinstance(side, int) for side in grid):
        raise InputError(
            f"dynamic sizes need a grid of rows and columns for {name} under scope 'map', got the share {grid}"
        )
    family = family_of(encoder)
    blocks = [block for stage in family.stages_of(unmodified(encoder)) for block in stage]
    if any(family.window_size(blocks[i]) for i in plan.blocks(len(blocks))):
        raise InputError(
            f"dynamic sizes need scope 'window' for {name} where planned blocks have windows, got scope 'map', whose "
            "windows would be of another size for each image"
        )


def check_format(format: str, whole_model: bool = False, dynamic: bool = False) -> None:
    """
    Raises:
        InputError: for a format that is not known or cannot take this, and packages or compilers that it lacks.
    """
    check_choice("--format", format, tuple(FORMATS))
    if whole_model and format != "torchscript":
        raise InputError(
            f"--model needs --format torchscript, got {format}: Detectron2's heads branch on data, which only a trace "
            "can follow"
        )
    if whole_model and dynamic:
        raise InputError("--model cannot be used with --dynamic, which exports an encoder")
    if dynamic and format == "torchscript":
        raise InputError(
            "--dynamic needs --format torch.export, onnx or aoti, got torchscript, whose trace is of one image size"
        )
    if format != "torchscript" and not hasattr(torch.compiler, "is_exporting"):
        raise InputError(f"--format {format} needs torch 2.7 or newer, got {torch.__version__}")
    if format == "onnx":
        missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise InputError(
                f"--format onnx needs {', '.join(missing)}, not installed: pip install {' '.join(missing)}"
            )
    if format == "aoti":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            raise InputError("--format aoti needs a C++ compiler, and finds none: install g++, or set CXX") from error


def check_path(path: str | os.PathLike, format: str) -> None:
    """
    Raises:
        InputError: for a file that has not the format's ending, or cannot be written.
    """
    path = Path(path)
    if path.suffix != FORMATS[format]:
        raise InputError(f"--output must end with {FORMATS[format]} for {format}, got {str(path)!r}")
    check_folder("--output", path.parent)


def export(program: Program, format: str, path: str | os.PathLike, images: Sequence[Tensor]) -> list[Difference]:
    """
    Write a program, load it in the format's own runtime and compare it with the eager model.

    Args:
        program: from :func:`encoder_program` or :func:`model_program`.
        format: one of :data:`FORMATS`.
        path: of the file. It is written whole, and only if the program is right: else what was there stays.
        images: that are compared on, like the program's input; of at least two sizes where the program takes several.

    Returns:
        the differences, one of each image.

    Raises:
        InputError: for images of one size where there must be two, and for a program that cannot be exported, or
            differs from the eager model by more than
            :data:`TOLERANCE`.
    """
    path = Path(path)
    check_path(path, format)
    sizes = {tuple(image.shape[-2:]) for image in images}
    if len(sizes) < (1 if program.step is None else 2):
        raise InputError(f"a program of several sizes must be compared on images of two at least, got {len(sizes)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        with evaluating(program.module), torch.no_grad(), _quiet():
            try:
                _WRITERS[format](program, file)
                differences = compare(program, load(file, format, program.outputs), images)
            except InputError:
                raise
            except Exception as error:  # whatever an exporter may raise
                raise InputError(f"{_name(program)} cannot be exported as {format} ({_cause(error)})") from error
            worst = max(range(len(differences)), key=lambda i: differences[i].largest)
            largest = differences[worst].largest
            if not largest <= TOLERANCE:
                raise InputError(
                    f"{_name(program)} as {format} differs from the eager model by {largest:.2g} of the output's "
                    f"scale on image {worst + 1} of {len(images)}, over {TOLERANCE:g}, "
                    f"{_why(program, images[worst])}: not written to {path}"
                )
        # What the file refers to comes first.
        for written in sorted(Path(folder).iterdir(), key=lambda written: written == file):
            os.replace(written, path.parent / written.name)
    return differences


def load(path: str | os.PathLike, format: str, outputs: Sequence[str]) -> Runtime:
    """
    A program's file in the format's own runtime: ``torch.jit.load``, ``torch.export.load``, onnxruntime, or
    ``torch._inductor.aoti_load_package``.

    Args:
        outputs: names of what it returns, in the order in which it is asked for.
    """
    if format == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        providers = onnxruntime.get_available_providers()
        kept = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in providers]
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=kept)
        names = [node.name for node in session.get_inputs()]

        def run(*inputs: Tensor) -> list[Tensor]:
            feed = {name: tensor.cpu().numpy() for name, tensor in zip(names, inputs)}
            return [torch.from_numpy(array) for array in session.run(list(outputs), feed)]

        return run
    if format == "torchscript":
        module: Any = torch.jit.load(path)
    elif format == "torch.export":
        module = torch.export.load(path).module()
    else:
        module = torch._inductor.aoti_load_package(os.fspath(path))
    return lambda *inputs: _listed(module(*inputs), outputs)


def compare(program: Program, run: Runtime, images: Sequence[Tensor]) -> list[Difference]:
    """An exported program beside the eager model on some images: by how much they differ, and the time of both."""

    def eager(image: Tensor) -> list[Tensor]:
        return _listed(program.module(image), program.outputs)

    differences = []
    for image in images:
        expected, actual = eager(image), run(image)
        same_number = len(actual) == len(expected)
        largest = max(_difference(*pair) for pair in zip(actual, expected)) if same_number else math.inf
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(RUNS):
            for function, durations in zip((eager, run), times):
                _synchronize(image)
                start = time.perf_counter()
                function(image)
                _synchronize(image)
                durations.append(1000 * (time.perf_counter() - start))
        size = (int(image.shape[-2]), int(image.shape[-1]))
        differences.append(Difference(size, largest, *map(statistics.median, times)))
    return differences


def sensitivity(program: Program, image: Tensor) -> float:
    """
    By how much the eager model's own output changes when an image changes as little as rounding changes it, as a share
    of the output's scale: the most of some random changes. It is large where a reducer chooses between candidates that
    are alike to rounding; two runtimes then need not agree.

    Args:
        image: like the program's input.
    """

    def eager(image: Tensor) -> list[Tensor]:
        return _listed(program.module(image), program.outputs)

    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    with evaluating(program.module), torch.no_grad():
        expected = eager(image.float())
        for _ in range(PERTURBATIONS):
            noise = torch.randn(image.shape, generator=generator).to(image.device)
            found = eager(image.float() + ROUNDING * image.abs().max() * noise)
            largest = max(largest, *(_difference(*pair) for pair in zip(found, expected)))
    return largest


def _why(program: Program, image: Tensor) -> str:
    """What to make of a program that differs on an image, for an error's line."""
    own = sensitivity(program, image)
    if own <= TOLERANCE:
        return f"where the eager model is steady (it changes by {own:.1g} when the image changes by {ROUNDING:g})"
    reducer = _reducer(program)
    chooser = "the model" if reducer is None else type(reducer).__name__
    return (
        f"as does the eager model from itself ({own:.2g}) when the image changes by {ROUNDING:g} of its scale: "
        f"{chooser} chooses by comparing what is alike to rounding there"
    )


def to_table(differences: Sequence[Difference], format: str) -> str:
    """The differences as a table, a row for each image."""
    rows = [
        [i, f"{height} x {width}", f"{largest:.1e}", f"{eager:.1f}", f"{exported:.1f}"]
        for i, ((height, width), largest, eager, exported) in enumerate(differences, start=1)
    ]
    headers = ["image", "size", "largest difference", "eager, ms", f"{format}, ms"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=("right",) * 5)


def encoder_inputs(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    """What a model's encoder gets, (1, C, height, width) each, for inputs of the model."""
    images: list[Tensor] = []

    class Reached(Exception):
        pass

    def stop(_: nn.Module, arguments: tuple) -> None:
        images.append(arguments[0].detach().clone())
        raise Reached

    handle = find_encoder(model)[1].register_forward_pre_hook(stop)
    try:
        with evaluating(model), torch.no_grad():
            for batch in inputs:
                try:
                    model(batch)
                except Reached:
                    continue
    finally:
        handle.remove()
    return images


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., C, height, width) -> (..., C, *size), of the same type."""
    batched = image if image.dim() == 4 else image[None]
    scaled = F.interpolate(batched.float(), size=size, mode="bilinear", align_corners=False).to(image.dtype)
    return scaled if image.dim() == 4 else scaled[0]


def image_sizes(program: Program, count: int) -> list[tuple[int, int]]:
    """(height, width) of images to compare a program on: of its example or, if it takes several, around it."""
    height, width = program.inputs[0].shape[-2:]
    if program.step is None:
        return [(height, width)] * count
    step = program.step
    sizes = [(height, width), (height + step, width), (max(program.least * step, height - step), width + step)]
    return [sizes[i % len(sizes)] for i in range(count)]


def _write_torchscript(program: Program, path: Path) -> None:
    traced = torch.jit.trace(program.module, program.inputs, strict=False, check_trace=False)
    torch.jit.save(traced, path, _extra_files={"hourglass.json": json.dumps(program.about)})


def _write_exported(program: Program, path: Path) -> None:
    torch.export.save(program.captured, path, extra_files={"hourglass.json": json.dumps(program.about)})


def _write_onnx(program: Program, path: Path) -> None:
    exported = torch.onnx.export(
        program.captured,
        dynamo=True,
        verbose=False,
        input_names=["image"],
        output_names=program.outputs,
        custom_translation_table=_translations(),
    )
    assert exported is not None
    exported.model.metadata_props["hourglass"] = json.dumps(program.about)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.module.state_dict().values())
    exported.save(path, external_data=weights > LARGEST_PROTOBUF)


def _write_aoti(program: Program, path: Path) -> None:
    metadata = {"hourglass": json.dumps(program.about)}
    with torch._inductor.config.patch({"aot_inductor.metadata": metadata}):
        torch._inductor.aoti_compile_and_package(program.captured, package_path=os.fspath(path))


_WRITERS: dict[str, Callable[[Program, Path], None]] = {
    "torchscript": _write_torchscript,
    "torch.export": _write_exported,
    "onnx": _write_onnx,
    "aoti": _write_aoti,
}


def _translations() -> dict[Any, Callable]:
    """ONNX forms of what torch's exporter has none for."""
    from onnxscript import ir, opset18

    op: Any = opset18  # whose types take constants of their own alone

    def sort_stable(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # Of equal values ONNX's TopK has that of the lower index first.
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]), axis=0)
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    def mul_scalar(self: Any, other: Any) -> Any:
        # A factor that comes of the image's size, which torch's exporter takes for a plain number.
        if isinstance(other, bool | int | float):
            return op.Mul(self, op.Constant(value=ir.tensor(other, dtype=self.dtype)))
        return op.Mul(self, op.CastLike(other, self))

    return {torch.ops.aten.sort.stable: sort_stable, torch.ops.aten.mul.Scalar: mul_scalar}


def _steps(encoder: nn.Module, image: Tensor) -> tuple[int, int]:
    """
    Returns:
        what a side of an image is a multiple of, in pixels, where all maps are in whole windows; and how many of these
            it has at least.
    """
    plan: Plan | None = encoder.plan if isinstance(encoder, Hourglass) else None
    encoder = unmodified(encoder)
    family = family_of(encoder)
    stages = family.stages_of(encoder)
    strides = _strides(encoder, stages, image)
    blocks = [block for stage in stages for block in stage]
    step = math.lcm(
        *(strides[i] * max(1, family.window_size(block)) for i, stage in enumerate(stages) for block in stage)
    )
    # Of shifted windows the last row and column are masked: the program has them, those between, and no other kinds.
    least = 3 if any(family.shifted(block) for block in blocks) else 2
    grid = None if plan is None or plan.reducer is None else plan.reducer.describe().get("grid")
    if plan is not None and grid is not None and plan.scope == "map":
        # Where the map is larger than the grid, as a map of the grid's size has positions of its own.
        planned = {blocks[i] for i in plan.blocks(len(blocks))}
        widest = max(stride for stride, stage in zip(strides, stages) if planned & set(stage))
        least = max(least, max(grid) * widest // step + 1)
    return step, least


def _strides(encoder: nn.Module, stages: Sequence[Sequence[nn.Module]], image: Tensor) -> list[int]:
    """Pixels a side of a token, of each stage."""
    rows: dict[nn.Module, int] = {}

    def look(block: nn.Module, arguments: tuple) -> None:
        rows[block] = as_map(arguments[0], block).shape[1]

    handles = [stage[0].register_forward_pre_hook(look) for stage in stages]
    try:
        with evaluating(encoder), torch.no_grad():
            encoder(image)
    finally:
        for handle in handles:
            handle.remove()
    return [image.shape[-2] // rows[stage[0]] for stage in stages]


def _listed(outputs: Any, names: Sequence[str]) -> list[Tensor]:
    return [outputs[name] for name in names] if isinstance(outputs, Mapping) else list(outputs)


def _difference(exported: Tensor, eager: Tensor) -> float:
    """The largest difference as a share of the largest eager value."""
    if exported.shape != eager.shape:
        return math.inf
    if eager.numel() == 0:
        return 0.0
    exported, eager = exported.detach().cpu().double(), eager.detach().cpu().double()
    if not (exported.isfinite().all() and eager.isfinite().all()):
        return math.inf
    largest, scale = float((exported - eager).abs().max()), float(eager.abs().max())
    return largest / scale if scale > 0 else largest


def _name(program: Program) -> str:
    """What an error says was to be exported."""
    encoder, reducer = find_encoder(program.module)[1], _reducer(program)
    under = "" if reducer is None else f" under {type(reducer).__name__}"
    return f"the {program.about['part']} ({type(encoder).__name__}{under})"


def _reducer(program: Program) -> Reducer | None:
    return getattr(getattr(find_encoder(program.module)[1], "plan", None), "reducer", None)


def _cause(error: BaseException) -> str:
    """What went wrong first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error)[:300]


def _synchronize(image: Tensor) -> None:
    if image.is_cuda:
        torch.cuda.synchronize()


@contextmanager
def _quiet():
    """Without what exporters tell their own developers."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
