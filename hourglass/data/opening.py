"""Opening a data set for a model: errors of evaluation and training are found before the first image."""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, DatasetMapper, Metadata, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads import CascadeROIHeads, ROIHeads
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig
from torch import nn

from hourglass.checks import check_choice, repeated
from hourglass.data.annotations import InstanceFile, open_instances
from hourglass.data.images import SCALINGS
from hourglass.data.loading import check_instances, load_images, load_records
from hourglass.data.mapper import PanopticMapper
from hourglass.data.mending import folder
from hourglass.errors import InputError

# Images that a plan is calibrated on, where search.images says nothing.
FIT_IMAGES = 16
# Known by name: evaluation stands above this module.
PANOPTIC = ("PanopticEvaluator", "COCOPanopticEvaluator")
SEMANTIC = ("SemanticEvaluator", "SemSegEvaluator")


def open_test(cfg: DictConfig, model: nn.Module, max_images: int | None = None) -> list[dict[str, Any]]:
    """
    Open the data set that a model is evaluated on.

    A data set without a JSON (one that a function gives) is written as one for the evaluators that read it, anew at
    each call.

    Args:
        cfg: with ``dataloader.test`` and ``dataloader.evaluator``.
        model: that is evaluated.
        max_images: only the first so many images; None: all.

    Returns:
        the records of the images, which :func:`load_test` reads.

    Raises:
        InputError: see :func:`~hourglass.data.loading.load_records`; for images without an id, with the id of another
            image, or that an evaluator's annotations lack; for tasks that the model or the data do not have; for a
            model with other classes than the data.
    """
    node = cfg.dataloader.test
    name = _single_name(node.dataset)
    _check_batches(node)
    check_choice("dataloader.image_scaling", _scaling(cfg), SCALINGS)
    records = _with_plain_ids(load_records(node, max_images, square_side(model)), name)
    for evaluator in _evaluators(cfg.dataloader.get("evaluator")):
        if issubclass(evaluator.kind, COCOEvaluator):
            _check_coco(evaluator, records, model)
        elif _has_class_name(evaluator.kind, PANOPTIC):
            _check_switch(model, "panoptic_on", evaluator)
            check_classes(model, evaluator.name, things=True, segments=True)
        elif _has_class_name(evaluator.kind, SEMANTIC):
            _check_switch(model, "semantic_on", evaluator)
            check_classes(model, evaluator.name, semantic=True)
    return records


def load_test(cfg: DictConfig, model: nn.Module, records: list[dict[str, Any]]) -> Any:
    """
    The loader of the images of these records, all or some of those that :func:`open_test` gave, in batches of
    ``cfg.evaluation.batch_size``.
    """
    size = cfg.evaluation.get("batch_size", 1) if "evaluation" in cfg else 1
    return load_images(cfg.dataloader.test, records, _scaling(cfg), square_side(model), size)


def open_search(cfg: DictConfig, model: nn.Module) -> Any:
    """
    Open images that a plan is fitted to or chosen on, without their labels: ``search.images`` of ``search.dataset``, or
    of the data set that the model is trained on, read as for evaluation.

    Returns:
        their loader, in each process of a distributed job of all of them.

    Raises:
        InputError: see :func:`~hourglass.data.loading.load_records`.
    """
    records, load = open_search_records(cfg, model, cfg.search.images or FIT_IMAGES)
    return load(records)


def open_search_records(
    cfg: DictConfig, model: nn.Module, count: int
) -> tuple[list[dict[str, Any]], Callable[[list[dict[str, Any]]], Any]]:
    """
    As :func:`open_search`, for so many images.

    Returns:
        their records, and what loads some of them.
    """
    node, square = _search_node(cfg), square_side(model)
    records = _with_plain_ids(load_records(node, count, square, spread=True), search_dataset(cfg))
    return records, lambda chosen: load_images(node, chosen, _scaling(cfg), square, shared=False)


def _search_node(cfg: DictConfig) -> DictConfig:
    node = copy.deepcopy(cfg.dataloader.test)
    _check_batches(node)
    if cfg.search.dataset is not None:
        node.dataset.names = cfg.search.dataset
    elif "train" in cfg.dataloader:
        node.dataset = copy.deepcopy(cfg.dataloader.train.dataset)
    else:
        raise InputError("search.dataset must be the name of a data set where there is no dataloader.train, got null")
    return node


def search_dataset(cfg: DictConfig) -> str:
    """
    The name of the data set that :func:`open_search` opens.

    Raises:
        InputError: where the config names none.
    """
    names = _search_node(cfg).dataset.get("names", "the training images")
    return names if isinstance(names, str) else ", ".join(names)


def open_train(cfg: DictConfig, model: nn.Module) -> Any:
    """
    Open the data sets that a model is trained on; returns the loader.

    Raises:
        InputError: see :func:`~hourglass.data.loading.load_records`; for a model with other classes than the data; for
            masks that the data do not have, or that the mapper does not take.
    """
    node = cfg.dataloader.train
    records = load_records(node)
    names = node.dataset.get("names", "")
    names = [names] if isinstance(names, str) else list(names)
    target, options = _target(node.mapper), node.mapper
    panoptic = isinstance(target, type) and issubclass(target, PanopticMapper)
    plain = isinstance(target, type) and issubclass(target, DatasetMapper)
    semantic = panoptic and options.get("semantic", False) or plain and "sem_seg_file_name" in records[0]
    for name in filter(None, names):
        stuff = panoptic and options.get("stuff", True)
        check_classes(model, name, things=True, segments=stuff, semantic=semantic)
    if plain:
        _check_categories(records, model)
        _check_masks(records, options, model)
    return load_images(node, records, _scaling(cfg), square_side(model))


def _scaling(cfg: DictConfig) -> str:
    return cfg.dataloader.get("image_scaling", "full")


def square_side(model: nn.Module) -> int:
    """The side in pixels of the square that a model of Detectron2's pads its images to; 0: none."""
    is_detectron2 = any(kind.__module__.startswith("detectron2.modeling.meta_arch") for kind in type(model).__mro__)
    constraints = getattr(getattr(model, "backbone", None), "padding_constraints", None) if is_detectron2 else None
    return int((constraints or {}).get("square_size", 0))


# --- what is evaluated --------------------------------------------------------------------------------------------


class _Evaluator(NamedTuple):
    """A call in the config: where it is, what it calls, its arguments and its data set."""

    key: str
    kind: type
    node: DictConfig
    name: str


def _evaluators(node: Any) -> Iterable[_Evaluator]:
    listed = isinstance(node, (ListConfig, list))
    for i, call in enumerate(node if listed else [node]):
        kind = _target(call) if isinstance(call, DictConfig) else None
        if isinstance(kind, type):
            name = call.get("dataset_name")
            yield _Evaluator(f"dataloader.evaluator{f'.{i}' if listed else ''}", kind, call, name or "")


def _target(node: DictConfig) -> Any:
    target = node.get("_target_")
    if isinstance(target, str):
        try:
            return locate(target)
        except Exception as error:  # whatever importing it may raise
            raise InputError(f"_target_ {target!r} cannot be imported") from error
    return target


def _has_class_name(kind: type, names: tuple[str, ...]) -> bool:
    return any(base.__name__ in names for base in kind.__mro__)


def _single_name(dataset: DictConfig) -> str:
    names = dataset.get("names", "")
    if isinstance(names, str):
        return names
    if len(names) != 1:
        raise InputError(
            f"dataloader.test.dataset.names must be one data set, got {list(names)}: evaluators know one at a time, so "
            "run once for each, such as with dataloader.test.dataset.names=" + (names[0] if names else "my_val")
        )
    dataset.names = names[0]  # evaluators are named after it
    return names[0]


def _check_batches(node: DictConfig) -> None:
    size = node.get("batch_size", 1)
    if size != 1:
        raise InputError(
            f"dataloader.test.batch_size must be 1, as evaluation.batch_size sets the images of a batch, got {size!r}"
        )
    node.pop("batch_size", None)  # Detectron2 0.6 does not take it


def _with_plain_ids(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The records with ids that are no types of numpy's, each with one of its own."""
    missing = [i for i, record in enumerate(records) if record.get("image_id") is None]
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(records)} records of data set {name!r} have no image_id, such as number "
            f"{missing[0]}, {records[missing[0]].get('file_name')}: evaluators need one for each image"
        )
    strange = [record for record in records if not isinstance(record["image_id"], (str, Integral))]
    if strange:
        raise InputError(
            f"{len(strange)} of the {len(records)} records of data set {name!r} have an image_id that is neither a "
            f"whole number nor text, such as {strange[0]['image_id']!r} of {strange[0].get('file_name')}"
        )
    twice = repeated(record["image_id"] for record in records)
    if twice:
        second = [record for record in records if record["image_id"] == twice[0]][1]
        raise InputError(
            f"{len(twice)} of the {len(records)} records of data set {name!r} have the image_id of another, such as "
            f"{twice[0]!r} of {second.get('file_name')}: each image takes an id of its own"
        )
    return [{**record, "image_id": id if isinstance(id := record["image_id"], str) else int(id)} for record in records]


# --- COCO's evaluation ----------------------------------------------------------------------------------------------


def _check_coco(evaluator: _Evaluator, records: list[dict[str, Any]], model: nn.Module) -> None:
    instances = _provide_json(evaluator.name, records)
    if instances is None:
        return
    strange = [record for record in records if record["image_id"] not in instances.image_ids]
    if strange:
        raise InputError(
            f"{len(strange)} of the {len(records)} images to be run are not in the instances JSON {instances.path} "
            f"that {evaluator.key} reads, such as {strange[0]['image_id']!r} ({strange[0].get('file_name')})"
        )
    if not instances.annotations:
        raise InputError(f"the instances JSON {instances.path} has no annotation to evaluate against")
    _check_switch(model, "instance_on", evaluator)
    requested = evaluator.node.get("tasks")
    tasks = (
        list(requested) if requested else ["bbox", *(["segm"] if _has_output(model, "mask_on") is not False else [])]
    )
    parts = {
        "segm": ("masks", "mask_on", instances.without_mask),
        "keypoints": ("keypoints", "keypoint_on", instances.without_keypoints),
    }
    for task in tasks:
        if task not in ("bbox", *parts):
            raise InputError(f"{evaluator.key}.tasks must be bbox, segm or keypoints, got {task!r}")
        if task == "bbox":
            continue
        outputs, switch, missing = parts[task]
        remaining = [name for name in tasks if name != task]
        instead = f"'{evaluator.key}.tasks=[{','.join(remaining or ['bbox'])}]' leaves {task} out"
        if _has_output(model, switch) is False:
            raise InputError(f"{evaluator.key}.tasks has {task!r}, but the model gives no {outputs}: {instead}")
        if task == "keypoints":
            if missing.number == instances.annotations:
                raise InputError(
                    f"{evaluator.key}.tasks has {task!r}, but the instances JSON {instances.path} has no {outputs}: "
                    f"{instead}"
                )
        elif missing.number:
            raise InputError(
                f"{evaluator.key}.tasks has {task!r}, but {missing.number} of the {instances.annotations} annotations "
                f"of the instances JSON {instances.path} have no mask, such as annotation {missing.first!r}: {instead}"
            )
    check_classes(model, evaluator.name, things=True)


_converted: dict[str, str] = {}


def _provide_json(name: str, records: list[dict[str, Any]]) -> InstanceFile | None:
    """Instances as `COCOEvaluator` reads them, which by itself would keep a file beyond changes of the data."""
    if name not in DatasetCatalog.list():
        return None
    metadata = MetadataCatalog.get(name)
    path = getattr(metadata, "json_file", None)
    if path and path != _converted.get(name):
        return check_instances(name)
    if path:
        del metadata.json_file
    if metadata.get("thing_classes") is None:
        raise InputError(
            f"data set {name!r} has neither a json_file nor thing_classes in its metadata, of which evaluators need "
            "one: "
            f"MetadataCatalog.get({name!r}).thing_classes = [...] gives the names of its classes"
        )
    for record in records:
        lacking = [key for key in ("height", "width") if record.get(key) is None]
        if lacking:
            raise InputError(f"image {record['image_id']!r} of data set {name!r} has no {' and no '.join(lacking)}")
    try:
        content = convert_to_coco_dict(name)
        with tempfile.NamedTemporaryFile("w", dir=folder(), suffix=".json", delete=False, encoding="utf-8") as file:
            json.dump(content, file, default=_to_plain)
    except Exception as error:  # a function gives whatever it likes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"data set {name!r} cannot be converted to COCO's format ({reason})") from error
    old = _converted.pop(name, None)
    if old:
        os.unlink(old)
    instances = open_instances(file.name, f"of data set {name!r}")
    metadata.json_file = _converted[name] = file.name
    return instances


def _to_plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON")


# --- what a model has -----------------------------------------------------------------------------------------------


def _has_output(model: nn.Module, switch: str) -> bool | None:
    """Whether a model gives masks or keypoints; None where that cannot be known."""
    heads = getattr(model, "roi_heads", None)
    if isinstance(heads, ROIHeads):
        return getattr(heads, switch, None)
    return (
        False if isinstance(model, DenseDetector) or switch == "keypoint_on" and hasattr(model, "panoptic_on") else None
    )


def _check_switch(model: nn.Module, switch: str, evaluator: _Evaluator) -> None:
    """Models such as Mask2Former say what inference gives."""
    if getattr(model, switch, True) is False:
        raise InputError(
            f"{evaluator.key} evaluates what the model does not give, as model.{switch} is false: "
            f"model.{switch}=true, or another evaluator"
        )


class _Classes(NamedTuple):
    """A number of classes that a model has, and the override that sets it."""

    key: str
    number: int


def _thing_classes(model: nn.Module) -> list[_Classes]:
    heads = getattr(model, "roi_heads", None)
    if isinstance(heads, ROIHeads):
        counts = [_Classes("model.roi_heads.num_classes", heads.num_classes)]
        predictors = getattr(heads, "box_predictor", None)
        several = isinstance(heads, CascadeROIHeads) or isinstance(predictors, nn.ModuleList)
        for i, predictor in enumerate([*predictors] if several and predictors is not None else [predictors]):
            if isinstance(count := getattr(predictor, "num_classes", None), int):
                key = f"box_predictors.{i}" if several else "box_predictor"
                counts.append(_Classes(f"model.roi_heads.{key}.num_classes", count))
        return counts
    if isinstance(model, DenseDetector):
        return [_Classes("model.num_classes", model.num_classes)]
    return []


def _segment_classes(model: nn.Module) -> _Classes | None:
    """Of a model of segments, things and stuff alike."""
    if not hasattr(model, "panoptic_on"):
        return None
    if isinstance(count := getattr(model, "num_classes", None), int):
        return _Classes("model.num_classes", count)
    count = getattr(getattr(model, "sem_seg_head", None), "num_classes", None)
    return _Classes("model.sem_seg_head.num_classes", count) if isinstance(count, int) else None


def _semantic_classes(model: nn.Module) -> _Classes | None:
    count = getattr(getattr(getattr(model, "sem_seg_head", None), "predictor", None), "out_channels", None)
    return _Classes("model.sem_seg_head.num_classes", count) if isinstance(count, int) else _segment_classes(model)


def check_classes(
    model: nn.Module, name: str, things: bool = False, segments: bool = False, semantic: bool = False
) -> None:
    """
    Raise InputError where a model has other classes than a data set.

    Args:
        model: Detectron2's with ``roi_heads``, a ``DenseDetector``, or one such as Mask2Former; others pass.
        name: of the data set, loaded before.
        things: its classes of things are found.
        segments: things and stuff are, as the segments of one range of classes.
        semantic: each pixel's class is.
    """
    if name not in DatasetCatalog.list():
        return
    metadata = MetadataCatalog.get(name)
    thing_classes, stuff_classes = _contiguous_ids(metadata, "thing"), _contiguous_ids(metadata, "stuff")
    segment_classes = _segment_classes(model)
    if things and thing_classes is not None:
        for classes in _thing_classes(model):
            _check_number(classes, len(thing_classes), name, "of things")
        if segment_classes and not segments and not getattr(model, "panoptic_on", False):
            _check_number(segment_classes, len(thing_classes), name, "of things")
        model_things = getattr(model, "things", None)
        if (
            segment_classes
            and isinstance(model_things, Collection)
            and getattr(model, "panoptic_on", False)
            and set(model_things) != thing_classes
        ):
            raise InputError(
                f"the model's things are the classes {_format_classes(model_things)} (model.things), those of data set "
                f"{name!r} are {_format_classes(thing_classes)}"
            )
    if segments and segment_classes and thing_classes is not None and stuff_classes is not None:
        _check_number(segment_classes, len(thing_classes | stuff_classes), name, "of things and stuff")
    semantic = semantic or segments and _thing_classes(model) != []
    if semantic and metadata.get("stuff_classes") is not None and (of_pixels := _semantic_classes(model)):
        _check_number(of_pixels, len(metadata.stuff_classes), name, "of pixels")


def _check_number(classes: _Classes, count: int, name: str, subject: str) -> None:
    if classes.number != count:
        raise InputError(
            f"the model has {classes.number} classes {subject} ({classes.key}), data set {name!r} has {count}: "
            f"{classes.key}={count} fits it, with weights of as many"
        )


def _contiguous_ids(metadata: Metadata, kind: str) -> set[int] | None:
    ids = metadata.get(f"{kind}_dataset_id_to_contiguous_id")
    names = metadata.get(f"{kind}_classes")
    if ids is not None:
        return set(ids.values())
    return None if names is None else set(range(len(names)))


def _format_classes(classes: Collection[int]) -> str:
    ordered = sorted(classes)
    if ordered == list(range(len(ordered))):
        return f"0 to {len(ordered) - 1}"
    return f"{ordered[:10]}{' ...' if len(ordered) > 10 else ''}"


# --- training -------------------------------------------------------------------------------------------------------


def _check_masks(records: list[dict[str, Any]], options: DictConfig, model: nn.Module) -> None:
    """What a `DatasetMapper` makes masks of; it leaves crowds out."""
    mapper = "dataloader.train.mapper"
    if not options.get("use_instance_mask", False):
        if _has_output(model, "mask_on"):
            raise InputError(
                f"the model learns masks, which {mapper} does not give: {mapper}.use_instance_mask=true, or "
                "model.roi_heads.mask_in_features=null to train boxes alone"
            )
        return
    total, lacking, runs = 0, [], []
    for record in records:
        for annotation in record.get("annotations", ()):
            if not annotation.get("iscrowd", 0):
                total += 1
                mask = annotation.get("segmentation")
                if mask is None or len(mask) == 0:
                    lacking.append(record)
                elif isinstance(mask, dict):
                    runs.append(record)
    if lacking:
        raise InputError(
            f"{len(lacking)} of the {total} objects to be trained on have no mask, such as one of image "
            f"{_describe_record(lacking[0])}, and {mapper} needs masks: {mapper}.use_instance_mask=false "
            f"{mapper}.recompute_boxes=false model.roi_heads.mask_in_features=null train boxes alone"
        )
    if runs and options.get("instance_mask_format", "polygon") == "polygon":
        raise InputError(
            f"{len(runs)} of the {total} objects to be trained on have masks as RLE, such as one of image "
            f"{_describe_record(runs[0])}, and {mapper} needs polygons: {mapper}.instance_mask_format=bitmask takes "
            "both"
        )


def _describe_record(record: dict[str, Any]) -> str:
    return f"{record.get('image_id')!r} ({record.get('file_name')})"


def _check_categories(records: list[dict[str, Any]], model: nn.Module) -> None:
    """Of data sets that have no names of classes, too: Detectron2 takes the class after the last for background."""
    counts = [*_thing_classes(model), *filter(None, [_segment_classes(model)])]
    if not counts:
        return
    key, count = min(counts, key=lambda classes: classes.number)
    for record in records:
        for annotation in record.get("annotations", ()):
            if not 0 <= annotation.get("category_id", 0) < count:
                raise InputError(
                    f"image {record.get('image_id')!r} ({record.get('file_name')}) has an annotation of the "
                    f"category_id {annotation['category_id']!r}, the model has the classes 0 to {count - 1} ({key})"
                )
