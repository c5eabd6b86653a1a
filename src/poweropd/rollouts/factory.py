"""Builds the rollout engine of a recipe, around the run's student, and says when it samples."""

import logging
from collections.abc import Callable, Sequence

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from poweropd.config import Config
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Example, Request, Rollout, make_example
from poweropd.errors import UsageError, import_object
from poweropd.models import devices, loading
from poweropd.models.language_model import Student
from poweropd.rollouts import ENGINES, SCHEDULES, prefetch, staleness_problem
from poweropd.rollouts.base import RolloutEngine, Sampling
from poweropd.rollouts.guards import TOLERANCES, CheckedEngine, VerifiedEngine
from poweropd.rollouts.prefetch import OnTime
from poweropd.rollouts.renumbered import RenumberedEngine

logger = logging.getLogger("poweropd")

PROBES, PROBE_TOKENS = 4, 16  # what a verification samples


def build_engine(
    config: Config,
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    context: int,
    accelerator: Accelerator,
    student_log_probs: Callable[[Sequence[Example]], list[list[float]]],
) -> RolloutEngine:
    """Builds the recipe's engine, within the guards that it needs.

    `context` is the student's, in tokens; `student_log_probs` are its own log-probs of the tokens
    of examples. Raises UsageError if the engine cannot be had.
    """
    name = config.rollout.engine
    facts = ENGINES.get(name)
    if facts is None:
        engine = user_engine(name, student, config, tokenizer)
    else:
        longest = max(len(prompt.prompt_ids) for prompt in prompts) + config.rollout.longest
        if config.evaluate is not None and config.evaluate.has_other_prompts:  # of any length
            longest = context
        room = longest if longest < loading.UNLIMITED else None
        kind = import_object("rollout.engine", facts.engine)
        engine = kind.build(student, config, accelerator, room)
        if facts.renumbered and student.masked_ids:
            engine = RenumberedEngine(engine, student.kept_ids())
    if facts is None or facts.checked:
        engine = CheckedEngine(engine, name, student.vocab_size, context, student.masked_ids)
    if facts is None or not facts.verified:
        return engine

    def log_probs(rollouts: Sequence[Rollout]) -> list[list[float]]:
        # Without stops every token counts.
        examples = [make_example(rollout, (), (0,), "raw") for rollout in rollouts]
        return student_log_probs([e for e in examples if e is not None])

    shortest = sorted(prompts, key=lambda p: len(p.prompt_ids))[:PROBES]
    probes = [Request(prompt, number, 0, seed=number) for number, prompt in enumerate(shortest)]
    tokens = min(PROBE_TOKENS, config.rollout.longest)
    return VerifiedEngine(
        engine,
        (probes, Sampling(max_new_tokens=tokens, stop_ids=())),
        log_probs,
        every=config.rollout.verify_every,
        tolerance=TOLERANCES[devices.name_of(student.compute_dtype)],
    )


def build_schedule(config: Config, engine: RolloutEngine, sample: prefetch.Sample) -> OnTime:
    """Builds what says when the completions of a step are sampled, by the recipe's staleness.

    Raises UsageError for a user's own engine that cannot sample beside an update.
    """
    staleness = config.rollout.staleness
    problem = staleness_problem(staleness, config.rollout.engine, engine.concurrent)
    if problem is not None:  # the recipe's rules know the other engines
        raise UsageError(problem)
    if staleness and config.rollout.correction == "none":
        logger.warning(
            "rollout.staleness: %d trains on completions of the student so many steps ago; "
            "rollout.correction=truncated weights them as its own",
            staleness,
        )
    schedule: type[OnTime] = import_object("rollout.staleness", SCHEDULES[staleness])
    return schedule(sample, config.train.steps, staleness)


def user_engine(
    name: str, student: Student, config: Config, tokenizer: PreTrainedTokenizerBase
) -> RolloutEngine:
    """Returns what the user's factory(student, config, tokenizer) makes.

    Raises UsageError if that is not an engine.
    """
    engine = import_object("rollout.engine", name)(student, config, tokenizer)
    if not isinstance(engine, RolloutEngine):
        raise UsageError(
            f"rollout.engine: expected {name} to return an object with concurrent, generate and "
            f"sync, got {type(engine).__name__}"
        )
    return engine
