"""The hardware and the versions that figures were measured with."""

import platform
import subprocess
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

    Returns:
        "device", "gpu", "driver" and "cuda" (None without a GPU), "cpu", "threads" of torch, "processes", "system", and
        "versions" of the packages that figures depend on.
    """
    cuda = device == "cuda"
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": driver_version() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "processes": comm.get_world_size(),
        "system": f"{platform.system()} {platform.machine()}",
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


def driver_version() -> str | None:
    """NVIDIA's driver; None where ``nvidia-smi``, which comes with it, does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)
