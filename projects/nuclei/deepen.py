"""
Insert blocks into the encoder of a ViTDet checkpoint that change nothing at first: a warm start for a deeper model.

    python -m projects.nuclei.deepen output/nuclei_8/model_final.pth output/deeper.pth

Each new block is a copy of the one before it whose two last projections, of its attention and of its MLP, are zero: its
updates are, until it is trained. Where the block before looks farther or less far, relative positions begin at zero.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hourglass import InputError
from hourglass.checkpoint import read_checkpoint
from hourglass.errors import reason
from hourglass.files import check_folder, save_whole
from hourglass.launch import one_line

# Of the deeper model's blocks, those that are there already, in order; global ones stay global.
KEPT = (0, 1, 2, 4, 6, 8, 10, 11)
DEPTH = 12
GLOBAL = (2, 5, 8)
LAST = ("attn.proj.", "mlp.fc2.")
TABLES = ("attn.rel_pos_",)
BLOCKS = ".blocks."


def deepen(weights: dict[str, Tensor], kept: Sequence[int], depth: int, wide: Sequence[int]) -> dict[str, Tensor]:
    """
    Args:
        weights: of a model, names with "blocks.<number>." among them.
        kept: numbers that the blocks get, in order.
        depth: number of blocks of the deeper model.
        wide: numbers of its global blocks.

    Raises:
        InputError: for a model with another number of blocks.
    """
    numbers = {int(name.split(BLOCKS)[1].split(".")[0]) for name in weights if BLOCKS in name}
    if numbers != set(range(len(kept))):
        raise InputError(f"the model must have {len(kept)} blocks, got {len(numbers)}")
    deeper = {name: value for name, value in weights.items() if BLOCKS not in name}
    for new in range(depth):
        old = max(i for i, number in enumerate(kept) if number <= new)
        for name, value in weights.items():
            head, _, remainder = name.partition(BLOCKS)
            number, _, part = remainder.partition(".")
            if number == str(old):
                silent = kept[old] != new and part.startswith(LAST)
                if part.startswith(TABLES) and (kept[old] in wide) != (new in wide):  # of another length
                    like = next(i for i, block in enumerate(kept) if (block in wide) == (new in wide))
                    value, silent = weights[f"{head}{BLOCKS}{like}.{part}"], True
                deeper[f"{head}{BLOCKS}{new}.{part}"] = torch.zeros_like(value) if silent else value.clone()
    return deeper


def read_model(checkpoint: str) -> dict[str, Tensor]:
    """
    Raises:
        InputError: for a file that is missing or cannot be read.
    """
    if not os.path.isfile(checkpoint):
        raise InputError(f"checkpoint {checkpoint} is missing")
    try:
        return read_checkpoint(checkpoint)["model"]
    except InputError:
        raise
    except Exception as error:  # whatever an unpickler may raise
        raise InputError(f"checkpoint {checkpoint} cannot be read ({reason(error)})") from error


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint of the model with 8 blocks")
    parser.add_argument("output", help="file to write the deeper model's weights to")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    check_folder("output", Path(args.output).parent)
    weights = deepen(read_model(args.checkpoint), KEPT, DEPTH, GLOBAL)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    save_whole(Path(args.output), {"model": weights})
    print(f"{len(KEPT)} blocks became {DEPTH}, written to {args.output}")


if __name__ == "__main__":
    with one_line():
        main(parse())
