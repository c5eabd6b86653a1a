"""The sections of a recipe: each key with its type, its default and what it means.

`docs/configuration.md` and `docs/recipe.schema.json` are made from these classes. The defaults of
a reward's parameters are with the rewards; the section `data` is in `data.py`.
"""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationInfo, model_validator

from poweropd import net, objectives, rewards, rollouts, stops
from poweropd.config.benchmarks import check_grader
from poweropd.config.fields import (
    LEARNING_RATE_SCHEDULES,
    TRACKER_NAMES,
    Address,
    Dtype,
    DtypeOrAuto,
    MayChange,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Private,
    Section,
    one_of,
)
from poweropd.grading.graders import ALIASES, GRADERS
from poweropd.models import AUTO_DTYPE

Attention = Literal[
    "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
]
TeacherPlace = Literal["in process", "served", "several"]
#: Default learning rates: the paper's for every weight; an adapter's is about ten times as high
#: (Schulman et al., LoRA Without Regret, 2025).
FULL_RATE, LORA_RATE = 5e-7, 5e-6
#: The context of pydantic in which nothing that a recipe names is imported.
READING = "reading"


class RunConfig(Section):
    """Where the run is kept."""

    dir: Annotated[str, MayChange] = "runs/{name}"
    """Run directory; {name} is the recipe's file name without its ending."""


class LoraConfig(Section):
    """A LoRA adapter, trained in place of the student's own weights."""

    r: PositiveInt = 16
    """Rank of the adapter's matrices."""
    alpha: PositiveFloat = 32.0
    """Scale of the adapter, whose product is multiplied by alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules that get an adapter; all-linear is every linear layer but the head."""
    merge: bool = False
    """Whether the adapter is merged into the weights of final/."""


class ModelConfig(Section):
    """The student."""

    student: Annotated[str, Address]
    """Student: a directory, a Hub model or embedded:student."""
    dtype: DtypeOrAuto = AUTO_DTYPE
    """Number format of the student's forward and backward; auto is float32 without bfloat16."""
    master_dtype: Dtype = "float32"
    """Number format of the trained weights and of the optimizer's state."""
    lora: LoraConfig | None = None
    """The LoRA adapter to train; null trains every weight."""
    gradient_checkpointing: Annotated[bool, MayChange] = False
    """Whether each layer is computed again in the backward, which takes less memory."""
    attention: Annotated[Attention, MayChange] = "auto"
    """Attention of transformers, for student and teacher; auto is flash attention where it runs."""
    compile: Annotated[bool, MayChange] = False
    """Whether torch.compile compiles the student's decoder layers."""
    trust_remote_code: bool = False
    """Whether Python code that the student's repository ships may be run."""


class TeacherConfig(Section):
    """One teacher, in the training process or, with `servers`, behind vLLM servers."""

    by: ClassVar[None] = None

    model: Annotated[str, Address]
    """Teacher: a directory, a Hub model or embedded:teacher; with servers, its name there."""
    trust_remote_code: bool = False
    """Whether Python code that the teacher's repository ships may be run."""
    dtype: DtypeOrAuto = AUTO_DTYPE
    """In the training process: number format of weights and forward; auto as `model.dtype`."""
    max_tokens_per_batch: PositiveInt = 32768
    """In the training process: tokens of one forward with padding; halved if memory is short."""
    quantization: dict[str, object] | None = None
    """In the training process: a quantization config of transformers, with its quant_method."""
    measure_quantization: bool = False
    """Whether the first step is also scored without quantization, to write down the difference."""
    offload: bool = False
    """In the training process: whether the weights are on the CPU while they are not used."""
    servers: Annotated[list[str], MayChange, Private] = Field(default_factory=list)
    """Base URLs of vLLM servers with this teacher, such as http://127.0.0.1:8000."""
    tokenizer: Annotated[str | None, Address] = None
    """With servers: a directory or Hub model with the tokenizer; null is that of `model`."""
    api_key_env: Annotated[str | None, MayChange, Private] = None
    """With servers: name of the environment variable that holds their key."""
    timeout: Annotated[PositiveFloat, MayChange] = 120.0
    """With servers: seconds that one request may take."""
    concurrency: Annotated[PositiveInt, MayChange] = 32
    """With servers: requests at once, for each server and training process."""
    patience: Annotated[PositiveFloat, MayChange] = 900.0
    """With servers: seconds for which all of them may be away before the run ends."""

    @model_validator(mode="after")
    def _valid(self) -> Self:
        for url in self.servers:
            net.check_url("servers", url)
        local = {"quantization": self.quantization is not None, "offload": self.offload}
        for key, is_set in local.items():
            if is_set and self.servers:
                raise ValueError(f"{key}: it belongs to a teacher in this process, not on servers")
        if self.quantization is not None and self.offload:
            raise ValueError("offload: a quantized teacher cannot be moved; drop one of the two")
        if self.quantization is None and self.measure_quantization:
            raise ValueError("measure_quantization: there is no teacher.quantization to measure")
        return self

    @property
    def place(self) -> TeacherPlace:
        """Returns where this teacher is."""
        return "served" if self.servers else "in process"


class TeachersConfig(Section):
    """Several teachers, each under the value that column `by` has for its prompts."""

    model_config = ConfigDict(extra="allow")
    place: ClassVar[TeacherPlace] = "several"

    __pydantic_extra__: dict[str, TeacherConfig] = Field(init=False)
    by: str
    """Column of the prompts' data that says which teacher a prompt belongs to."""

    @model_validator(mode="after")
    def _valid(self) -> Self:
        if not self.model_extra:
            raise ValueError(f"by: expected a teacher for each value of column {self.by!r}")
        return self


def _how_many(teacher: object) -> str:
    several = isinstance(teacher, Mapping) and "by" in teacher
    return "(several)" if several or isinstance(teacher, TeachersConfig) else "(one)"


AnyTeacher = Annotated[
    Annotated[TeacherConfig, Tag("(one)")] | Annotated[TeachersConfig, Tag("(several)")],
    Discriminator(_how_many),
]


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

    name: Annotated[str, one_of([*GRADERS, *ALIASES], custom=True)]
    """A grader as in evaluate.grader; grader is math. A function of yours may give any number."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of the outcome reward."""
    answer_column: str = "answer"
    """Column with the right answer, for graders that need one."""

    @model_validator(mode="after")
    def _valid(self) -> Self:
        check_grader("name", self.name)
        return self


class RolloutConfig(Section):
    """How the student samples completions."""

    engine: Annotated[str, one_of(rollouts.ENGINES, custom=True)] = "transformers"
    """What samples; a function of yours makes another engine."""
    max_new_tokens: PositiveInt = 1024
    """Tokens of the longest completion."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy."""
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
    task_reward: TaskRewardConfig | None = None
    """The outcome reward of completions; null is none."""

    @property
    def truncates_scores(self) -> bool:
        """Returns whether `score` leaves any token out."""
        return self.score == "truncated" and (self.top_k > 0 or self.top_p < 1)


class RewardConfig(Section):
    """The token reward: its `name`, and its parameters beside it."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, one_of(rewards.REWARDS, custom=True)] = "power"
    """The reward; a function (teacher_log_probs, student_log_probs) of yours is one, too."""

    @model_validator(mode="after")
    def _valid(self, info: ValidationInfo) -> Self:
        self.checked(info.context)
        return self

    def checked(self, context: str | None) -> rewards.Reward | None:
        """Returns the reward, or None in the context READING if it names the user's own code."""
        reading = context == READING and rewards.names_code(self.model_dump())
        return None if reading else self.create()

    def create(self) -> rewards.Reward:
        """Returns the reward; raises ValueError for parameters that it does not take."""
        return rewards.create(self.name, **(self.model_extra or {}))


class SelectConfig(Section):
    """Which of a completion's tokens are trained on."""

    name: Annotated[str, one_of(objectives.SELECTIONS)]
    """Which tokens are kept: the most telling ones (dial), or any (random), its control."""
    keep: PositiveFraction = 0.4
    """Fraction of each completion's tokens that is kept."""
    beta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Exponent of |t - p| in the score of dial, where |ln t - ln p| has 1 - beta."""


class ObjectiveConfig(Section):
    """What the student is trained to minimise."""

    kind: Annotated[str, one_of(objectives.OBJECTIVES)] = "sampled"
    """Whether the reward is that of the sampled token or its expectation over the vocabulary."""
    stop: Annotated[str, one_of(stops.POLICIES)] = "mask"
    """How the stop token that ends a completion is trained."""
    top_k: PositiveInt | None = None
    """Number of the student's most probable tokens in full_vocab's sums; null is all."""
    baseline: Literal["none", "value"] = "none"
    """What is taken from the reward of a sampled token; value is the context's expected reward."""
    select: SelectConfig | None = None
    """Selection of the tokens to train on; null is all."""


class TrainConfig(Section):
    """The optimizer steps."""

    steps: PositiveInt = 1500
    """Number of optimizer steps."""
    epochs: PositiveFloat | None = None
    """Number of times that every prompt is trained on, in place of `steps`; null counts steps."""
    prompts_per_step: PositiveInt = 32
    """Prompts of one optimizer step, over all processes."""
    max_tokens_per_batch: Annotated[PositiveInt, MayChange] = 2048
    """Tokens of one micro-batch with padding; halved if memory is short on a single process."""
    packing: Annotated[Literal["auto", "padded", "flat"], MayChange] = "auto"
    """Layout of a micro-batch: padded rows, or one flat row; auto is flat where attention gains."""
    sharding: Annotated[Literal["none", "fsdp2"], MayChange] = "none"
    """How the student is kept: whole in every process, or sharded over the processes."""
    learning_rate: PositiveFloat = FULL_RATE
    """Peak learning rate of AdamW; the default with `model.lora` is ten times as high, 5e-06."""
    schedule: Annotated[str, one_of(LEARNING_RATE_SCHEDULES)] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    clip_grad_norm: PositiveFloat | None = 1.0
    """Norm above which the gradient is scaled down to it; null never does."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of all randomness: the prompts' order, the sampling, a new adapter's weights."""

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, tree: object) -> object:
        if not isinstance(tree, Mapping) or tree.get("epochs") is None:
            return tree
        if tree.get("steps") is not None:
            raise ValueError("epochs: expected train.steps or train.epochs, got both: set one null")
        return {key: value for key, value in tree.items() if key != "steps"}

    def steps_of(self, prompts: int) -> int:
        """Returns the number of optimizer steps for so many prompts; a last part step is whole."""
        if self.epochs is None:
            return self.steps
        return max(1, math.ceil(self.epochs * prompts / self.prompts_per_step))


class CheckpointConfig(Section):
    """Checkpoints, from which a run goes on after it was stopped."""

    every: Annotated[PositiveInt, MayChange] = 100
    """Optimizer steps between two checkpoints."""
    keep: Annotated[PositiveInt, MayChange] = 2
    """Number of newest checkpoints that are kept."""


class LogConfig(Section):
    """Where metrics go beside metrics.jsonl of the run directory."""

    trackers: list[Annotated[str, one_of(TRACKER_NAMES)]] = Field(default_factory=list)
    """Experiment trackers; each must be installed."""
