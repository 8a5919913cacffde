"""Mask2Former (arXiv 2112.01527) as a Detectron2 meta-architecture around Hugging Face's decoders."""

try:
    import scipy  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"Mask2Former needs {error.name}: pip install scipy transformers") from error

from projects.mask2former.inference import instance_inference, panoptic_inference, semantic_inference
from projects.mask2former.model import Mask2Former
from projects.mask2former.solver import optimizer_params
from projects.mask2former.weights import rename_weights

__all__ = [
    "Mask2Former",
    "instance_inference",
    "optimizer_params",
    "panoptic_inference",
    "rename_weights",
    "semantic_inference",
]
