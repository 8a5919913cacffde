"""The known figures of accuracy: their labels, and for which of them retention is reported."""

from collections.abc import Iterable
from typing import NamedTuple


class Figure(NamedTuple):
    """
    A figure of accuracy, in percent.

    Attributes:
        task: as evaluators call it, such as "bbox".
        metric: as evaluators call it, such as "AP".
        label: in the table; None: for the document alone.
        main: whether it is the task's main figure: the mean over classes, which is told by class too.
        retention: whether the share of it that a model keeps is told.
        interval: whether images can be drawn again for it, so that its retention has an interval.
    """

    task: str
    metric: str
    label: str | None
    main: bool = False
    retention: bool = False
    interval: bool = False

    @property
    def key(self) -> str:
        """ "task.metric" """
        return f"{self.task}.{self.metric}"


FIGURES = (
    Figure("bbox", "AP", "box AP", main=True, retention=True, interval=True),
    Figure("bbox", "AP50", "box AP50"),
    Figure("bbox", "AP75", "box AP75"),
    Figure("bbox", "APs", "box APs"),
    Figure("bbox", "APm", "box APm"),
    Figure("bbox", "APl", "box APl"),
    Figure("segm", "AP", "mask AP", main=True, retention=True, interval=True),
    Figure("segm", "AP50", "mask AP50"),
    Figure("segm", "AP75", "mask AP75"),
    Figure("segm", "APs", "mask APs"),
    Figure("segm", "APm", "mask APm"),
    Figure("segm", "APl", "mask APl"),
    Figure("panoptic_seg", "PQ", "PQ", main=True, retention=True, interval=True),
    Figure("panoptic_seg", "SQ", "SQ"),
    Figure("panoptic_seg", "RQ", "RQ"),
    Figure("panoptic_seg", "PQ_th", "PQ things"),
    Figure("panoptic_seg", "SQ_th", "SQ things"),
    Figure("panoptic_seg", "RQ_th", "RQ things"),
    Figure("panoptic_seg", "PQ_st", "PQ stuff"),
    Figure("panoptic_seg", "SQ_st", "SQ stuff"),
    Figure("panoptic_seg", "RQ_st", "RQ stuff"),
    Figure("sem_seg", "mIoU", "mIoU", main=True, retention=True, interval=True),
    Figure("sem_seg", "fwIoU", None),
    Figure("sem_seg", "mACC", None),
    Figure("sem_seg", "pACC", None),
)
_KNOWN = {figure.key: figure for figure in FIGURES}
# A task whose figures are AP is reported with each AP that its evaluator gives, LVIS's APr among them.
_AP_TASKS = {"bbox": "box", "segm": "mask"}
_CLOSED_TASKS = {figure.task for figure in FIGURES if figure.main and figure.metric != "AP"}
# What evaluators call the figure of a class, such as "AP-person", where it is not the main figure's name.
_CLASS_PREFIXES = {"mIoU": "IoU"}


def find_figure(task: str, metric: str) -> Figure | None:
    """
    The figure of an evaluator's ``results[task][metric]``.

    Returns:
        the table's; of tasks that the table does not have, and those of AP, one for each AP of all classes; None for
        what is not reported.
    """
    figure = _KNOWN.get(f"{task}.{metric}")
    if figure or task in _CLOSED_TASKS or not metric.startswith("AP") or "-" in metric:
        return figure
    main = metric == "AP"
    return Figure(task, metric, f"{_AP_TASKS.get(task, task)} {metric}", main=main, retention=main, interval=main)


def reported(task: str, metrics: Iterable[str]) -> list[Figure]:
    """The figures of a task that are reported, in the evaluator's order."""
    return [figure for metric in metrics if (figure := find_figure(task, metric))]


def split_key(key: str) -> tuple[str, str]:
    """ "task.metric" -> (task, metric)"""
    task, _, metric = key.rpartition(".")
    return task, metric


def label_of(key: str, max_detections: int | None = None) -> str:
    """
    What "task.metric" is called in tables.

    Args:
        key: of a figure that is reported.
        max_detections: as for :func:`limit_of`.
    """
    figure = find_figure(*split_key(key))
    assert figure is not None, f"{key} is no figure"
    return f"{figure.label or figure.metric}{limit_of(key, max_detections)}"


def limit_of(key: str, max_detections: int | None) -> str:
    """What "task.metric" is to say of the limit of detections an image: AP's own, unless it is COCO's, which is 100."""
    limited = split_key(key)[1].startswith("AP") and max_detections not in (None, 100)
    return f" (maxDets {max_detections})" if limited else ""


def by_class(figure: Figure, metrics: dict[str, float]) -> dict[str, float]:
    """
    Args:
        figure: a task's main one.
        metrics: what an evaluator gives of the task.

    Returns:
        class -> its figure, of those that are in `metrics` as "AP-person" or "IoU-sky".
    """
    prefix = f"{_CLASS_PREFIXES.get(figure.metric, figure.metric)}-"
    return {name[len(prefix) :]: value for name, value in metrics.items() if name.startswith(prefix)}
