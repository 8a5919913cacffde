#!/usr/bin/env python
"""
Export an encoder with its plan, or a whole model, and check the file in its own runtime.

    python tools/export.py --format onnx --config-file configs/demo/vitdet.py
    python tools/export.py --format torchscript --model --config-file configs/demo/vitdet.py --output model.ts
    python tools/export.py --format aoti --size 1024 1024 --config-file configs/vitdet/mask_rcnn_b.py plan.start=4
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # configs import projects

import hourglass  # first: it mends Detectron2 0.6

# isort: split
import torch
from omegaconf import DictConfig
from torch import Tensor

from hourglass.checkpoint import load_checkpoint
from hourglass.data.opening import load_test, open_test
from hourglass.errors import InputError
from hourglass.export import (
    FORMATS,
    TOLERANCE,
    Program,
    check_format,
    check_path,
    encoder_inputs,
    encoder_program,
    export,
    image_sizes,
    model_program,
    resized,
    to_table,
)
from hourglass.launch import DEMO, build, load_config, one_line, warn

IMAGES = 3


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=str(DEMO), help="a LazyConfig (default: configs/demo/vitdet.py)")
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="format of the file")
    parser.add_argument(
        "--model", action="store_true", help="export the whole model instead of its encoder (torchscript)"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="size of the image in pixels (default: that of the config's first test image at the encoder)",
    )
    parser.add_argument(
        "--dynamic", action="store_true", help="export an encoder for images of many sizes (not torchscript)"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="file to write (default: encoder or model in train.output_dir)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the config, as for train_net.py"
    )
    return parser.parse_intermixed_args(arguments)


def main(args: argparse.Namespace) -> None:
    check_format(args.format, args.model, args.dynamic)
    if args.size is not None and min(args.size) < 1:
        raise InputError(
            f"--size must be height and width in pixels, each at least 1, got {args.size[0]} {args.size[1]}"
        )
    cfg = load_config(args.config_file, args.overrides)
    if cfg.evaluation.dtype != "float32":
        raise InputError(f"evaluation.dtype must be float32 for an export, got evaluation.dtype={cfg.evaluation.dtype}")
    cfg.evaluation.batch_size = 1  # a program takes one image
    part = "model" if args.model else "encoder"
    output = args.output or os.path.join(cfg.train.output_dir, part + FORMATS[args.format])
    check_path(output, args.format)
    plan = build(cfg, "plan")
    model = build(cfg, "model").to(cfg.train.device).eval()
    expedited = hourglass.expedite(model, plan).eval()
    if cfg.train.init_checkpoint:
        load_checkpoint(model, cfg.train.init_checkpoint, cfg.train.allow_partial_checkpoint)
    else:
        warn("train.init_checkpoint is empty, the weights are random")
    images = read_images(cfg, expedited, args.model, args.size)
    if args.model:
        program = model_program(expedited, images[0])
    else:
        program = encoder_program(expedited, images[0], args.dynamic)
    images = [resized(image, size) for image, size in zip(images, image_sizes(program, len(images)))]
    print(f"exporting the {part} as {args.format} for {describe_size(program)} ...", flush=True)
    differences = export(program, args.format, output, images)
    print(f"\n{to_table(differences, args.format)}\n")
    print(f"differences are shares of the output's scale, at most {TOLERANCE:g}; written to {output}", flush=True)


def describe_size(program: Program) -> str:
    height, width = program.inputs[0].shape[-2:]
    if program.step is None:
        return f"images of {height} x {width}"
    return f"images whose height and width are multiples of {program.step}, from {program.least * program.step}"


def read_images(cfg: DictConfig, model: torch.nn.Module, whole_model: bool, size: list[int] | None) -> list[Tensor]:
    """
    What the program is compared on, of one size: images of the config's test set, as the encoder or the whole model
    gets them; noise, with a warning, where there are none.
    """
    try:
        records = open_test(cfg, model, IMAGES)
        inputs = list(load_test(cfg, model, records))
        images = [batch[0]["image"].to(cfg.train.device) for batch in inputs]
        images = images if whole_model else encoder_inputs(model, inputs)
    except InputError as error:
        if size is None:
            raise InputError(f"--size H W is needed where the test images cannot be read: {error}") from error
        warn(f"compared on noise, as the test images cannot be read: {error}")
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(IMAGES, 3, *size, generator=generator).to(cfg.train.device)
        images = [255 * torch.sigmoid(image) for image in noise] if whole_model else list(noise.split(1))
    height, width = size or images[0].shape[-2:]
    images = [resized(image, (int(height), int(width))) for image in images]
    return [images[i % len(images)] for i in range(IMAGES)]


if __name__ == "__main__":
    args = parse()
    with one_line():
        main(args)
