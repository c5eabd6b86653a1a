"""The sections of a recipe: each key with its type, its default and what it means.

`docs/configuration.md` and `docs/recipe.schema.json` are made from these classes. The defaults of
a reward's parameters are with the rewards; the sections `data`, `teacher`, `rollout` and `evaluate`
have modules of their own.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, ValidationInfo, model_validator

from poweropd import objectives, rewards, stops
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
    Section,
    one_of,
)
from poweropd.models import AUTO_DTYPE

Attention = Literal[
    "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
]
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
    """Which tokens are kept: the most telling (dial) or learnable (teachable) ones, or random."""
    keep: PositiveFraction = 0.4
    """Fraction of each completion's tokens that is kept."""
    beta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Exponent of |t - p| in the score of dial, where |ln t - ln p| has 1 - beta."""
    top_k: PositiveInt = 16
    """Number of the student's most probable ids on which teachable takes the teacher's mass."""


class WeightsConfig(Section):
    """How much each of a completion's tokens counts in the loss."""

    name: Annotated[str, one_of(objectives.WEIGHTS)]
    """Which tokens weigh more: those before the student drifts from the teacher (drift)."""
    gamma: PositiveFloat = 0.5
    """What the first token of a completion weighs above 1, the weight of the last."""


class ObjectiveConfig(Section):
    """What the student is trained to minimise."""

    kind: Annotated[str, one_of(objectives.OBJECTIVES)] = "sampled"
    """Whether the reward is that of the sampled token or its expectation over the vocabulary."""
    stop: Annotated[str, one_of(stops.POLICIES)] = "mask"
    """How the stop token that ends a completion is trained."""
    top_k: PositiveInt | None = None
    """Number of the student's most probable tokens in full_vocab's sums; null is all."""
    teacher_top_k: PositiveInt | None = None
    """Number of the teacher's most probable tokens in sums, all others being one; null is all."""
    baseline: Literal["none", "value"] = "none"
    """What is taken from the reward of a sampled token; value is the context's expected reward."""
    select: SelectConfig | None = None
    """Selection of the tokens to train on; null is all."""
    weights: WeightsConfig | None = None
    """Weights of the tokens in the loss; null weighs all alike."""


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
