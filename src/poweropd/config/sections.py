"""The sections of a recipe: every default but the rewards' own, and what each key may be."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from poweropd import net, rewards
from poweropd.evaluation.settings import EvaluationSettings
from poweropd.rollouts import ENGINES

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab"]
Attention = Literal[
    "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
]
Dtype = Literal["bfloat16", "float16", "float32"]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RunConfig(Section):
    dir: str = "runs/{name}"  # {name}: the recipe's file name without its ending


class LoraConfig(Section):
    r: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    target_modules: str | list[str] = "all-linear"
    merge: bool = False  # merge the adapter into the weights of final/


class ModelConfig(Section):
    student: str
    dtype: Dtype = "bfloat16"  # of the forward and backward
    master_dtype: Dtype = "float32"  # of the trained weights and the optimizer
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    attention: Attention = "auto"  # of transformers, for student and teacher
    compile: bool = False  # the student's decoder layers, by torch.compile
    trust_remote_code: bool = False


class TeacherConfig(Section):
    """One teacher, in this process or, with `servers`, behind vLLM servers."""

    model: str  # a directory or Hub model; with servers, its name there
    trust_remote_code: bool = False
    # In this process.
    dtype: Dtype = "bfloat16"
    max_tokens_per_batch: PositiveInt = 32768
    quantization: dict[str, Any] | None = None  # as transformers takes it, with a quant_method
    measure_quantization: bool = False  # its effect on the first step's rewards
    offload: bool = False  # to the CPU between uses
    # Behind servers; times in seconds.
    servers: list[str] = Field(default_factory=list)  # such as http://127.0.0.1:8000
    tokenizer: str | None = None  # a directory or Hub model; null: that of `model`
    api_key_env: str | None = None  # the environment variable that holds the servers' key
    timeout: PositiveFloat = 120.0  # of one request
    concurrency: PositiveInt = 32  # requests at once, of each server and process
    patience: PositiveFloat = 900.0  # for which the servers may be away

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
    def scoring_only(self) -> dict[str, bool]:
        """Settings that need scoring to be a phase of its own, and whether they are there."""
        return {"offload": self.offload, "measure_quantization": self.measure_quantization}


class TeachersConfig(Section):
    """Several teachers, each under the value that column `by` has for its prompts."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, TeacherConfig] = Field(init=False)
    by: str

    @model_validator(mode="after")
    def _valid(self) -> Self:
        if not self.model_extra:
            raise ValueError(f"by: expected a teacher for each value of column {self.by!r}")
        return self


def _how_many(teacher: Any) -> str:
    several = (
        "by" in teacher if isinstance(teacher, Mapping) else isinstance(teacher, TeachersConfig)
    )
    return "(several)" if several else "(one)"


AnyTeacher = Annotated[
    Annotated[TeacherConfig, Tag("(one)")] | Annotated[TeachersConfig, Tag("(several)")],
    Discriminator(_how_many),
]


class DataConfig(Section):
    prompts: str  # a .jsonl or .parquet file, a Hub dataset, or embedded:train
    split: str = "train"
    column: str = "problem"
    teacher_column: str | None = None  # another prompt for the teacher
    chat: dict[str, Any] | None = Field(default_factory=lambda: {"enable_thinking": False})
    system: str | None = None
    shuffle: bool = True


class VllmConfig(Section):
    """Keyword arguments of `vllm.LLM`; any other of its arguments may stand here, too."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.3  # training has the rest
    max_model_len: PositiveInt | None = None  # null: what prompts and completions need
    enforce_eager: bool | None = None  # null: where there is no GPU


class RolloutServerConfig(Section):
    url: str = "http://127.0.0.1:8000"
    weights_dir: str | None = None  # a directory that the server sees, too; null: in run.dir
    concurrency: PositiveInt = 64  # requests at once, of one process
    timeout: PositiveFloat = 600.0  # seconds, of one request
    patience: PositiveFloat = 300.0  # seconds for which the server may be away
    api_key_env: str | None = None  # the environment variable that holds its key

    @model_validator(mode="after")
    def _valid(self) -> Self:
        net.check_url("url", self.url)
        return self


class TaskRewardConfig(Section):
    """`name`: the grader, or package.module:function of (prompt's row, completion) -> number."""

    name: str
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    answer_column: str = "answer"  # for the grader

    @model_validator(mode="after")
    def _valid(self) -> Self:
        _check_choice("name", self.name, ("grader",))
        return self


class RolloutConfig(Section):
    engine: str = "transformers"  # or vllm, vllm_server, package.module:factory
    max_new_tokens: PositiveInt = 1024
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: all
    per_prompt: PositiveInt = 1
    batch_size: PositiveInt = 128  # completions sampled at once by transformers
    correction: Literal["none", "truncated"] = "none"  # importance weights, student over sampler
    score: Literal["full", "truncated"] = "full"  # softmax over all, or over top_k's and top_p's
    vllm: VllmConfig = Field(default_factory=VllmConfig)
    server: RolloutServerConfig = Field(default_factory=RolloutServerConfig)
    verify_every: PositiveInt = 10  # syncs, of a vLLM engine
    staleness: Literal[0, 1] = 0  # optimizer steps by which the sampling weights lag behind
    task_reward: TaskRewardConfig | None = None

    @model_validator(mode="after")
    def _valid(self) -> Self:
        _check_choice("engine", self.engine, tuple(ENGINES))
        return self


class RewardConfig(Section):
    """`name` and the parameters of that reward; `rewards.py` holds their defaults."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str = "power"

    @model_validator(mode="after")
    def _valid(self) -> Self:
        self.create()
        return self

    def create(self) -> rewards.Reward:
        return rewards.create(self.name, **(self.model_extra or {}))


class SelectConfig(Section):
    name: Literal["dial", "random"]
    keep: Annotated[float, Field(gt=0, le=1)] = 0.4  # of each completion's trained tokens
    beta: Annotated[float, Field(ge=0, le=1)] = 1.0  # of dial


class ObjectiveConfig(Section):
    kind: Literal["sampled", "full_vocab"] = "sampled"
    stop: Literal["raw", "mask", "canonical", "cross", "semantic"] = "mask"
    top_k: PositiveInt | None = None  # of full_vocab: the student's most probable ids only
    baseline: Literal["none", "value"] = "none"  # of sampled
    select: SelectConfig | None = None


class TrainConfig(Section):
    steps: PositiveInt = 1500
    prompts_per_step: PositiveInt = 32  # over all processes
    max_tokens_per_batch: PositiveInt = 16384
    packing: Literal["auto", "padded", "flat"] = "auto"  # of sequences in a micro-batch
    sharding: Literal["none", "fsdp2"] = "none"  # of the student, over the processes
    learning_rate: PositiveFloat = 5e-7
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegativeFloat = 0.0
    clip_grad_norm: PositiveFloat | None = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class EvaluateConfig(Section):
    every: PositiveInt
    benchmarks: Annotated[list[str], Field(min_length=1)]
    n: PositiveInt = 1
    limit: PositiveInt | None = None
    data_dir: str | None = None  # a folder with NAME.jsonl, instead of the Hub
    max_new_tokens: PositiveInt = EvaluationSettings.max_new_tokens
    temperature: NonNegativeFloat = EvaluationSettings.temperature
    top_p: Annotated[float, Field(gt=0, le=1)] = EvaluationSettings.top_p
    top_k: Annotated[int, Field(ge=0)] = EvaluationSettings.top_k
    best: str = "avg_at_k"  # the metric, averaged over the benchmarks, by which best/ is kept


class CheckpointConfig(Section):
    every: PositiveInt = 100
    keep: PositiveInt = 2


class LogConfig(Section):
    trackers: list[Tracker] = Field(default_factory=list)


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if ":" not in value and value not in known:
        expected = ", ".join([*known, "package.module:function"])
        raise ValueError(f"{key}: expected one of {expected}, got {value!r}")
