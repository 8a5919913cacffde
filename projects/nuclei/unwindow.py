"""
Let every block of a ViTDet checkpoint's encoder see the whole map: a warm start for a model without windows.

    python -m projects.nuclei.unwindow configs/nuclei/vitdet.pth output/unwindowed.pth

Tables of relative positions of windowed blocks become as long as the longest. At the distances that a window does not
have, they repeat its farthest one.
"""

import torch
from torch import Tensor

from hourglass import InputError
from hourglass.launch import one_line

from .deepen import TABLES
from .rewriting import rewrite


def unwindow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Args:
        weights: of a model, by name; tables of relative positions are (2 * side - 1, channels of a head).

    Raises:
        InputError: for a model without such tables, or with others.
    """
    tables = {name: table for name, table in weights.items() if any(part in name for part in TABLES)}
    if not tables:
        raise InputError("the model has no tables of relative positions")
    for name, table in tables.items():
        if table.dim() != 2 or len(table) % 2 == 0:
            raise InputError(f"{name} must be (2 * side - 1, channels of a head), got {tuple(table.shape)}")
    longest = max(len(table) for table in tables.values())
    for name, table in tables.items():
        beyond = (longest - len(table)) // 2
        tables[name] = torch.cat([table[:1].expand(beyond, -1), table, table[-1:].expand(beyond, -1)])
    return weights | tables


def main(arguments: list[str] | None = None) -> None:
    rewrite(unwindow, __doc__, arguments)


if __name__ == "__main__":
    with one_line():
        main()
