"""Seconds from the start of a command to its first useful line, or to its error.

    python benchmarks/startup.py --repeats 5 --json startup.json

Each command runs in a process of its own, with its output in a file, as a cluster's job has it. The
times are CPU seconds of that process, which depend less on other work than the clock does, and
those of the clock. The first lines are shown, and a median of CPU seconds above the limit (1 s for
an answer, 10 s for a first line) ends the benchmark with status 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

RECIPE = """\
model: {student: embedded:student, dtype: float32}
teacher: {model: embedded:teacher, dtype: float32}
data: {prompts: embedded:train}
rollout: {max_new_tokens: 16}
train: {steps: 2, prompts_per_step: 2}
"""
ERRORS = [
    "--version",
    "train nothere.yaml",
    "train broken.yaml",
    "train noprompts.yaml",
    "plan broken.yaml",
    "sweep broken.yaml --over reward.alpha=1,2",
    "eval nothere/ --benchmark embedded",
    "report nothere",
]
STARTS = [
    "train recipe.yaml",
    "eval embedded:student --benchmark embedded --limit 4 --n 1 --max-new-tokens 8",
    "demo --steps 2 --problems 16",
]


LIMITS = {"answer": 1.0, "first line": 10.0}  # CPU seconds


@dataclass(frozen=True)
class Start:
    """What a command took, and its first line if that is what was waited for."""

    cpu: float
    clock: float
    line: str = ""


def cpu_seconds(pid: int) -> float:
    """Returns user and system seconds of a process so far, by /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def to_the_end(command: list[str], folder: Path) -> Start:
    """Runs a command that ends by itself."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=-3, stderr=-3)
    cpu = sum(os.wait4(process.pid, 0)[2][:2])
    return Start(cpu, time.perf_counter() - begun)


def to_the_first_line(command: list[str], folder: Path) -> Start:
    """Runs a command until its output file has a line."""
    begun = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder) as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        while not Path(output.name).read_bytes().count(b"\n"):
            assert process.poll() is None, "it ended without a line"
            time.sleep(0.01)
        cpu, clock = cpu_seconds(process.pid), time.perf_counter() - begun
        process.terminate()
        process.wait()
        return Start(cpu, clock, Path(output.name).read_text().partition("\n")[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="Also write the figures here.")
    options = parser.parse_args()
    found, late = {}, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(RECIPE)
        (folder / "broken.yaml").write_text("model: {student: 3")
        (folder / "noprompts.yaml").write_text(RECIPE.replace("embedded:train", "no.jsonl"))
        for kind, lines, measure in (
            ("answer", ERRORS, to_the_end),
            ("first line", STARTS, to_the_first_line),
        ):
            for line in lines:
                command = [sys.executable, "-m", "poweropd", *line.split()]
                starts = [measure(command, folder) for _ in range(options.repeats)]
                cpu = statistics.median(start.cpu for start in starts)
                clock = statistics.median(start.clock for start in starts)
                late += cpu > LIMITS[kind]
                found[line] = {
                    "kind": kind,
                    "median": cpu,
                    "clock": clock,
                    "all": [start.cpu for start in starts],
                    "line": starts[-1].line,
                }
                print(f"{kind:10}  {cpu:5.2f} s  ({clock:5.2f} s by the clock)  poweropd {line}")
                if starts[-1].line:
                    print(f"{'':12}{starts[-1].line}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
