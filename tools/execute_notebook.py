#!/usr/bin/env python
"""
Run a notebook's cells and write what they show into it.

    python tools/execute_notebook.py projects/demo/tour.ipynb

Progress bars and warnings are left out, and so is metadata about the machine and the time.
"""

import argparse
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> nbformat.NotebookNode:
    """
    The notebook with its outputs, run in its own folder.

    Raises:
        CellExecutionError: where a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    # This clone's hourglass, whichever is installed.
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", record_timing=False, resources={"metadata": {"path": path.parent}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": search})
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path, help="an .ipynb, which is written anew")
    path = parser.parse_args().notebook
    if not path.is_file():
        print(f"error: notebook {path} is missing", file=sys.stderr)
        sys.exit(2)
    try:
        notebook = execute(path)
    except CellExecutionError as error:
        print(f"error: {path} was not written, a cell fails: {error}", file=sys.stderr)
        sys.exit(2)
    nbformat.write(notebook, path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
