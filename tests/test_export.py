"""
Exported programs equal the eager encoder, in their own runtimes.

Every encoder x reducer is tested in TorchScript, torch.export and ONNX at one size. What takes longest is tested on a
part that covers each step: programs for several sizes, and AOTInductor, which compiles C++, on the reducer with most
operators of its own.
"""

import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import hourglass
import projects.demo
from hourglass import (
    AveragePooling,
    BipartiteMatching,
    DensityPeaks,
    GridMerging,
    InputError,
    LinearBlocks,
    Plan,
    SkipBlocks,
    TokenClustering,
    launch,
)
from hourglass import export as exporting
from hourglass.export import FORMATS, TOLERANCE, check_format, encoder_program, export, image_sizes, resized
from tests.models import UNTRAINED, images
from tests.small_plans import selection
from tests.small_swin import tiny_swin
from tests.small_vit import tiny_vit

# As few blocks as have every step: windowed and global ones, windows that are shifted, merged patches between stages.
ENCODERS = {
    "ViT": lambda: tiny_vit(depth=2, window_block_indexes=(0,)),
    "windowed ViT": lambda: tiny_vit(depth=1, window_block_indexes=(0,)),
    "global ViT": lambda: tiny_vit(depth=1, window_block_indexes=()),
    "Swin": lambda: tiny_swin(depths=(2,), num_heads=(1,), out_indices=(0,)),
    "unshifted Swin": lambda: tiny_swin(depths=(1,), num_heads=(1,), out_indices=(0,)),
    "Swin of two stages": lambda: tiny_swin(depths=(1, 1), num_heads=(1, 2), out_indices=(0, 1)),
}
# Maps of whole windows; in pixels.
FIXED = {"ViT": (64, 96), "global ViT": (40, 56), "Swin": (48, 72), "Swin of two stages": (48, 96)}
FIXED |= {"windowed ViT": FIXED["ViT"], "unshifted Swin": FIXED["Swin"]}
SEVERAL = {"ViT": (64, 96), "windowed ViT": (64, 96), "global ViT": (80, 112), "Swin": (72, 96)}
PLANS = {
    "unmodified": Plan(),
    "fast attention": Plan(attention="fast"),
    "clustering": Plan(TokenClustering((5, 5))),
    "clustering in windows": Plan(TokenClustering(0.6), scope="window"),
    # A temperature at which centres of windows as small as these stay apart.
    "clustering as published": Plan(TokenClustering.published(0.6, temperature=2.0), scope="window", published=True),
    "clustering, calibrated": Plan(TokenClustering(0.6), scope="window"),
    "peaks in windows": Plan(DensityPeaks(0.6), scope="window"),
    "matching in windows": Plan(BipartiteMatching(0.2), scope="window"),
    "pooling": Plan(AveragePooling((5, 4))),
    "pooling in windows": Plan(AveragePooling(0.6), scope="window"),
    "merging": Plan(GridMerging((5, 4))),
    "merging in windows": Plan(GridMerging(0.6), scope="window"),
    "pooled keys": Plan(keys=2),
    "blocks left out": Plan(SkipBlocks()),
    "an affine map": Plan(LinearBlocks()),
}
CALIBRATED = ("clustering, calibrated", "an affine map")
IN_WINDOWS = ("clustering as published", "clustering, calibrated", "peaks in windows", "merging in windows")
CASES = [
    *(("ViT", name) for name in ("unmodified", "fast attention", "clustering in windows")),
    *(("global ViT", name) for name in ("clustering", "pooling", "merging", "pooled keys", "an affine map")),
    *(("windowed ViT", name) for name in (*IN_WINDOWS, "matching in windows", "blocks left out")),
    *(("Swin", name) for name in ("fast attention", "clustering in windows")),
    *(("unshifted Swin", name) for name in (*IN_WINDOWS, "clustering", "pooling", "blocks left out", "an affine map")),
    ("Swin of two stages", "unmodified"),
]
SEVERAL_SIZES = [
    ("windowed ViT", "clustering in windows"),
    ("windowed ViT", "merging in windows"),
    ("global ViT", "clustering"),
    ("global ViT", "pooling"),
    ("Swin", "fast attention"),
]


@functools.cache
def view(encoder: str, plan: str) -> torch.nn.Module:
    module, chosen = ENCODERS[encoder](), PLANS[plan]
    if plan in CALIBRATED:
        chosen = chosen.calibrated(hourglass.calibrate(module, chosen, images(3, size=FIXED[encoder])))
    return hourglass.expedite(module, chosen).eval()


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(2))


@functools.cache
def program_of(encoder: str, plan: str, dynamic: bool) -> exporting.Program:
    """Captured once for the formats that start from it."""
    return encoder_program(view(encoder, plan), image(*(SEVERAL if dynamic else FIXED)[encoder]), dynamic)


def exported(encoder: str, plan: str, format: str, dynamic: bool, folder: Path) -> list:
    """The differences, with one image of each size."""
    program = program_of(encoder, plan, dynamic)
    compared = [resized(program.inputs[0], size) for size in image_sizes(program, 2 if dynamic else 1)]
    return export(program, format, folder / f"encoder{FORMATS[format]}", compared)


def check(encoder: str, plan: str, format: str, dynamic: bool, folder: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    differences = exported(encoder, plan, format, dynamic, folder)
    assert len({difference.size for difference in differences}) == (2 if dynamic else 1)
    largest = max(difference.largest for difference in differences)
    print(f"| {encoder} | {plan} | {format} | {'two sizes' if dynamic else 'one size'} | {largest:.0e} |")  # pytest -rP
    assert largest < 1e-4
    assert [path.name for path in folder.iterdir()] == [f"encoder{FORMATS[format]}"]


@pytest.mark.parametrize("format", ["torchscript", "torch.export", "onnx"])
@pytest.mark.parametrize("encoder, plan", CASES, ids=["-".join(case) for case in CASES])
def test_the_program_is_the_eager_encoder(encoder, plan, format, tmp_path):
    check(encoder, plan, format, False, tmp_path)


@pytest.mark.parametrize("format", ["torch.export", "onnx"])
@pytest.mark.parametrize("encoder, plan", SEVERAL_SIZES, ids=["-".join(case) for case in SEVERAL_SIZES])
def test_one_program_takes_several_sizes(encoder, plan, format, tmp_path):
    check(encoder, plan, format, True, tmp_path)


def test_aoti_is_the_eager_encoder(tmp_path):
    try:
        check_format("aoti")
    except InputError as error:
        pytest.skip(str(error))
    assert exported("windowed ViT", "clustering in windows", "aoti", False, tmp_path)[0].largest < 1e-4


def test_chunks_of_an_exported_program_are_those_of_attention(monkeypatch, tmp_path):
    """As on large maps."""
    monkeypatch.setattr("hourglass.attention.EXPORTED_CHUNK", 256)
    assert exported("ViT", "fast attention", "torch.export", False, tmp_path)[0].largest < 1e-5


def test_tiled_neighbourhoods_are_exported(tmp_path):
    """A grid of so many centres that it is cut into tiles."""
    expedited = hourglass.expedite(ENCODERS["global ViT"](), Plan(TokenClustering((26, 27))))
    program = encoder_program(expedited, image(256, 240))
    assert export(program, "torch.export", tmp_path / "encoder.pt2", [image(256, 240)])[0].largest < 1e-5


def test_a_program_needs_nothing_of_this_package():
    graph = program_of("ViT", "clustering in windows", False).captured.graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets and not any("hourglass" in target for target in targets)


def test_exporting_leaves_the_eager_encoder_as_it_was():
    expedited, x = view("global ViT", "clustering"), image(72, 56)
    torch.export.export(expedited, (x,), strict=False)  # the first run of this size
    out = expedited(x)["last_feat"]
    assert type(out) is torch.Tensor and torch.equal(out, expedited(x)["last_feat"])


def test_the_file_says_what_it_is(tmp_path):
    program = encoder_program(view("windowed ViT", "blocks left out"), image(64, 64))
    export(program, "torchscript", tmp_path / "encoder.ts", [image(64, 64)])
    metadata = {"hourglass.json": ""}
    torch.jit.load(tmp_path / "encoder.ts", _extra_files=metadata)
    about = json.loads(metadata["hourglass.json"])
    assert about["plan"]["reducer"]["name"] == "SkipBlocks" and about["image"] == [1, 3, 64, 64]


class Louder(torch.nn.Module):
    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: 1.01 * value for name, value in self.module(x).items()}


def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    right = exporting._WRITERS["torchscript"]
    wrong = lambda program, path: right(dataclasses.replace(program, module=Louder(program.module)), path)  # noqa: E731
    monkeypatch.setitem(exporting._WRITERS, "torchscript", wrong)
    program = encoder_program(view("ViT", "unmodified"), image(64, 64))
    (tmp_path / "encoder.ts").write_text("what was there")
    said = "differs .* by 0.01 of the output's scale on image 1 of 1, .*eager model is steady.*not written"
    with pytest.raises(InputError, match=said):
        export(program, "torchscript", tmp_path / "encoder.ts", [image(64, 64)])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("encoder.ts", "what was there")]


def test_a_difference_that_hangs_on_rounding_is_said_to(tmp_path, monkeypatch):
    """
    In an image of columns four centres of a window are alike, and which of them a token mixes is up to rounding. The
    eager encoder's own output then changes with it, as it does not where all centres differ.
    """
    published = Plan(TokenClustering.published(0.6), scope="window", published=True)
    program = encoder_program(hourglass.expedite(ENCODERS["Swin"](), published).eval(), image(48, 72))
    columns = torch.linspace(0, 2, 72).expand(1, 3, 48, 72)
    assert exporting.sensitivity(program, columns) > TOLERANCE
    steady = program_of("Swin", "clustering in windows", False)
    assert exporting.sensitivity(steady, steady.inputs[0]) < TOLERANCE / 10
    monkeypatch.setitem(exporting._WRITERS, "torch.export", exporting._WRITERS["torchscript"])
    monkeypatch.setattr(
        exporting, "load", lambda *_: lambda x: [1.01 * feature for feature in program.module(x).values()]
    )
    with pytest.raises(InputError, match="as does the eager model from itself .*TokenClustering chooses by comparing"):
        export(program, "torch.export", tmp_path / "encoder.pt2", [columns])


def test_several_sizes_are_compared_at_two(tmp_path):
    program = program_of("windowed ViT", "clustering in windows", True)
    with pytest.raises(
        InputError, match="a program of several sizes must be compared on images of two at least, got 1"
    ):
        export(program, "torch.export", tmp_path / "encoder.pt2", [program.inputs[0]] * 3)


def test_what_is_not_finite_or_of_another_shape_differs():
    assert exporting._difference(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    assert exporting._difference(torch.ones(3), torch.ones(2)) == float("inf")
    assert exporting._difference(torch.tensor([2.0, 4.0]), torch.tensor([2.0, 5.0])) == pytest.approx(0.2)
    assert exporting._difference(torch.zeros(0), torch.zeros(0)) == 0


def test_a_reducer_that_branches_on_data_is_refused_by_name():
    expedited = hourglass.expedite(tiny_vit(), Plan(selection().float(), 1, 4))
    with pytest.raises(InputError, match="TokenSelection selects another number of tokens for each image"):
        encoder_program(expedited, image(64, 64))


class Loudest(hourglass.Reducer):
    """Keeps the rows whose mean is above that of all."""

    def forward(self, tokens):
        rows = (tokens.mean((0, 2, 3)) > tokens.mean()).nonzero()[:, 0].tolist()
        return hourglass.Reduction(tokens[:, rows], None, None, lambda refined: tokens.index_copy(1, rows, refined))


def test_a_reducer_of_ones_own_that_branches_on_data_is_refused_by_name(tmp_path):
    expedited = hourglass.expedite(tiny_vit(window_block_indexes=()), Plan(Loudest(), 1, 2))
    program = exporting.Program(
        exporting._Encoder(expedited).eval(), (image(64, 64),), ["last_feat"], None, {"part": "encoder"}
    )
    with pytest.raises(
        InputError, match=r"the encoder \(HourglassViT under Loudest\) cannot be exported as torch.export"
    ):
        export(program, "torch.export", tmp_path / "encoder.pt2", [image(64, 64)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "plan, size, message",
    [
        (Plan(TokenClustering((5, 5)), 1, 3), (64, 64), "dynamic sizes need scope 'window' for TokenClustering where"),
        (
            Plan(TokenClustering(0.5), 2, 3),
            (64, 64),
            "dynamic sizes need a grid of rows and columns for TokenClustering",
        ),
        (Plan(DensityPeaks(0.6), 1, 3, scope="window"), (64, 64), "got DensityPeaks, which chooses tokens"),
        (Plan(BipartiteMatching(0.2), 1, 3, scope="window"), (64, 64), "got BipartiteMatching, which chooses tokens"),
        (Plan(GridMerging((5, 5)), 2, 3), (64, 64), "dynamic sizes need scope 'window' for GridMerging, got"),
        (
            Plan(AveragePooling((9, 5)), 2, 3),
            (64, 64),
            "multiples of 32 pixels, .* and at least 96, got an image of 64 x 64",
        ),
        (Plan(keys=2), (64, 64), "dynamic sizes need keys=1, got pooled keys, keys=2"),
        (
            Plan(attention="fast"),
            (64, 72),
            "multiples of 32 pixels, whole windows, and at least 64, got an image of 64 x 72",
        ),
    ],
)
def test_what_has_no_dynamic_sizes_is_refused(plan, size, message):
    with pytest.raises(InputError, match=message):
        encoder_program(hourglass.expedite(tiny_vit(), plan), image(*size), dynamic=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("caffe2",), "--format must be 'torchscript'"),
        (("onnx", True), "--model needs --format torchscript, got onnx"),
        (("torchscript", True, True), "--model cannot be used with --dynamic"),
        (("torchscript", False, True), "--dynamic needs --format torch.export, onnx or aoti"),
    ],
)
def test_what_a_format_does_not_take_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        check_format(*arguments)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(exporting, "ONNX_PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(InputError, match="no_such_package, not installed: pip install no_such_package"):
        check_format("onnx")


def test_a_file_ends_as_its_format_says(tmp_path):
    program = encoder_program(view("ViT", "unmodified"), image(64, 64))
    with pytest.raises(InputError, match=r"--output must end with .onnx for onnx, got"):
        export(program, "onnx", tmp_path / "encoder.pt", [image(64, 64)])


SMALL = [*UNTRAINED, "plan.reducer.grid=[5,5]", "plan.scope=window", "plan.start=3", "plan.stop=5", "plan.keys=1"]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """``tools/export.py``, in this process, with few images to draw."""
    path = Path(__file__).parents[1] / "tools" / "export.py"
    spec = importlib.util.spec_from_file_location("export_command", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path_factory.mktemp("datasets")))
        patch.setitem(projects.demo.DEMO_IMAGES, "val", 3)
        patch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)

        def run(*arguments: str) -> None:
            with launch.one_line():
                module.main(module.parse([*arguments, *SMALL]))

        yield run


@pytest.mark.parametrize("part", ["encoder", "model"])
def test_the_command_exports_the_demo(part, command, tmp_path, capsys):
    output = tmp_path / "new folder" / f"{part}.ts"
    options = ["--model"] if part == "model" else []
    # A config may set a batch size for evaluation: a program takes one image.
    command("--format", "torchscript", "--output", str(output), *options, "evaluation.batch_size=2")
    printed = capsys.readouterr().out
    assert f"exporting the {part} as torchscript for images of 512 x 512" in printed
    rows = [line.split("|") for line in printed.splitlines() if "512 x 512 |" in line]
    assert len(rows) == 3 and all(float(row[3]) <= 1e-3 for row in rows)
    x = torch.zeros(1, 3, 512, 512) if part == "encoder" else torch.zeros(3, 512, 512, dtype=torch.uint8)
    about = {"hourglass.json": ""}
    actual = torch.jit.load(output, _extra_files=about)(x)
    assert json.loads(about["hourglass.json"])["image"] == list(x.shape)
    assert actual["last_feat"].shape == (1, 128, 16, 16) if part == "encoder" else len(actual) == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--format", "onnx", "--model"], "--model needs --format torchscript, got onnx"),
        (
            ["--format", "torchscript", "--size", "0", "64"],
            "--size must be height and width in pixels, each at least 1, got 0 64",
        ),
        (["--format", "torchscript", "evaluation.dtype=bfloat16"], "evaluation.dtype must be float32 for an export"),
        (["--format", "torchscript", "--output", "encoder.pt"], "--output must end with .ts for torchscript"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, command, capsys):
    with pytest.raises(SystemExit) as ended:
        command(*arguments)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
