"""Who may import whom inside the package: downwards only."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hourglass"

#: Each room, and what of the package it may import beside itself. The ground floor is open to all.
GROUND = {"checks", "compat", "contexts", "errors", "files", "operators", "version"}
ALLOWED = {
    "checks": {"errors"},
    "compat": set(),
    "contexts": set(),
    "errors": set(),
    "files": {"errors"},
    "operators": set(),
    "version": set(),
    "attention": set(),
    "weights": set(),
    "reduction": {"weights"},
    "encoders": {"attention", "reduction", "weights"},
    "fitting": {"encoders", "reduction"},
    "config": {"encoders", "reduction"},
    "solver": {"encoders"},
    "data": {"weights"},
    "checkpoint": {"weights"},
    "evaluation": {"data", "reduction"},
    "overrides": {"reduction"},
    "training": {"data", "reduction"},
    "search": {"encoders", "evaluation", "fitting", "reduction"},
    "waterfall": {"encoders", "evaluation"},
    "export": {"encoders", "reduction"},
    "report": {"data", "encoders", "evaluation", "reduction"},
    "prediction": {"checkpoint", "data", "encoders", "launch", "reduction", "report"},
    "commands": {
        "data",
        "encoders",
        "evaluation",
        "fitting",
        "launch",
        "prediction",
        "report",
        "search",
        "waterfall",
    },
    "launch": {"data", "overrides", "evaluation", "encoders", "config", "reduction"},
}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, and the packages outside."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            modules.add(parts[1] if parts[0] == "hourglass" and len(parts) > 1 else f"{parts[0]}:")
    return modules


def test_no_room_is_above_and_below_another():
    TopologicalSorter(ALLOWED).prepare()  # raises CycleError


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    own_room = room(path)
    inside = {name for name in imported(path) if not name.endswith(":")} - {own_room}
    assert inside <= ALLOWED[own_room] | GROUND, f"{own_room} imports {sorted(inside - ALLOWED[own_room] - GROUND)}"
    if own_room in ("reduction", "attention"):
        assert "detectron2:" not in imported(path)


def test_a_reducers_kind_is_asked_for_in_reduction_alone():
    """Elsewhere reducers say themselves what they can."""
    kinds = {"GridReducer", "MergingReducer", "SelectingReducer", "SkipBlocks"}
    for path in FILES:
        if room(path) == "reduction":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                assert not kinds & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}, path
