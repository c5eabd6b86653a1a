"""The parts of a run, built from its recipe: what can be checked cheaply first, then weights."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from poweropd import stops
from poweropd.config import Config
from poweropd.config.sections import LORA_RATE
from poweropd.data import preview
from poweropd.data.off_policy import AllowedTokens, OffPolicy, load_off_policy
from poweropd.data.prompts import (
    Prompt,
    PromptOrder,
    check_ids,
    check_lengths,
    check_shared,
    epochs_notice,
    filter_notice,
    fits,
    load_prompts,
    split_holdout,
)
from poweropd.data.rollout import Example
from poweropd.errors import UsageError, import_object
from poweropd.kernels import Support
from poweropd.models import AUTO_DTYPE, devices, fingerprints, loading
from poweropd.models.language_model import Student
from poweropd.objectives import OBJECTIVES
from poweropd.objectives.base import Objective
from poweropd.objectives.selection import selected
from poweropd.rollouts.base import RolloutEngine, Sampling
from poweropd.rollouts.factory import build_engine
from poweropd.rollouts.requests import StepRequests
from poweropd.rollouts.turns.engine import Turns
from poweropd.rollouts.turns.tools import tool_schemas
from poweropd.runs.directory import RunDirectory
from poweropd.teachers.base import TeacherScorer, Unscored
from poweropd.teachers.factory import (
    TeacherProfile,
    combined,
    local_teacher,
    profile_teacher,
    profile_teachers,
    unquantized_teacher,
    unshared_with,
)
from poweropd.teachers.measured import MeasuredTeacher
from poweropd.teachers.models import RunModels, load_over_shared
from poweropd.teachers.referenced import Referenced
from poweropd.teachers.spans import SpanTeacher
from poweropd.training.accounting import Utilization
from poweropd.training.grades.feedback import Feedback, InformedTeacher
from poweropd.training.grades.task_reward import TaskRewards
from poweropd.training.update import Updater
from poweropd.training.validation import PROMPTS_KEY, Validation, judged_prompts

logger = logging.getLogger("poweropd")


@dataclass(frozen=True)
class RunInputs:
    """Prompts, tokenizer and stop ids: all that a run needs before any weight is loaded."""

    tokenizer: PreTrainedTokenizerBase  # the student's
    prompts: list[Prompt]  # to train on
    order: PromptOrder
    student_stop_ids: list[int]
    teachers: dict[str, TeacherProfile]  # by domain; a single one under ""
    student_context: int  # tokens
    unshared: frozenset[int]  # ids that are not the same token to all models
    holdout: list[Prompt] = field(default_factory=list)  # kept out of training
    off_policy: OffPolicy | None = None  # completions that are not sampled
    turns: Turns | None = None  # how the student is answered; None if it writes a single turn

    @classmethod
    def load(cls, config: Config, notify: bool = True) -> "RunInputs":
        """Loads them; raises UsageError if student, teachers and prompts do not fit each other."""
        student = (config.model.student, config.model.trust_remote_code)
        tokenizer = loading.load_tokenizer(*student)
        teachers = profile_teachers(config, tokenizer)
        unshared = unshared_with(tokenizer, teachers, notify)
        tokenizers = {name: teacher.tokenizer for name, teacher in teachers.items()}
        if config.mixes_teachers:  # all of them read what the student reads
            tokenizers = {"": tokenizer}
        apart = [name for name, section in config.teachers.items() if section.align == "spans"]
        tools = tool_schemas(config.rollout.tool_names)
        prompts = load_prompts(config.data, tokenizer, tokenizers, config.teacher.by, apart, tools)
        model_config = loading.load_config(*student)
        context, vocab_size = loading.context_length(model_config), loading.vocab_rows(model_config)
        if config.reference_model is not None:
            reference = profile_teacher(config.reference_model)
            unshared |= unshared_with(tokenizer, {"": reference}, notify)
            context = min(context, reference.context)  # it reads what the student reads
        if config.data.filter_longer:
            prompts = _filtered(prompts, context, teachers, config, notify)
        check_shared(prompts, unshared, tokenizer)
        found_stops = stops.stop_ids(tokenizer, loading.load_generation_config(student[0]))
        stop_ids = found_stops
        for name, teacher in teachers.items():
            own = [p for p in prompts if config.mixes_teachers or p.domain == name]
            check_lengths(own, context, teacher.context, config.rollout.longest)
            section, teacher_vocab = config.teachers[name], None
            if not section.servers:
                other = loading.load_config(section.model, section.trust_remote_code)
                teacher_vocab = loading.vocab_rows(other)
            check_ids(own, vocab_size, teacher_vocab)
            if teacher.server is not None and own:
                teacher.server.check([prompt.teacher_prompt_ids for prompt in own])
            policy = config.objective.stop
            both = (found_stops, teacher.known_stop_ids or found_stops, unshared, policy, tokenizer)
            stop_ids, shared_stop_ids = stops.shared_stops(*both)
            teachers[name] = replace(teacher, shared_stop_ids=shared_stop_ids)
            notice = stops.difference(stop_ids, shared_stop_ids, policy, tokenizer)
            if notice and notify:
                logger.warning("%s%s", f"teacher.{name}: " if name else "", notice)
        trained, held = split_holdout(prompts, config.data.holdout, config.train.seed)
        if notify:
            _show_choices(config)
            logger.info("%s", epochs_notice(config.train, len(trained)))
        order = PromptOrder(len(trained), config.train.seed, config.data.shuffle)
        inputs = cls(tokenizer, trained, order, stop_ids, teachers, context, unshared, held)
        if config.rollout.off_policy is not None:
            size = min(len(tokenizer), vocab_size or len(tokenizer))
            tokens = AllowedTokens(tokenizer, size, inputs.stop_ids, unshared)
            inputs = replace(inputs, off_policy=load_off_policy(config, trained, tokens))
        if notify:
            inputs.show_first_prompt(config)
        return replace(inputs, turns=Turns.of(config, tokenizer, inputs.stop_ids, unshared))

    def first_prompt(self, config: Config) -> Prompt:
        """Returns the first prompt of the first step."""
        return self.prompts[self.order.at_step(0, config.train.prompts_per_step)[0]]

    def opening(self, config: Config) -> list[str]:
        """Returns the first prompt, as each model reads it, as lines for people."""
        prompt = self.first_prompt(config)
        return preview.prompt_lines(prompt, self.tokenizer, self.teacher_of(prompt).tokenizer)

    def show_first_prompt(self, config: Config) -> None:
        """Shows the first prompt as each model reads it; warns if the templates differ."""
        prompt = self.first_prompt(config)
        for line in self.opening(config):
            logger.info("%s", line)
        teacher = self.teacher_of(prompt).tokenizer
        notice = preview.template_notice(prompt, self.tokenizer, teacher, config.data)
        if notice is not None:
            logger.warning("%s", notice)

    def teacher_of(self, prompt: Prompt) -> TeacherProfile:
        """Returns the teacher that scores a prompt, of a mixture the first one."""
        return self.teachers.get(prompt.domain) or next(iter(self.teachers.values()))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Returns the stop ids of all models, the student's own first."""
        return tuple(dict.fromkeys([*self.student_stop_ids, *self.teacher_stop_ids("")]))

    def teacher_stop_ids(self, domain: str) -> list[int]:
        """Returns the stop ids of all teachers, those of the domain's teacher first."""
        others = [i for teacher in self.teachers.values() for i in teacher.shared_stop_ids]
        own = self.teachers[domain].shared_stop_ids if domain else []
        return list(dict.fromkeys([*own, *others]))


def _show_choices(config: Config) -> None:
    """Says what `auto` is on this machine, and which learning rate an adapter has."""
    if config.model.dtype == AUTO_DTYPE and devices.dtype_here(AUTO_DTYPE) != "bfloat16":
        logger.info("model.dtype: float32, since this machine has no bfloat16 of its own")
    rate = config.train.learning_rate
    if config.model.lora is None:
        return
    if rate < LORA_RATE / 2:
        logger.warning(
            "train.learning_rate: %g is low for model.lora, which needs about ten times the rate "
            "of full weights (its default is %g)",
            rate,
            LORA_RATE,
        )
    else:
        logger.info("train.learning_rate: %g, for model.lora", rate)


def _filtered(
    prompts: Sequence[Prompt],
    context: int,
    teachers: Mapping[str, TeacherProfile],
    config: Config,
    notify: bool,
) -> list[Prompt]:
    """Returns the prompts that fit the contexts, `context` of the student and their teacher's."""
    new, contexts = config.rollout.longest, {name: one.context for name, one in teachers.items()}
    contexts.setdefault("", min(contexts.values()))  # of a mixture, whose prompts have no domain
    kept = [prompt for prompt in prompts if fits(prompt, context, contexts[prompt.domain], new)]
    notice = filter_notice(len(kept), len(prompts))
    if notify:
        logger.warning("%s", notice)
    return kept


def input_fingerprints(
    config: Config, inputs: RunInputs, judged: Sequence[Prompt]
) -> dict[str, str]:
    """Returns a fingerprint of each thing that a run is trained from, by its name in messages.

    `judged` are the prompts of its divergence from the teacher.
    """
    found = {
        "the weights of model.student": fingerprints.of_weights(config.model.student),
        "the tokenizer of model.student": fingerprints.of_tokenizer(inputs.tokenizer),
        "data.prompts": fingerprints.of_prompts(inputs.prompts),
    }
    if inputs.holdout:
        found["the held-out prompts of data.prompts"] = fingerprints.of_prompts(inputs.holdout)
    if judged:
        found[PROMPTS_KEY] = fingerprints.of_prompts(judged)
    if inputs.off_policy is not None:
        found["rollout.off_policy.file"] = fingerprints.of_completions(inputs.off_policy)
    if inputs.unshared:
        found["the tokens that student and teacher share"] = fingerprints.of_ids(inputs.unshared)
    for name, section in config.teachers.items():
        where = f"teacher.{name}.model" if name else "teacher.model"
        if not section.servers and config.self_teacher is None:
            found[f"the weights of {where}"] = fingerprints.of_weights(section.model)
        if section.align == "spans":
            tokenizer = inputs.teachers[name].tokenizer
            found[f"the tokenizer of {where}"] = fingerprints.of_tokenizer(tokenizer)
    if config.reference is not None and config.reference.model is not None:
        found["the weights of reference.model"] = fingerprints.of_weights(config.reference.model)
    return found


def load_models(config: Config, inputs: RunInputs, device: torch.device) -> RunModels:
    """Loads the models of this process, as `load_over_shared` does."""
    shared = (inputs.tokenizer, inputs.teachers, inputs.unshared)
    return load_over_shared(config, *shared, device)


def make_teacher(
    config: Config,
    inputs: RunInputs,
    loaded: RunModels,
    run: RunDirectory,
    accelerator: Accelerator,
    feedback: Feedback | None = None,
) -> TeacherScorer:
    """Returns what scores completions: teachers, and the reward's reference model if it has one."""
    if feedback is not None:
        teacher = make_teacher(config, inputs, loaded, run, accelerator)
        return InformedTeacher(teacher, feedback)
    found = make_teachers(config, inputs, loaded, run, accelerator)
    section, device = config.reference_model, accelerator.device
    if section is None or loaded.reference is None:
        return found
    return Referenced(found, local_teacher(section, loaded.reference, device))


def make_teachers(
    config: Config,
    inputs: RunInputs,
    loaded: RunModels,
    run: RunDirectory,
    accelerator: Accelerator,
) -> TeacherScorer:
    """Returns what gives the teacher's scores: one teacher, or several by a prompt's domain."""
    if config.needs_local_teacher:  # then it reads along with the student's update
        return Unscored()
    reward, device = config.reward.create().at(0), accelerator.device
    top_k = config.objective.teacher_top_k
    scorers: dict[str, TeacherScorer] = {}
    for name, section in config.teachers.items():
        server = inputs.teachers[name].server
        scorers[name] = server or local_teacher(section, loaded.teachers[name], device, top_k)
        if section.measure_quantization and accelerator.is_main_process:
            load = partial(unquantized_teacher, section, loaded.student, device)
            scorers[name] = MeasuredTeacher(scorers[name], load, reward, run, name)
        if (aligner := inputs.teachers[name].aligner) is not None:
            scorers[name] = SpanTeacher(scorers[name], aligner, inputs.stop_ids)
    return combined(config, scorers)


def make_updater(
    config: Config, loaded: RunModels, inputs: RunInputs, accelerator: Accelerator
) -> Updater:
    """Returns the updater of the student, whose layers are compiled if the recipe says so."""
    if config.model.compile:
        if not loaded.student.layers:
            raise UsageError("model.compile: this model does not say which its layers are")
        for layer in loaded.student.layers:
            layer.compile(dynamic=True)
    return Updater(
        accelerator,
        loaded.student,
        config.train,
        make_objective(config, loaded, inputs.stop_ids, accelerator.device),
        loaded.teacher if config.needs_local_teacher else None,
        loaded.average,
    )


def make_objective(
    config: Config, loaded: RunModels, stop_ids: Sequence[int], device: torch.device
) -> Objective:
    """Returns the objective of a recipe, with everything that stays the same over the run."""
    section, rollout = config.objective, config.rollout
    support = Support(rollout.top_k, rollout.top_p, rollout.temperature_at(0))
    parts: dict[str, Any] = {
        "teacher_head": loaded.teacher.head() if config.needs_local_teacher else None,
        "baseline": section.baseline == "value",
        "correction": rollout.correction == "truncated",
        "off_policy": rollout.weights_off_policy,
        "top_k": section.top_k,
        "merged_ids": (
            torch.tensor(stop_ids, device=device) if section.stop == "semantic" else None
        ),
        "support": support if rollout.truncates_scores else None,
    }
    kind = import_object("objective.kind", OBJECTIVES[section.kind])
    objective = kind(**{field.name: parts[field.name] for field in fields(kind)})
    tree = section.model_dump()
    return selected(objective, tree["select"], tree["weights"])


def make_engine(
    config: Config,
    inputs: RunInputs,
    student: Student,
    accelerator: Accelerator,
    log_probs: Callable[[Sequence[Example]], list[list[float]]],
) -> RolloutEngine:
    """Returns the recipe's engine; `log_probs` are the student's own, for a comparison."""
    tokenizer, prompts = inputs.tokenizer, [*inputs.prompts, *inputs.holdout]
    context = inputs.student_context
    engine = build_engine(config, student, tokenizer, prompts, context, accelerator, log_probs)
    return engine if inputs.turns is None else inputs.turns.around(engine)


def make_sampling(config: Config, inputs: RunInputs) -> Sampling:
    """Returns how the first step samples: the recipe's settings and the stop ids of all models."""
    return Sampling(
        max_new_tokens=config.rollout.max_new_tokens_at(0),
        stop_ids=inputs.stop_ids,
        temperature=config.rollout.temperature_at(0),
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
    )


def step_requests(config: Config, inputs: RunInputs, accelerator: Accelerator) -> StepRequests:
    """Returns what each step asks for in this process."""
    own = slice(accelerator.process_index, None, accelerator.num_processes)
    return StepRequests(config, inputs.prompts, inputs.order, inputs.off_policy, own)


def make_task_rewards(config: Config, inputs: RunInputs) -> TaskRewards | None:
    """Returns the outcome reward of completions; None if the recipe has none."""
    section = config.rollout.task_reward
    return None if section is None else TaskRewards(section, inputs.tokenizer, inputs.prompts)


def make_feedback(
    config: Config, inputs: RunInputs, validation: Validation | None
) -> Feedback | None:
    """Returns what tells the teacher of completions; None if the recipe has no such feedback."""
    if config.data.feedback is None:
        return None
    judged = [] if validation is None else validation.judged
    prompts = [*inputs.prompts, *judged]
    tools = tool_schemas(config.rollout.tool_names)
    return Feedback(config.data, inputs.tokenizer, inputs.teachers, prompts, tools)


def make_utilization(config: Config, loaded: RunModels) -> Utilization | None:
    """Returns the accounting of FLOPs; None if other machines or several teachers score.

    It is None, too, for a teacher that reads other tokens than the student.
    """
    if config.teacher.place not in ("in process", "self") or config.only_teacher.align == "spans":
        return None
    needs_statistics = config.reward.create().needs_statistics
    return Utilization.of(loaded.student, loaded.teacher, needs_statistics, loaded.reference)


def make_validation(
    config: Config, accelerator: Accelerator, inputs: RunInputs
) -> Validation | None:
    """Returns the evaluation during training; None if the recipe has none."""
    if config.evaluate is None:
        return None
    tokenizer, context = inputs.tokenizer, inputs.student_context
    judged = judged_prompts(config, inputs.holdout, tokenizer, inputs.teachers, context)
    check_shared(judged, inputs.unshared, tokenizer, PROMPTS_KEY)
    section, unshared = config.evaluate, inputs.unshared
    return Validation(config, section, accelerator, tokenizer, context, judged, unshared)
