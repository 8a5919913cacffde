"""
A page that shows what a plan changes, made from a comparison. Its modules need optional packages and are imported only
when a page is made.
"""

import importlib
import os
from pathlib import Path

from hourglass.errors import InputError

PACKAGES = ("jinja2", "matplotlib")
#: What tells a report's folder from one of the user's.
MARK = '<meta name="generator" content="hourglass report">'
FOLDER = "report"
#: Detections are faint from this share of the score on that others have at least.
FAINT = 0.2


def check_packages() -> None:
    """Raise InputError where a package is missing that the page is made with."""
    missing = []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise InputError(f"--report needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def check_report(folder: str | os.PathLike) -> None:
    """
    Check, before a comparison, that its report can be written to ``folder``.

    Raises:
        InputError: where a package is missing, or ``folder`` has a ``report`` that no report was written to.
    """
    check_packages()
    check_report_folder(folder)


def check_report_folder(folder: str | os.PathLike) -> None:
    """Raise InputError where ``folder`` has a ``report`` that no page was written to: it would be replaced."""
    path = Path(folder) / FOLDER
    if not path.exists() or path.is_dir() and not any(path.iterdir()):
        return
    page = path / "index.html"
    if not page.is_file() or MARK not in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise InputError(f"--report replaces {path}, which is not a report: move it, or set train.output_dir")
