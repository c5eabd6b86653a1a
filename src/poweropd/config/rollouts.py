"""The section `rollout` of a recipe: how the student samples, and with what.

`docs/configuration.md` and `docs/recipe.schema.json` are made from these classes.
"""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from poweropd import net, rollouts
from poweropd.config.benchmarks import check_grader
from poweropd.config.fields import (
    Address,
    MayChange,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Private,
    ScheduledNumber,
    ScheduledTokens,
    Section,
    ends_of,
    number_at,
    one_of,
)
from poweropd.grading.graders import ALIASES, GRADERS
from poweropd.rollouts.turns import AUTO_FORMAT, TOOL_FORMATS

#: As a task reward: the reward that `rollout.environment` gives.
ENVIRONMENT = "environment"
Code = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]


class VllmConfig(Section):
    """Arguments of `vllm.LLM`; any other of its arguments may stand here, too."""

    model_config = ConfigDict(extra="allow")
    gpu_memory_utilization: PositiveFraction = 0.3
    """Fraction of the device's memory that vLLM takes; training has the rest."""
    max_model_len: PositiveInt | None = None
    """Tokens of the longest sequence; null is what prompts and completions need."""
    enforce_eager: bool | None = None
    """Whether vLLM runs without CUDA graphs; null is true where there is no GPU."""


class RolloutServerConfig(Section):
    """The vLLM server of `rollout.engine: vllm_server`."""

    url: str = "http://127.0.0.1:8000"
    """Base URL of the server."""
    weights_dir: str | None = None
    """Directory for the weights, which the server must see, too; null is one in run.dir."""
    concurrency: PositiveInt = 64
    """Requests at once, for each training process."""
    timeout: PositiveFloat = 600.0
    """Seconds that one request may take."""
    patience: PositiveFloat = 300.0
    """Seconds for which the server may be away before the run ends."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's key."""

    @model_validator(mode="after")
    def _valid(self) -> Self:
        net.check_url("url", self.url)
        return self


class TaskRewardConfig(Section):
    """An outcome reward of each completion, added to the rewards of its tokens."""

    name: Annotated[str, one_of([*GRADERS, *ALIASES, ENVIRONMENT], custom=True)]
    """A grader as in evaluate.grader, of any number if it is your own, or environment: its own."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of the outcome reward."""
    answer_column: str = "answer"
    """Column with the right answer, for graders that need one."""

    @model_validator(mode="after")
    def _valid(self) -> Self:
        check_grader("name", None if self.name == ENVIRONMENT else self.name)
        return self


class OffPolicyConfig(Section):
    """Completions from a file, in place of some that the student would sample."""

    file: Annotated[str, Address]
    """File with a completion in each row: of the teacher, say, or of an earlier student."""
    share: PositiveFraction
    """Share of all completions that are taken from the file."""
    weights: Literal["truncated", "none"] = "truncated"
    """Importance weights of their tokens: min(p_student / p_sampler, 2), or none, with a bias."""


class RolloutConfig(Section):
    """How the student samples completions."""

    engine: Annotated[str, one_of(rollouts.ENGINES, custom=True)] = "transformers"
    """What samples; a function of yours makes another engine."""
    max_new_tokens: ScheduledTokens = 1024
    """Tokens of the longest completion; a schedule over the optimizer steps is rounded."""
    temperature: ScheduledNumber = 1.0
    """Sampling temperature, or a schedule of it; 0 is greedy."""
    top_p: PositiveFraction = 1.0
    """Probability mass of the most probable tokens that sampling keeps; 1 keeps all tokens."""
    top_k: NonNegativeInt = 0
    """Number of most probable tokens that sampling keeps; 0 keeps all tokens."""
    per_prompt: PositiveInt = 1
    """Completions of each prompt."""
    batch_size: Annotated[PositiveInt, MayChange] = 128
    """Completions that the transformers engine samples at once."""
    correction: Literal["none", "truncated"] = "none"
    """Importance weights of sampled tokens; truncated is min(p_student / p_sampler, 2)."""
    score: Literal["full", "truncated"] = "full"
    """Softmax that scores tokens: over all of them, or over those that top_k and top_p keep."""
    vllm: VllmConfig = Field(default_factory=VllmConfig)
    """Settings of the vllm engine."""
    server: Annotated[RolloutServerConfig, MayChange, Private] = Field(
        default_factory=RolloutServerConfig
    )
    """Settings of the vllm_server engine."""
    verify_every: Annotated[PositiveInt, MayChange] = 10
    """Syncs between two comparisons of a vLLM engine's weights with the student's."""
    staleness: Annotated[int, one_of(rollouts.SCHEDULES)] = 0
    """Optimizer steps by which the weights that sample lag behind those that are trained."""
    off_policy: OffPolicyConfig | None = None
    """Completions from a file, mixed in; null is none."""
    task_reward: TaskRewardConfig | None = None
    """The outcome reward of completions; null is none."""
    tools: Code | list[Code] | None = None
    """Python functions, as package.module:function, that the student may call as tools."""
    environment: Code | None = None
    """Class, as package.module:class, that answers the student's turns in place of tools."""
    max_turns: PositiveInt = 8
    """Turns of the student in a completion, where tools or an environment answer."""
    tool_format: Annotated[str, one_of([AUTO_FORMAT, *TOOL_FORMATS])] = AUTO_FORMAT
    """Form of the student's tool calls; auto is the one in which its chat template writes them."""
    tool_timeout: PositiveFloat = 10.0
    """Seconds that one call of a tool may take."""
    tool_max_chars: PositiveInt = 4000
    """Characters of a tool's longest answer; of a longer one the student reads the beginning."""
    tool_workers: Annotated[PositiveInt, MayChange] = 4
    """Processes in which tools run, for each training process."""

    @property
    def tool_names(self) -> list[str]:
        """Returns what `tools` names, as a list."""
        return [self.tools] if isinstance(self.tools, str) else self.tools or []

    @property
    def has_turns(self) -> bool:
        """Returns whether anybody answers the student's turns."""
        return bool(self.tools) or self.environment is not None

    @model_validator(mode="after")
    def _valid(self) -> Self:
        ends = zip(("start", "end"), ends_of(self.max_new_tokens), strict=False)
        for key, tokens in ends:
            if tokens < 1:
                raise ValueError(f"max_new_tokens.{key}: expected at least 1, got {tokens:g}")
        return self

    def max_new_tokens_at(self, step: int) -> int:
        """Returns the tokens of the longest completion of optimizer step `step`, from 0."""
        return round(number_at(self.max_new_tokens, step))

    def temperature_at(self, step: int) -> float:
        """Returns the sampling temperature of optimizer step `step`, from 0."""
        return number_at(self.temperature, step)

    @property
    def longest(self) -> int:
        """Returns the tokens of the longest completion of any step."""
        return round(max(ends_of(self.max_new_tokens)))

    @property
    def weights_off_policy(self) -> bool:
        """Returns whether completions of a file are weighted, where tokens are sampled."""
        return self.off_policy is not None and self.off_policy.weights == "truncated"

    @property
    def truncates_scores(self) -> bool:
        """Returns whether `score` leaves any token out."""
        return self.score == "truncated" and (self.top_k > 0 or self.top_p < 1)
