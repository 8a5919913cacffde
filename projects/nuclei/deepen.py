"""
Insert blocks into the encoder of a ViTDet checkpoint that change nothing at first: a warm start for a deeper model.

    python -m projects.nuclei.deepen output/nuclei_8/model_final.pth output/deeper.pth

Each new block is a copy of the one before it whose two last projections, of its attention and of its MLP, are zero: its
updates are, until it is trained. Where the block before looks farther or less far, relative positions begin at zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hourglass import InputError
from hourglass.launch import one_line

from .rewriting import rewrite

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


def main(arguments: list[str] | None = None) -> None:
    rewrite(lambda weights: deepen(weights, KEPT, DEPTH, GLOBAL), __doc__, arguments)


if __name__ == "__main__":
    with one_line():
        main()
