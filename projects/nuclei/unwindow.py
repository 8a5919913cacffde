"""
Let every block of a ViTDet checkpoint's encoder see the whole map: a warm start for a model without windows.

    python -m projects.nuclei.unwindow configs/nuclei/vitdet.pth output/unwindowed.pth

Tables of relative positions of windowed blocks become as long as the longest. At the distances that a window does not
have, they repeat its farthest one.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from hourglass import InputError
from hourglass.files import check_folder, save_whole
from hourglass.launch import one_line

from .deepen import TABLES, read_model


def unwindow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Args:
        weights: of a model, by name; tables of relative positions are (2 * side - 1, channels of a head).

    Raises:
        InputError: for a model without such tables.
    """
    tables = {name: table for name, table in weights.items() if any(part in name for part in TABLES)}
    if not tables:
        raise InputError("the model has no tables of relative positions")
    longest = max(len(table) for table in tables.values())
    for name, table in tables.items():
        beyond = (longest - len(table)) // 2
        tables[name] = torch.cat([table[:1].expand(beyond, -1), table, table[-1:].expand(beyond, -1)])
    return weights | tables


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint of a model with windows")
    parser.add_argument("output", help="file to write the weights to")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    check_folder("output", Path(args.output).parent)
    weights = unwindow(read_model(args.checkpoint))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    save_whole(Path(args.output), {"model": weights})
    print(f"every block sees the whole map, written to {args.output}")


if __name__ == "__main__":
    with one_line():
        main(parse())
