"""The model card of a trained student: what it is, how it was made, what was measured."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from poweropd.config import Config
from poweropd.config.sections import RolloutServerConfig, RunConfig, TeacherConfig
from poweropd.runs.directory import RunDirectory, write_atomically

TEMPLATE = "card.md"
TAGS = ["poweropd", "on-policy-distillation", "knowledge-distillation"]
#: Of the last step, as the card names them.
METRICS = {
    "reverse_kl": "KL to the teacher, per sampled token (nats)",
    "entropy": "entropy (nats)",
    "reward/mean": "mean reward",
    "grad_norm": "gradient norm",
    "completions/mean_length": "mean completion length (tokens)",
    "completions/truncated_fraction": "completions cut at the limit (fraction)",
}


def write_card(folder: Path, config: Config, step: int) -> None:
    """Writes README.md into a directory that holds the student after `step` steps."""
    run = RunDirectory(config.run.dir)
    adapter = config.model.lora is not None and not config.model.lora.merge
    evaluation = latest_evaluation(run, step)
    rows = [row for row in run.metrics() if row["step"] <= step]
    card = ModelCard.from_template(
        _data(config, run.path.name, adapter, evaluation),
        template_str=files(__package__).joinpath(TEMPLATE).read_text("utf-8"),
        name=run.path.name,
        adapter=adapter,
        student=config.model.student,
        teacher=" and ".join(teacher.model for teacher in config.teachers.values()),
        prompts=config.data.prompts,
        objective=config.objective.kind,
        reward=", ".join(f"{k} {v}" for k, v in config.reward.model_dump().items() if k != "name"),
        reward_name=config.reward.name,
        step=step,
        steps=config.train.steps,
        recipe=_public(config).to_yaml(),
        metrics=_last_metrics(rows),
        evaluation=[_line(name, result) for name, result in evaluation.items()],
        environment=json.loads((run.path / "environment.json").read_text("utf-8")),
    )
    write_atomically(folder / "README.md", str(card).rstrip() + "\n")


def _public(config: Config) -> Config:
    """Without paths and addresses of the machines that it ran on: they are nobody's business."""
    unknown: dict[str, Any] = {"servers": [], "api_key_env": None}
    teachers = {k: t.model_copy(update=unknown) for k, t in config.teachers.items()}
    one = isinstance(config.teacher, TeacherConfig)
    teacher = teachers[""] if one else config.teacher.model_copy(update=teachers)
    rollout = config.rollout.model_copy(update={"server": RolloutServerConfig()})
    return config.model_copy(update={"run": RunConfig(), "teacher": teacher, "rollout": rollout})


def latest_evaluation(run: RunDirectory, step: int) -> dict[str, Any]:
    """benchmark -> figures of the evaluation at this step; {} where there was none."""
    path = run.evaluations / f"step-{step}" / "results.json"
    return json.loads(path.read_text("utf-8"))["results"] if path.exists() else {}


def _data(config: Config, name: str, adapter: bool, evaluation: Mapping[str, Any]) -> ModelCardData:
    """The front matter. What is no address on the Hub is left out of it; a license is not known."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=benchmark,
            dataset_name=benchmark,
            metric_type=f"avg@{result['k']}",
            metric_value=round(100 * result["avg_at_k"]["mean"], 2),
        )
        for benchmark, result in evaluation.items()
    ]
    return ModelCardData(
        base_model=_hub(config.model.student),
        datasets=_hub(config.data.prompts),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _hub(address: str) -> str | None:
    """An owner/name of the Hub; None for a path, a file or something embedded."""
    local = ":" in address or address.startswith((".", "/", "~")) or Path(address).exists()
    return None if local else address


def _last_metrics(rows: list[dict[str, Any]]) -> dict[str, str]:
    last = rows[-1] if rows else {}
    return {
        title: f"{last[key]:.4g}" for key, title in METRICS.items() if last.get(key) is not None
    }


def _line(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    def percent(key: str) -> str:
        found = result[key]
        mean, low, high = (100 * found[part] for part in ("mean", "low", "high"))
        return f"{mean:.2f} [{low:.2f}, {high:.2f}]"

    return {
        "name": name,
        "problems": result["problems"],
        "k": result["k"],
        "average": percent("avg_at_k"),
        "passed": percent("pass_at_k"),
        "length": f"{result['mean_length']['mean']:.0f}",
    }
