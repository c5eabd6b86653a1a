"""How large a report of long runs is, and how long it takes to make and to open.

    python benchmarks/report.py [--runs 8] [--steps 1500] [--keep DIR]

Run directories are filled through the product's own recorder with made-up metrics and with tokens
of 32 completions of up to 1,024 tokens; as many completions are kept as in a real run. The page is
opened in headless Chromium three times, by a fresh profile each: to the load event, to the
figures in the window being drawn, and to all figures being drawn.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, print_table, ragged
from recording import decode, random_record
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from poweropd.batching import Rollout
from poweropd.config import Config
from poweropd.records import RewardRecorder, RunDirectory
from poweropd.report import page

REWARDS = ["log_ratio", "clip", "tanh", "zscore", "power", "hellinger", "gate", "power"]
DIFFERENT_STEPS = 20  # records are made once and used in turn: they look the same in a picture
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1400,1000",
)
# The page's own functions: `views` holds the figures that were begun, `show` begins one.
IN_WINDOW = """const done = arguments[0];
requestAnimationFrame(() => setTimeout(() => Promise.all(Object.values(views)).then(() => done())));
"""
ALL = "const done = arguments[0]; Promise.all(charts.map(show)).then(() => done());"


def make_run(folder: Path, number: int, steps: int) -> Path:
    """A finished run directory of `steps` steps."""
    name = REWARDS[number % len(REWARDS)]
    config = Config.from_dict(
        {
            "run": {"dir": str(folder / f"{number}-{name}")},
            "model": {"student": "embedded:student"},
            "teacher": {"model": "embedded:teacher"},
            "data": {"prompts": "embedded:train"},
            "reward": {"name": name},
            "train": {"seed": number},
        }
    )
    run = RunDirectory.open(config)
    recorder = RewardRecorder(run.rewards, decode)
    lengths, draw = ragged(32, 1024), random.Random(number)
    records = [random_record(lengths, number * steps + i) for i in range(DIFFERENT_STEPS)]
    rollouts = [Rollout(i, 0, [1, 2], [1, 2], [3] * n, [], False) for i, n in enumerate(lengths)]
    lines = []
    for step in range(1, steps + 1):
        kept = [rollout for rollout in rollouts if recorder.wants(step, rollout)]
        recorder.record(step, records[step % DIFFERENT_STEPS], kept)
        lines.append(json.dumps(metrics(step, draw)))
    recorder.write()
    run.metrics_path.write_text("\n".join(lines) + "\n")
    run.final.mkdir()
    return run.path


def metrics(step: int, draw: random.Random) -> dict[str, Any]:
    names = ("loss", "grad_norm", "reward/mean", "reverse_kl", "entropy", "tokens_per_second")
    names += ("reward/zero_fraction", "completions/mean_length", "completions/truncated_fraction")
    seconds = {f"seconds/{name}": draw.random() for name in ("rollout", "score", "update", "sync")}
    values = {name: draw.lognormvariate(0, 1) for name in names}
    whole = {"seconds/step": 4.0, "memory/peak_bytes": 2**30, "num_tokens": 20_000}
    return {"step": step, **values, **seconds, **whole}


def opening(path: Path) -> tuple[float, float, float]:
    """Seconds to the load event, to figures in the window, to all figures."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        browser.set_script_timeout(120)
        try:
            start = time.perf_counter()
            browser.get(path.resolve().as_uri())
            load = time.perf_counter() - start
            browser.execute_async_script(IN_WINDOW)
            shown = time.perf_counter() - start
            browser.execute_async_script(ALL)
            return load, shown, time.perf_counter() - start
        finally:
            browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--keep", type=Path, help="leave runs and page here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        runs = [make_run(folder, number, arguments.steps) for number in range(arguments.runs)]
        start = time.perf_counter()
        page.write(runs, folder / "report.html", None)
        made, size = time.perf_counter() - start, (folder / "report.html").stat().st_size
        opened = [opening(folder / "report.html") for _ in range(3)]
    load, shown, drawn = (statistics.median(column) for column in zip(*opened, strict=True))
    print(f"{machine()}, {arguments.runs} runs of {arguments.steps:,} steps")
    rows = [["page", f"{size / 1e6:.1f} MB"], ["to make it", f"{made:.1f} s"]]
    rows += [["to its load event", f"{load:.2f} s"]]
    rows += [["to the figures in the window", f"{shown:.2f} s"], ["all figures", f"{drawn:.2f} s"]]
    print_table(["", ""], rows)


if __name__ == "__main__":
    main()
