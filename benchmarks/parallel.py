"""What `poweropd sweep --parallel 2` gains over one run after another.

    python benchmarks/parallel.py --runs 4 --steps 20 --repeats 3 --json parallel.json

A sweep of the embedded pair over alphas, as a command, in turns with one run at a time and with
more. Wall seconds are what parallel runs are for; they mean something on an idle machine alone.
CPU seconds count all processes of a sweep.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, print_table

RECIPE = """\
model: {student: embedded:student, dtype: float32}
teacher: {model: embedded:teacher, dtype: float32}
data: {prompts: embedded:train}
rollout: {max_new_tokens: 64}
train: {steps: STEPS, prompts_per_step: 8, learning_rate: 2.0e-5}
"""
ALPHAS = (0.5, 1, 2, 5, 10, 20, 50, 100)


def cost_of(parallel: int, runs: int, steps: int) -> tuple[float, float]:
    """Wall and CPU seconds of a sweep of so many runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(RECIPE.replace("STEPS", str(steps)))
        command = [sys.executable, "-m", "poweropd", "sweep", "recipe.yaml", "--out", "out"]
        command += ["--parallel", str(parallel)]
        command += ["--over", "reward.alpha=" + ",".join(map(str, ALPHAS[:runs]))]
        with (folder / "log").open("w") as log:
            begun = time.perf_counter()
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
            _, status, used = os.wait4(process.pid, 0)
            wall = time.perf_counter() - begun
        if status:
            raise SystemExit((folder / "log").read_text())
        return wall, used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=4, choices=range(1, len(ALPHAS) + 1))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--parallel", default="1,2", help="numbers of runs at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    numbers = [int(part) for part in arguments.parallel.split(",")]
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in numbers}
    for _ in range(arguments.repeats):
        for number, costs in found.items():
            costs.append(cost_of(number, arguments.runs, arguments.steps))
    print(f"{machine()}; {arguments.runs} runs of {arguments.steps} steps\n")
    first = found[numbers[0]]
    rows = []
    for number, costs in found.items():
        wall, cpu = (statistics.median(column) for column in zip(*costs, strict=True))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(costs, first, strict=True))
        rows.append([str(number), f"{wall:.1f}", f"{cpu:.1f}", f"{ratio:.2f}"])
    print_table(["at a time", "wall s", "CPU s", f"wall / {numbers[0]} at a time"], rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "costs": found}, indent=2))


if __name__ == "__main__":
    main()
