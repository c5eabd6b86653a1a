"""The section `evaluate` of a recipe, and what it is where the recipe leaves it open."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Self

from pydantic import Field, model_validator

from poweropd.config import sections
from poweropd.config.benchmarks import AnyBenchmark, GraderName, check_grader
from poweropd.config.data import DataConfig
from poweropd.config.fields import (
    Address,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFraction,
    PositiveInt,
    Private,
    Section,
)
from poweropd.config.teachers import TeacherConfig, TeacherPlace
from poweropd.evaluation.settings import DivergenceSettings, EvaluationSettings

#: The value of `evaluate.divergence.prompts` that stands for the rows of `data.holdout`.
HELD_OUT = "holdout"
EVALUATIONS = 10  # during a run, where the recipe does not say how many


class DivergenceConfig(Section):
    """How far the student is from its teacher, on prompts that need no answers."""

    prompts: Annotated[str, Address] = HELD_OUT
    """Prompts: holdout, which are the rows of data.holdout, or as in data.prompts."""
    n: PositiveInt = 1
    """Completions of each prompt."""
    limit: PositiveInt | None = None
    """Prompts, the first ones; null is all."""
    max_new_tokens: PositiveInt | None = None
    """Tokens of the longest completion; null is rollout.max_new_tokens, the most of a schedule."""
    temperature: NonNegativeFloat = DivergenceSettings.temperature
    """Sampling temperature; the estimate by a served teacher needs 1."""


class EvaluateConfig(Section):
    """Evaluations during training, before it and of the teacher."""

    every: PositiveInt | None = None
    """Optimizer steps between two evaluations, the last step has one, too; null is steps / 10."""
    before: bool = True
    """Whether the student is also evaluated before the first step."""
    teacher: bool = False
    """Whether the teacher is evaluated on the benchmarks, too, once in a run."""
    divergence: DivergenceConfig | None = None
    """Divergence from the teacher; null is none, or that on data.holdout without benchmarks."""
    benchmarks: Annotated[list[AnyBenchmark], Address] = Field(default_factory=list)
    """Benchmarks: names, .jsonl files, Hub datasets, or sections that describe them."""
    grader: GraderName = EvaluationSettings.grader
    """How completions are graded; a function of yours (row, completion) -> number is one, too."""
    n: PositiveInt = 1
    """Completions of each problem."""
    limit: PositiveInt | None = None
    """Problems of each benchmark, the first ones; null is all."""
    data_dir: Annotated[str | None, Private] = None
    """Directory that holds NAME.jsonl for each benchmark, read in place of the Hub."""
    max_new_tokens: PositiveInt = EvaluationSettings.max_new_tokens
    """Tokens of the longest completion."""
    temperature: NonNegativeFloat = EvaluationSettings.temperature
    """Sampling temperature; 0 is greedy."""
    top_p: PositiveFraction = EvaluationSettings.top_p
    """Probability mass of the most probable tokens that sampling keeps; 1 keeps all tokens."""
    top_k: NonNegativeInt = EvaluationSettings.top_k
    """Number of most probable tokens that sampling keeps; 0 keeps all tokens."""
    best: str | None = None
    """Metric by which best/ is chosen; null is avg_at_k, or reverse_kl without benchmarks."""

    @model_validator(mode="after")
    def _valid(self) -> Self:
        check_grader("grader", self.grader)
        return self

    @property
    def has_other_prompts(self) -> bool:
        """Returns whether completions may be longer than those of training."""
        divergence = self.divergence
        if self.benchmarks or divergence is None:
            return True
        return divergence.prompts != HELD_OUT or divergence.max_new_tokens is not None


def resolved(
    section: EvaluateConfig | None, data: DataConfig, train: sections.TrainConfig
) -> EvaluateConfig | None:
    """Returns the section with everything that the recipe left open; None for no evaluation.

    `every` stays open until epochs are known as steps (`Config.with_steps`).
    Held-out prompts without benchmarks are what the divergence from the teacher is measured on.
    """
    if section is None and not data.holdout:
        return None
    section = section or EvaluateConfig()
    divergence = section.divergence
    if divergence is None and data.holdout and not section.benchmarks:
        divergence = DivergenceConfig()
    best = section.best or ("avg_at_k" if section.benchmarks else "reverse_kl")
    every = section.every
    if every is None and train.epochs is None:
        every = max(1, train.steps // EVALUATIONS)
    return section.model_copy(update={"divergence": divergence, "best": best, "every": every})


def evaluation_conflicts(
    section: EvaluateConfig | None,
    data: DataConfig,
    teachers: Mapping[str, TeacherConfig],
    train: sections.TrainConfig,
    place: TeacherPlace,
) -> Iterator[str]:
    """Yields what is wrong with the section beside others, with the key in front."""
    measured = resolved(section, data, train)
    by_spans = any(one.align == "spans" for one in teachers.values())
    if by_spans and measured is not None and measured.divergence is not None:
        yield (
            "evaluate.divergence: it compares both models token by token and cannot go with "
            "teacher.align=spans: drop it (and data.holdout), or set evaluate.benchmarks"
        )
    if section is None:
        return
    divergence = section.divergence
    if not section.benchmarks and divergence is None and not data.holdout:
        yield (
            "evaluate: expected benchmarks, divergence, or prompts kept out by data.holdout; got "
            "none of them"
        )
    if divergence is not None and divergence.prompts == HELD_OUT and not data.holdout:
        yield (
            "evaluate.divergence.prompts: holdout needs data.holdout, such as data.holdout=200; or "
            "name a file of prompts"
        )
    served = any(one.servers for one in teachers.values())
    if divergence is not None and served and divergence.temperature != 1:
        yield (
            "evaluate.divergence.temperature: expected 1 with a served teacher, whose estimate of "
            f"the divergence needs it, got {divergence.temperature:g}"
        )
    if section.teacher and not section.benchmarks:
        yield "evaluate.teacher: there are no benchmarks that the teacher could be evaluated on"
    if section.teacher and place == "self":
        yield (
            "evaluate.teacher: the teacher is the student itself, which evaluate.before measures: "
            "drop it"
        )
    if section.teacher and len(teachers) > 1:
        yield "evaluate.teacher: expected a single teacher, got several: evaluate each by itself"
