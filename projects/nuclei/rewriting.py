"""The commands that make another model's first weights from a checkpoint."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from hourglass import InputError
from hourglass.checkpoint import read_checkpoint
from hourglass.errors import reason
from hourglass.files import check_folder, save_whole


def rewrite(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], description: str | None, arguments: list[str] | None
) -> None:
    """
    Read a checkpoint, change its weights, and write them to another file.

    Args:
        change: takes and returns the weights, by name.
        description: of the command, for its help.
        arguments: of the command; None: those of the process.

    Raises:
        InputError: for a checkpoint that is missing or cannot be read, and for an output that cannot be written.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file with the model's weights")
    parser.add_argument("output", help="file to write the changed weights to")
    args = parser.parse_args(arguments)
    output = Path(args.output)
    check_folder("output", output.parent)
    if not os.path.isfile(args.checkpoint):
        raise InputError(f"checkpoint {args.checkpoint} is missing")
    try:
        weights = read_checkpoint(args.checkpoint)["model"]
    except InputError:
        raise
    except Exception as error:  # whatever an unpickler may raise
        raise InputError(f"checkpoint {args.checkpoint} cannot be read ({reason(error)})") from error
    changed = change(weights)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_whole(output, {"model": changed})
    print(f"written to {output}")
