"""The numbers from the official implementations in ``tests/golden/``, see the README there."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
CASES = {Path(case["file"]).stem: case for case in json.loads((FOLDER / "index.json").read_text())["cases"]}


def names(prefix: str) -> list[str]:
    return sorted(name for name in CASES if name.startswith(prefix))


def load(name: str) -> tuple[dict, dict[str, Tensor]]:
    """The entry of the index and the tensors of a case."""
    return CASES[name], load_file(FOLDER / f"{name}.safetensors")


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, by what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
