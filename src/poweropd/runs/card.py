"""The model card of a trained student: what it is, how it was made, what was measured."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from poweropd.config import Config
from poweropd.config.fields import Address, Private, Section
from poweropd.config.rollouts import VllmConfig
from poweropd.embedded import EMBEDDED_PREFIX
from poweropd.runs.directory import RunDirectory
from poweropd.runs.files import JsonObject, write_atomically
from poweropd.runs.metrics import OF_STEPS, StepMetrics

TEMPLATE = "card.md"
TAGS = ["poweropd", "on-policy-distillation", "knowledge-distillation"]


def write_card(
    folder: Path, config: Config, step: int, teachers: Sequence[JsonObject] = ()
) -> None:
    """Writes README.md into a directory that holds the student after `step` steps.

    teachers: the rows of its `TeacherManifest`.
    """
    run = RunDirectory(config.run.dir, notes=[])
    adapter = config.model.lora is not None and not config.model.lora.merge
    evaluation = run.evaluation(step)
    rows = [row for row in run.metrics() if row["step"] <= step]
    card = ModelCard.from_template(
        _data(config, run.path.name, adapter, evaluation),
        template_str=files(__package__).joinpath(TEMPLATE).read_text("utf-8"),
        name=run.path.name,
        adapter=adapter,
        student=public_name(config.model.student),
        teacher=config.teacher_names(public_name),
        prompts=public_name(config.data.prompts),
        objective=config.objective.kind,
        reward=", ".join(f"{k} {v}" for k, v in config.reward.model_dump().items() if k != "name"),
        reward_name=config.reward.name,
        step=step,
        steps=config.train.steps,
        recipe=config.to_yaml(_public(config)),
        metrics=_last_metrics(rows),
        teachers=[{**row, "model": public_name(row["model"])} for row in teachers],
        evaluation=[_evaluation_line(name, result) for name, result in evaluation.items()],
        environment=run.environment(),
    )
    write_atomically(folder / "README.md", str(card).rstrip() + "\n")


def _public(section: Section) -> JsonObject:
    """Returns a section without what is private: paths, addresses, prompt texts, secrets."""
    found: JsonObject = {}
    for key, value in section:
        field = type(section).model_fields.get(key)
        marks = [type(m) if not isinstance(m, type) else m for m in field.metadata] if field else []
        library = isinstance(section, VllmConfig) and isinstance(value, str)
        if key == "run" or Private in marks or library:
            continue
        if isinstance(value, Section):
            found[key] = _public(value)
        elif Address in marks:
            many = isinstance(value, list)
            found[key] = [_public_one(one) for one in value] if many else public_name(value)
        else:
            found[key] = value
    return found


def _public_one(benchmark: str | Section) -> object:
    return _public(benchmark) if isinstance(benchmark, Section) else public_name(benchmark)


def public_name(address: str | None) -> str | None:
    """Returns a name on the Hub or of the embedded pair as it is; of a path, its last part."""
    if address is None or address.startswith(EMBEDDED_PREFIX) or _hub(address):
        return address
    return Path(address).name


def _data(
    config: Config, name: str, adapter: bool, evaluation: Mapping[str, JsonObject]
) -> ModelCardData:
    """Returns the front matter, without a license and without models and data outside the Hub."""
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
    """Returns an owner/name of the Hub; None for a path, a file or something embedded."""
    local = ":" in address or address.startswith((".", "/", "~")) or Path(address).exists()
    return None if local else address


def _last_metrics(rows: list[StepMetrics]) -> dict[str, str]:
    """Returns heading -> text for the metrics of the last step that the card shows."""
    shown = [(m, rows[-1].get(m.key)) for m in OF_STEPS if m.card] if rows else []
    return {m.heading: f"{value:{m.card}}" for m, value in shown if value is not None}


def _evaluation_line(name: str, result: JsonObject) -> JsonObject:
    """Returns what the card's line of a benchmark says; accuracies in percent."""

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
