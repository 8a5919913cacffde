from hourglass.evaluation.compare import Comparison, Subject, compare
from hourglass.evaluation.panoptic import PanopticEvaluator
from hourglass.evaluation.report import describe, to_json, to_table, write_report

__all__ = ["Comparison", "PanopticEvaluator", "Subject", "compare", "describe", "to_json", "to_table", "write_report"]
