"""What figures were measured with: hardware and versions."""

import platform
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
import torchvision
from detectron2.utils import comm

from hourglass.version import __version__


def describe_environment(device: str) -> dict[str, Any]:
    """
    Args:
        device: "cuda" or "cpu".
    """
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "processes": comm.get_world_size(),
        "versions": {
            "hourglass": __version__,
            "detectron2": detectron2.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
