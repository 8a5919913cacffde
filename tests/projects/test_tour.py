"""The notebook runs as it is committed, and what is committed is what it shows."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "projects" / "demo" / "tour.ipynb"
SCRIPT = ROOT / "tools" / "execute_notebook.py"


def execute(path):
    return subprocess.run([sys.executable, SCRIPT, path], capture_output=True, text=True)


def shown(notebook) -> list[str]:
    """The kinds of the outputs, in order."""
    kinds = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text")})
            kinds.append(next((kind for kind in data if kind.startswith("image/")), "text/plain"))
    return kinds


def text_of(notebook) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(TOUR, as_version=4)


def test_all_cells_run(committed, tmp_path):
    copy = tmp_path / "tour.ipynb"
    shutil.copy(TOUR, copy)
    result = execute(copy)
    assert result.returncode == 0, result.stderr  # no cell failed, assertions among them
    notebook = nbformat.read(copy, as_version=4)
    assert shown(notebook) == shown(committed)
    assert shown(notebook).count("image/jpeg") == 2 and shown(notebook).count("image/png") == 1
    # Each model finds as many objects as the committed outputs say, and the errors are theirs.
    found, expected = (re.findall(r"(\d+) objects", text_of(document)) for document in (notebook, committed))
    assert found == expected and len(found) == 3
    errors, expected = (
        [float(value) for value in re.findall(r"tokens: ([\d.]+) %", text_of(document))]
        for document in (notebook, committed)
    )
    assert errors == pytest.approx(expected, rel=0.1) and len(errors) == 3


def test_a_notebook_that_fails_stays_as_it_was(tmp_path):
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2, 'never'")])
    path = tmp_path / "broken.ipynb"
    nbformat.write(broken, path)
    before = path.read_bytes()
    result = execute(path)
    assert result.returncode == 2 and "never" in result.stderr and path.read_bytes() == before
    result = execute(tmp_path / "missing.ipynb")
    assert result.returncode == 2 and result.stderr.endswith("missing.ipynb is missing\n")


def test_what_is_committed_is_small_and_of_no_machine(committed):
    text = TOUR.read_text()
    assert len(text) < 600_000
    assert not re.search(r'(/home|/root|/tmp|/work|/Users)/|site-packages|"(iopub|shell)\.', text)
    nbformat.validate(committed)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(not cell.metadata for cell in committed.cells)
    assert all(
        output.output_type != "error" and output.get("name") != "stderr" for cell in code for output in cell.outputs
    )


def test_links_lead_somewhere(committed):
    targets = [target for cell in committed.cells for target in re.findall(r"\]\(([^)\s]+)\)", cell.source)]
    assert len(targets) > 4
    assert all((TOUR.parent / target).exists() for target in targets if not target.startswith("http"))
