"""Running the command in this process."""

import json
from pathlib import Path

import pytest

import train_net


def run(*arguments: str) -> None:
    train_net.run(train_net.parse(list(arguments)))


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


def read(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text())
