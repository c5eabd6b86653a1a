"""Combinations of settings that are valid alone but not together."""

from collections.abc import Iterable, Iterator

from poweropd.config import evaluate as evaluation
from poweropd.config import rollouts, sections, teachers
from poweropd.config.data import DataConfig
from poweropd.config.fields import ScheduleConfig
from poweropd.models import AUTO_DTYPE
from poweropd.rewards import Reward
from poweropd.rollouts import staleness_problem


def needs_local_teacher(
    objective: sections.ObjectiveConfig, rollout: rollouts.RolloutConfig
) -> str | None:
    """Returns the setting that needs the teacher's hidden states, as "objective.kind=full_vocab".

    It is None if the teacher's log-probs of the sampled tokens are enough, or those of its most
    probable tokens, which servers give too.
    """
    select = objective.select
    whole = objective.teacher_top_k is None
    needs = {
        "objective.kind=full_vocab": whole and objective.kind == "full_vocab",
        "objective.baseline=value": whole and objective.baseline == "value",
        "objective.stop=semantic": objective.stop == "semantic",
        "rollout.score=truncated": rollout.truncates_scores,
        "objective.select.name=teachable": select is not None and select.name == "teachable",
    }
    return next((setting for setting, holds in needs.items() if holds), None)


def conflicts(
    objective: sections.ObjectiveConfig,
    rollout: rollouts.RolloutConfig,
    reward: Reward | None,
    teacher: teachers.AnyTeacher,
) -> Iterator[str]:
    """Yields what is wrong with a combination of settings, with the key in front.

    `reward` is None if it is the user's own code and is not to be imported.
    """
    select, truncated = objective.select, rollout.score == "truncated"
    if objective.kind == "full_vocab":
        if reward is not None and reward.needs_statistics:
            yield "objective.kind: full_vocab needs a pointwise reward, got zscore"
        if objective.baseline != "none":
            yield (
                "objective.baseline: value needs objective.kind=sampled; full_vocab has no "
                "sampling noise that a baseline could take away"
            )
        if rollout.correction != "none":
            yield (
                "rollout.correction: truncated needs objective.kind=sampled; full_vocab does not "
                "depend on how a token was sampled"
            )
        if rollout.off_policy is not None and rollout.task_reward is not None:
            yield (
                "rollout.task_reward: beside rollout.off_policy it needs objective.kind=sampled, "
                "since full_vocab has no weights for the tokens that it rewards"
            )
    elif objective.top_k is not None:
        yield (
            f"objective.top_k: {objective.top_k} needs objective.kind=full_vocab; to sample "
            "from the most probable ids set rollout.top_k"
        )
    yield from _of_teacher_top_k(objective, rollout)
    if select is not None:
        yield from _of_selection(select)
    if truncated and objective.stop == "cross":
        yield (
            "rollout.score: truncated cannot go with objective.stop=cross, which scores the "
            "teacher on an id that may be outside the student's support"
        )
    if truncated and isinstance(rollout.temperature, ScheduleConfig):
        yield (
            "rollout.temperature: a schedule needs rollout.score=full, for the support of "
            "truncated is that of one temperature"
        )
    elif truncated and rollout.temperature == 0:
        yield (
            "rollout.score: truncated needs rollout.temperature > 0, for the support of "
            "greedy sampling is a single id"
        )
    if stale := staleness_problem(rollout.staleness, rollout.engine):
        yield stale
    need = needs_local_teacher(objective, rollout)
    yield from _of_spans(teacher, need, objective)
    if need is not None:
        yield from _of_teacher(teacher, need)


def reference_conflicts(
    reference: teachers.ReferenceConfig | None,
    reward: Reward | None,
    objective: sections.ObjectiveConfig,
    rollout: rollouts.RolloutConfig,
    own: Iterable[teachers.TeacherConfig],
    adapted: bool,
) -> Iterator[str]:
    """Yields what cannot go with a reward's reference model; `own` are the recipe's teachers.

    adapted: whether the student before training is its module without the adapter.
    """
    if reward is None:
        return
    if not reward.needs_reference:
        if reference is not None:
            yield "reference: this reward looks at no reference model: set reward.name=extrapolate"
        return
    # A selection may look at the whole vocabulary; what trains is the sampled token all the same.
    trained = objective.model_copy(update={"select": None, "teacher_top_k": None})
    whole = needs_local_teacher(trained, rollout)
    if whole is not None:
        yield (
            f"reward: extrapolate knows the reference's probability of the sampled token alone, "
            f"and {whole} needs those of the whole vocabulary"
        )
    for teacher in own:
        if teacher.measure_quantization:
            yield "teacher.measure_quantization: it cannot go with reward extrapolate"
        if teacher.align == "spans":
            yield "teacher.align: spans cannot go with reward extrapolate, which scores tokens"
    if adapted and reference is not None and reference.model is None:
        for key, default in {"dtype": AUTO_DTYPE, "offload": False}.items():
            if reference.model_dump()[key] != default:
                yield (
                    f"reference.{key}: with model.lora the reference is the student's own module "
                    "without its adapter: leave it out, or name a reference.model"
                )


def weight_conflicts(teacher: teachers.AnyTeacher) -> Iterator[str]:
    """Yields why a teacher's weight means nothing."""
    if isinstance(teacher, teachers.TeacherConfig) and teacher.weight != 1:
        yield "teacher.weight: it belongs to one of several teachers (teacher.by, teacher.mix)"


def mixture_conflicts(
    teacher: teachers.AnyTeacher,
    data: DataConfig,
    objective: sections.ObjectiveConfig,
    evaluate: evaluation.EvaluateConfig | None,
    train: sections.TrainConfig,
) -> Iterator[str]:
    """Yields what a mixture of teachers cannot go with, with the key in front."""
    if not isinstance(teacher, teachers.TeachersConfig) or not teacher.mix:
        return
    if data.teacher_reads_more:
        yield (
            "teacher.mix: all teachers read the student's prompt: drop data.teacher_column, "
            "teacher_prompt and teacher_system"
        )
    if objective.teacher_top_k is not None:
        yield "objective.teacher_top_k: teacher.mix has no most probable tokens: drop it"
    if any(one.align == "spans" for one in teachers.by_key(teacher).values()):
        yield "teacher.mix: teachers of a mixture must share the vocabulary; drop align: spans"
    evaluate = evaluation.resolved(evaluate, data, train)
    if evaluate is not None and evaluate.divergence is not None:
        yield (
            "evaluate.divergence: a mixture of teachers (teacher.mix) has no distribution to "
            "compare with: set evaluate.benchmarks, without divergence"
        )


def _of_selection(select: sections.SelectConfig) -> Iterator[str]:
    """Yields parameters that belong to another selection than the recipe's."""
    for key, owner in {"beta": "dial", "top_k": "teachable"}.items():
        default = type(select).model_fields[key].default
        if select.name != owner and select.model_dump()[key] != default:
            yield f"objective.select.{key}: it belongs to {owner}, and {select.name} has none"


def _of_spans(
    teacher: teachers.AnyTeacher, need: str | None, objective: sections.ObjectiveConfig
) -> Iterator[str]:
    """Yields what cannot go with a teacher that is compared on spans of text."""
    for key, one in teachers.by_key(teacher).items():
        if one.align != "spans":
            continue
        if need is not None:
            yield (
                f"{key}.align: spans cannot go with {need}, which compares both models token by "
                "token: their vocabularies differ"
            )
        if objective.teacher_top_k is not None:
            yield f"{key}.align: spans cannot go with objective.teacher_top_k, of tokens they share"
        if objective.stop in ("raw", "canonical"):
            yield (
                f"{key}.align: spans cannot go with objective.stop={objective.stop}, which scores "
                "both models on one stop token: set objective.stop=cross, by which each has its "
                "own, or mask"
            )
        if objective.select is not None or objective.weights is not None:
            yield (
                f"{key}.align: spans are trained whole: drop objective.select and objective.weights"
            )
        if one.measure_quantization:
            yield (
                f"{key}.measure_quantization: it compares rewards token by token and cannot go "
                "with align=spans"
            )


def _of_teacher_top_k(
    objective: sections.ObjectiveConfig, rollout: rollouts.RolloutConfig
) -> Iterator[str]:
    """Yields what the teacher's most probable tokens cannot go with."""
    if objective.teacher_top_k is None:
        return
    key = f"objective.teacher_top_k: {objective.teacher_top_k}"
    if objective.kind != "full_vocab" and objective.baseline != "value":
        yield f"{key} needs objective.kind=full_vocab or objective.baseline=value"
    if objective.top_k is not None:
        yield f"{key} cannot go with objective.top_k, the student's most probable tokens"
    if (need := needs_local_teacher(objective, rollout)) is not None:
        yield f"{key} cannot go with {need}, which reads the teacher's whole distribution"


def self_conflicts(
    teacher: teachers.SelfTeacherConfig, model: sections.ModelConfig, sharding: str
) -> Iterator[str]:
    """Yields what cannot go with a teacher in the student's module."""
    if sharding != "none":
        yield (
            f"train.sharding: {sharding} cannot go with teacher.self={teacher.self}, which reads "
            "with the student's whole weights: set train.sharding=none, or teacher.model to the "
            "student for a teacher with its weights before training"
        )
    if teacher.self == "ema" and model.master_dtype != "float32":
        yield (
            f"model.master_dtype: expected float32 with teacher.self=ema, got "
            f"{model.master_dtype}, in which an average loses the small steps"
        )


def _of_teacher(teacher: teachers.AnyTeacher, need: str) -> Iterator[str]:
    """Yields why a teacher cannot give its hidden states, which the setting `need` needs."""
    if isinstance(teacher, teachers.SelfTeacherConfig):
        return
    if isinstance(teacher, teachers.TeachersConfig) or teacher.place != "in process":
        yield (
            f"teacher: {need} needs the teacher's hidden states, so a single "
            "teacher in this process (teacher.model without servers, by and mix)"
        )
        return
    scoring = {"offload": teacher.offload, "measure_quantization": teacher.measure_quantization}
    for key, is_set in scoring.items():
        if is_set:
            yield (
                f"teacher.{key}: it cannot go with {need}, which reads the teacher during the "
                "update"
            )


def turn_conflicts(
    rollout: rollouts.RolloutConfig,
    data: DataConfig,
    every_teacher: Iterable[teachers.TeacherConfig],
) -> Iterator[str]:
    """Yields what is wrong with tools or an environment beside other settings."""
    reward = rollout.task_reward
    if reward is not None and reward.name == rollouts.ENVIRONMENT and not rollout.environment:
        yield "rollout.task_reward.name: environment needs rollout.environment"
    if not rollout.has_turns:
        return
    key = "rollout.tools" if rollout.tools else "rollout.environment"
    if rollout.tools and rollout.environment:
        yield "rollout.tools: it cannot go with rollout.environment, which may call tools itself"
    if data.chat is None:
        yield f"{key}: it needs the chat template, so not data.chat=null"
    if data.continue_assistant:
        yield f"{key}: it cannot go with data.continue_assistant, whose turn has begun already"
    if any(teacher.align == "spans" for teacher in every_teacher):
        yield (
            f"{key}: it cannot go with teacher.align=spans, whose teacher would read the turns in "
            "the student's chat template"
        )
