"""How far a student has moved from its start, on prompts that it need not have trained on."""

from collections.abc import Sequence
from pathlib import Path

from poweropd.config import Config
from poweropd.config.teachers import TeacherConfig
from poweropd.data.prompts import Prompt, check_lengths, load_prompts
from poweropd.evaluation.divergence import EXACT, summarize_divergence
from poweropd.evaluation.judging import DivergenceEvaluation, Judges, LocalJudge
from poweropd.evaluation.settings import DivergenceSettings
from poweropd.models import devices
from poweropd.models.language_model import Teacher
from poweropd.runs.files import write_json
from poweropd.teachers.factory import load_teacher_model
from poweropd.training.build import RunInputs
from poweropd.training.trainer import Trainer

PROMPTS = 64  # the first ones of a source
RESULTS = "results.json"


def divergence_from_start(trainer: Trainer, source: str, folder: Path) -> dict[str, float]:
    """Returns the reverse KL of the student to itself before training, in nats per token.

    It is exact over the vocabulary, on completions of `other_prompts`. `folder` gets the
    completions, and in results.json the sums of each prompt. For a training in one process.
    """
    config = trainer.config
    prompts = other_prompts(config, trainer.inputs, source)
    settings = DivergenceSettings(max_new_tokens=config.rollout.longest, seed=config.train.seed)
    subject = trainer.subject()
    models = {"model": subject.identity, "teacher": f"{config.model.student} before training"}
    evaluation = DivergenceEvaluation(prompts, settings, folder, models)
    judges = Judges({"": LocalJudge(_start(trainer), trainer.updater.compare)})
    found = summarize_divergence(evaluation.run(subject, judges, progress=False), EXACT)
    write_json(folder / RESULTS, found.to_dict())
    return {"forgetting": found.figures["reverse_kl"].mean}


def other_prompts(config: Config, inputs: RunInputs, source: str) -> Sequence[Prompt]:
    """Returns the first `PROMPTS` prompts of `source`, a place as in data.prompts.

    Raises UsageError for prompts that cannot be used.
    """
    new = {"prompts": source, "limit": PROMPTS, "teacher_column": None, "holdout": 0}
    prompts = load_prompts(
        config.data.model_copy(update=new), inputs.tokenizer, {"": inputs.tokenizer}
    )
    context = inputs.student_context
    check_lengths(prompts, context, context, config.rollout.longest, source)
    return prompts


def _start(trainer: Trainer) -> Teacher:
    """Loads the student as it was before training, in the place of a teacher."""
    model, student = trainer.config.model, trainer.student
    section = TeacherConfig(
        model=model.student, dtype=model.master_dtype, trust_remote_code=model.trust_remote_code
    )
    loaded = load_teacher_model(section, trainer.accelerator.device)
    dtype = devices.torch_dtype(model.dtype)
    return Teacher(loaded, student.vocab_size, dtype, student.masked_ids)
