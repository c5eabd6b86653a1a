"""How large a report of long runs is, and how long it takes to make and to open.

    python benchmarks/report.py [--runs 8] [--steps 1500]

Run directories are filled through the product's own recorder with made-up metrics and with tokens
of 32 completions of up to 1,024 tokens; as many completions are kept as in a real run. The page is
opened in headless Chromium five times, by a fresh profile each; wall seconds are those that a busy
machine gave, CPU seconds those of the page's main thread.
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
from common import machine, print_table, ragged, time_of
from recording import decode, random_record
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from poweropd.config import Config
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Request
from poweropd.report import page
from poweropd.runs.directory import RunDirectory
from poweropd.runs.recorder import RewardRecorder

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
    prompt = Prompt(0, [1, 2], [1, 2])
    rollouts = [
        Request(prompt, i, 0, seed=0).rollout([3] * n, [], stopped=False)
        for i, n in enumerate(lengths)
    ]
    lines = []
    for step in range(1, steps + 1):
        kept = [rollout for rollout in rollouts if recorder.wants(step, rollout)]
        recorder.record(step, records[step % DIFFERENT_STEPS], kept)
        lines.append(json.dumps(metrics(step, draw)))
    recorder.write()
    run.metrics_path.write_text("\n".join(lines) + "\n")
    run.final.mkdir()
    for name in ("config.json", "model.safetensors"):  # a student, as far as a report looks
        (run.final / name).touch()
    return run.path


def metrics(step: int, draw: random.Random) -> dict[str, Any]:
    names = ("loss", "grad_norm", "reward/mean", "reverse_kl", "entropy", "tokens_per_second")
    names += ("reward/zero_fraction", "completions/mean_length")
    seconds = {f"seconds/{name}": draw.random() for name in ("rollout", "score", "update", "sync")}
    values = {name: draw.lognormvariate(0, 1) for name in names}
    values["completions/truncated_fraction"] = draw.random()
    whole = {"seconds/step": 4.0, "memory/peak_bytes": 2**30, "num_tokens": 20_000}
    return {"step": step, **values, **seconds, **whole}


def opening(path: Path) -> list[float]:
    """Seconds to the load event, to the figures in the window, to all figures.

    Then CPU seconds of the page's main thread until each of the last two.
    """
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        browser.set_script_timeout(120)
        try:
            browser.get("about:blank")
            browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
            start = time.perf_counter()
            browser.get(path.resolve().as_uri())
            wall, cpu = [time.perf_counter() - start], []
            for script in (IN_WINDOW, ALL):
                browser.execute_async_script(script)
                wall.append(time.perf_counter() - start)
                found = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
                cpu.append(next(m["value"] for m in found if m["name"] == "TaskDuration"))
            return [*wall, *cpu]
        finally:
            browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = [make_run(folder, number, arguments.steps) for number in range(arguments.runs)]
        made = time_of(lambda: page.write_report(runs, folder / "report.html", None))
        size = (folder / "report.html").stat().st_size
        opened = [opening(folder / "report.html") for _ in range(5)]
    medians = [statistics.median(column) for column in zip(*opened, strict=True)]
    load, shown, drawn, shown_cpu, drawn_cpu = (f"{value:.2f} s" for value in medians)
    print(f"{machine()}, {arguments.runs} runs of {arguments.steps:,} steps")
    rows = [["page", f"{size / 1e6:.1f} MB", ""]]
    rows += [["making it", f"{made[1]:.1f} s", f"{made[0]:.1f} s"]]
    rows += [["opening it, to the load event", load, ""]]
    rows += [["to the figures in the window", shown, shown_cpu]]
    rows += [["to all figures", drawn, drawn_cpu]]
    print_table(["", "wall", "CPU"], rows)


if __name__ == "__main__":
    main()
