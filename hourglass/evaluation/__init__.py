from hourglass.evaluation.compare import Comparison, Subject, compare
from hourglass.evaluation.instances import InstanceEvaluator
from hourglass.evaluation.panoptic import PanopticEvaluator
from hourglass.evaluation.report import describe, to_json, to_table, write_report

__all__ = [
    "Comparison",
    "InstanceEvaluator",
    "PanopticEvaluator",
    "Subject",
    "compare",
    "describe",
    "to_json",
    "to_table",
    "write_report",
]
