"""
Everything that one Detectron2 release has and another has not.

Importing this module mends what Detectron2 0.6 needs on current releases of Pillow and numpy, and lets it be
imported without its compiled extension. Where nothing is missing, nothing is changed.
"""

import importlib
import os
import sys
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn


def _mend_pillow() -> None:
    # Pillow 10 removed the old name; Detectron2 0.6 reads it when detectron2.data is imported.
    if not hasattr(Image, "LINEAR"):
        setattr(Image, "LINEAR", Image.Resampling.BILINEAR)  # noqa: B010


def _mend_numpy() -> None:
    # numpy 1.24 removed these aliases of the builtins (np.bool came back in 2.0).
    for name, builtin in (("bool", bool), ("int", int), ("float", float)):
        if name not in np.__dict__:
            setattr(np, name, builtin)


class _MissingExtension(ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):  # what the import system asks of any module
            raise AttributeError(name)
        raise ImportError(
            f"detectron2._C.{name} was asked for, but this Detectron2 was installed without its compiled extension "
            "(deformable convolution, rotated boxes and the fast COCO evaluation need it)"
        )


class _OfficialEvaluation(ModuleType):
    """In place of ``detectron2.evaluation.fast_eval_api``: pycocotools' evaluation, imported when it is asked for."""

    def __getattr__(self, name: str):
        if name != "COCOeval_opt":
            raise AttributeError(name)
        from pycocotools.cocoeval import COCOeval

        return COCOeval


def _mend_extension() -> None:
    import detectron2

    try:
        import detectron2._C  # noqa: F401
    except ImportError:
        pass
    else:
        return
    try:
        # The main branch asks for the extension with a fallback of its own, wherever it does.
        import detectron2.layers  # noqa: F401
    except ImportError:
        # The 0.6 release does not. Its layers get a module that says what is missing when it is used; it is taken
        # away again, so that who tries to import the extension learns that it is not there.
        extension = _MissingExtension("detectron2._C")
        sys.modules["detectron2._C"] = detectron2._C = extension
        try:
            import detectron2.layers  # noqa: F401
        finally:
            del sys.modules["detectron2._C"], detectron2._C
        # COCOEvaluator of the main branch falls back to pycocotools, that of the 0.6 release does so with this.
        name = "detectron2.evaluation.fast_eval_api"
        sys.modules[name] = _OfficialEvaluation(name)


def detectron2_encoder(name: str) -> type | None:
    """Detectron2's own ``ViT`` or ``SwinTransformer`` (its main branch has them, the 0.6 release has not)."""
    import detectron2.modeling

    return getattr(detectron2.modeling, name, None)


def size_divisibility(encoder: nn.Module) -> int:
    """What an encoder's images are padded to multiples of; 0: nothing."""
    # On the main branch, SwinTransformer's own property reads an attribute that is spelt otherwise.
    return getattr(encoder, "size_divisibility", getattr(encoder, "_size_devisibility", 0))


def tracing_adapter() -> type:
    """Detectron2's ``TracingAdapter``. The 0.6 release's ``detectron2.export`` asks for Caffe2 first."""
    import detectron2

    try:
        from detectron2.export import TracingAdapter

        return TracingAdapter
    except ImportError:
        name = "detectron2.export"
        package = ModuleType(name)
        package.__path__ = [os.path.join(path, "export") for path in detectron2.__path__]
        before = sys.modules.get(name)
        sys.modules[name] = package
        try:
            return importlib.import_module(f"{name}.flatten").TracingAdapter
        finally:  # who imports the package learns what it lacks
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before


def init_process_group(device: str) -> None:
    """
    Join the processes that ``torchrun`` started, as Detectron2's ``launch`` does for those that it starts itself:
    NCCL for CUDA, gloo for the CPU.

    Args:
        device: "cuda" or "cpu".
    """
    from detectron2.utils import comm

    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    # The 0.6 release has no function for this: launch() sets the module's variable, and so does this.
    for machine in range(dist.get_world_size() // local_size):
        ranks = list(range(machine * local_size, (machine + 1) * local_size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group
    comm.synchronize()


_mend_pillow()
_mend_numpy()
_mend_extension()
