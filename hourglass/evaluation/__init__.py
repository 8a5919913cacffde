from hourglass.evaluation.compare import Comparison, Subject, compare
from hourglass.evaluation.instances import InstanceEvaluator
from hourglass.evaluation.panoptic import PanopticEvaluator
from hourglass.evaluation.report import describe, to_class_tables, to_csv, to_json, to_table, to_text, write_report
from hourglass.evaluation.semantic import SemanticEvaluator

__all__ = [
    "Comparison",
    "InstanceEvaluator",
    "PanopticEvaluator",
    "SemanticEvaluator",
    "Subject",
    "compare",
    "describe",
    "to_class_tables",
    "to_csv",
    "to_json",
    "to_table",
    "to_text",
    "write_report",
]
