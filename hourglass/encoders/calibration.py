"""Calibrations of a plan's restoring: their content, their files, and the plan and weights that they are for."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hourglass.encoders.sharing import base_class
from hourglass.errors import InputError, reason
from hourglass.files import save_whole
from hourglass.weights import read_weights

FORMAT = "hourglass calibration 1"
# Of each parameter, evenly spaced: enough to tell weights from others.
SAMPLES = 16
# Rounding to bfloat16 moves a weight by 0.4 % at most.
TOLERANCE = 0.005
# Times the size of the others: of a parameter that is smaller, differences count as if it were not.
LEAST = 1e-3
# What a plan may have otherwise: attention is the same to rounding.
_FREE = ("attention",)


class Calibration:
    """
    Fitted maps that a plan's restoring is corrected with (:mod:`hourglass.reduction.calibrated`), from
    :func:`hourglass.calibrate`. It is for one plan, one encoder and its weights.

    Args:
        corrections: number of a stage's first block among those of the plan -> tensors by name.
        plan: result of :meth:`hourglass.Plan.describe`.
        encoder: result of :func:`describe_encoder`.
        weights: result of :func:`sample_weights`.
        seen: how it was fitted, as plain values: the number of images, their data set, the remaining error.
    """

    def __init__(
        self,
        corrections: Mapping[int, Mapping[str, Tensor]],
        plan: dict[str, Any],
        encoder: dict[str, Any],
        weights: Mapping[str, Tensor],
        seen: dict[str, Any],
    ):
        self.corrections = {int(first): dict(tensors) for first, tensors in corrections.items()}
        self.plan = plan
        self.encoder = encoder
        self.weights = dict(weights)
        self.seen = seen

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a file, atomically."""
        save_whole(Path(path), {"format": FORMAT, **vars(self)})

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Calibration":
        """
        Raises:
            InputError: for a file that is missing, or no calibration.
        """
        try:
            content = read_weights(os.path.expanduser(path), "calibration")
        except InputError:
            raise
        except Exception as error:  # whatever a file system or an unpickler may raise
            raise InputError(f"calibration {path} cannot be read ({reason(error)})") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise InputError(f"calibration {path} is not a calibration file, as train_net.py --calibrate writes")
        try:
            return cls(**content)
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"calibration {path} is damaged: write it again with train_net.py --calibrate") from error

    def digest(self) -> str:
        """A checksum of the corrections."""
        total = hashlib.blake2b(digest_size=8)
        for first, tensors in sorted(self.corrections.items()):
            for name, value in sorted(tensors.items()):
                total.update(f"{first} {name} {value.dtype} {tuple(value.shape)}".encode())
                total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    def describe(self) -> dict[str, Any]:
        """How it was fitted, as plain values, and its checksum."""
        return {**self.seen, "digest": self.digest()}

    def check_plan(self, plan: dict[str, Any]) -> None:
        """
        Raises:
            InputError: for another plan than the one that it was fitted for; the message names the first difference.
        """
        expected, given = (_flat(description) for description in (self.plan, plan))
        for name in sorted(expected.keys() | given.keys()):
            if name not in _FREE and expected.get(name) != given.get(name):
                raise InputError(
                    f"the calibration was made for another plan: {name} was {expected.get(name)!r}, and is "
                    f"{given.get(name)!r}: calibrate anew"
                )

    def check_encoder(self, encoder: nn.Module) -> None:
        """
        Raises:
            InputError: for another encoder than it was made for.
        """
        expected, given = self.encoder, describe_encoder(encoder)
        if expected != given:
            made_of, given_of = (
                ", ".join(f"{name} {value}" for name, value in values.items()) for values in (expected, given)
            )
            raise InputError(f"the calibration was made for another encoder ({made_of}), not this ({given_of})")

    def deviation(self, encoder: nn.Module) -> tuple[float, str]:
        """
        How far an encoder's weights are from those that it was made for: of the parameter that is farthest, the root of
        the mean square difference of its samples over that of its values, and its name.
        """
        current = sample_weights(encoder)
        if {name: value.shape for name, value in current.items()} != {
            name: value.shape for name, value in self.weights.items()
        }:
            return float("inf"), next(iter(self.weights.keys() ^ current.keys()), "")
        sizes = {name: float(expected.double().square().mean()) for name, expected in self.weights.items()}
        floor = LEAST**2 * sum(sizes.values()) / max(1, len(sizes))
        deviations = {
            name: (float((current[name] - expected).double().square().mean()) / max(sizes[name] + floor, 1e-30)) ** 0.5
            for name, expected in self.weights.items()
        }
        farthest = max(deviations, key=deviations.__getitem__, default="")
        return deviations.get(farthest, 0.0), farthest

    def check_weights(self, encoder: nn.Module) -> None:
        """
        Raises:
            InputError: for other weights than it was made for.
        """
        deviation, farthest = self.deviation(encoder)
        if not deviation <= TOLERANCE:
            raise InputError(
                f"the calibration was made for other weights: this encoder's differ by up to {deviation:.2g} of their "
                f"size, most in {farthest}: calibrate anew"
            )

    def __repr__(self) -> str:
        return f"Calibration({', '.join(f'{name}={value!r}' for name, value in self.describe().items())})"


def describe_encoder(encoder: nn.Module) -> dict[str, Any]:
    """What an encoder is, as plain values: its class and the sizes of its parameters."""
    parameters = list(encoder.parameters())
    return {"class": base_class(encoder).__name__, "parameters": sum(parameter.numel() for parameter in parameters)}


def sample_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """Some entries of each parameter, by name, in float32 on the CPU."""
    samples = {}
    for name, value in encoder.named_parameters():
        flat = value.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        samples[name] = flat[::step][:SAMPLES].float().cpu().clone()
    return samples


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A description with dotted names for keys; a reducer's ``restore`` is what is called ``restore_mode`` now."""
    if prefix == "reducer.restore":
        prefix = "reducer.restore_mode"
    if not isinstance(value, dict):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    return {
        name: leaf
        for key, item in value.items()
        for name, leaf in _flat(item, f"{prefix}.{key}" if prefix else key).items()
    }
