#!/usr/bin/env python
"""
Everything that needs a CUDA device, in one go: the tests marked cuda, then the encoder benchmark of ViTDet-B, L, H and
Swin-L in bfloat16 with torch.compile. Results lie as JSON and tables in one folder.

    make gpu
    python -m benchmarks.gpu --models vitdet_l
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"vitdet_b": 1024, "vitdet_l": 1024, "vitdet_h": 1024, "swin_l": 1152}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all four")
    parser.add_argument("--output", default="output/gpu", metavar="FOLDER", help="folder of results (output/gpu)")
    parser.add_argument("--limit", type=int, default=520, metavar="SECONDS", help="start no new step after this (520)")
    return parser.parse_args(arguments)


def steps(args: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> arguments of Python."""
    commands = {"tests": ["-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests"]}
    for model in args.models:
        options = {"--model": model, "--size": str(MODELS[model]), "--output": str(Path(args.output).absolute())}
        options |= {"--device": "cuda", "--dtype": "bfloat16", "--repeats": "20"}
        pairs = [word for option in options.items() for word in option]
        commands[model] = ["-m", "benchmarks.encoder", *pairs, "--published", "--compile"]
    return commands


def main(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("error: make gpu needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    began, outcomes = time.monotonic(), {}
    for name, command in steps(args).items():
        if time.monotonic() - began > args.limit:
            outcomes[name] = "left out, time is up"
            continue
        print(f"== {name}", flush=True)
        start = time.monotonic()
        with open(folder / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
        code = process.wait()
        outcomes[name] = f"{'done' if code == 0 else f'failed (exit code {code})'}, {time.monotonic() - start:.0f} s"
    print("\n" + "\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()) + f"\nresults in {folder}")
    return 0 if all(outcome.startswith("done") for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(parse()))
