"""The recipe: one typed tree, read from YAML 1.2, with `key=value` overrides.

Every default but the rewards' own is stated here and nowhere else. Errors are `UsageError`s of
one line that name the file and line or the override, the key, what was expected and what was got.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML

from poweropd import contradictions, rewards
from poweropd.errors import UsageError
from poweropd.recipe_file import Where, apply_override, flatten, plain, read_yaml

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab"]
Dtype = Literal["bfloat16", "float16", "float32"]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Run(Section):
    dir: str = "runs/{name}"  # {name}: the recipe's file name without its ending


class Lora(Section):
    r: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    target_modules: str | list[str] = "all-linear"
    merge: bool = False  # merge the adapter into the weights of final/


class Model(Section):
    student: str
    dtype: Dtype = "bfloat16"  # of the forward and backward
    master_dtype: Dtype = "float32"  # of the trained weights and the optimizer
    lora: Lora | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


class Teacher(Section):
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
    give_up_after: PositiveFloat = 900.0  # for which the servers may be away

    @model_validator(mode="after")
    def _valid(self) -> Self:
        for url in self.servers:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and parts.hostname
            if not known or parts.username or parts.query:
                raise ValueError(
                    "servers: expected base URLs such as http://127.0.0.1:8000, without a key or "
                    f"password (see api_key_env), got ...{url.rpartition('@')[2].partition('?')[0]}"
                )
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


class Teachers(Section):
    """Several teachers, each under the value that column `by` has for its prompts."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, Teacher] = Field(init=False)
    by: str

    @model_validator(mode="after")
    def _valid(self) -> Self:
        if not self.model_extra:
            raise ValueError(f"by: expected a teacher for each value of column {self.by!r}")
        return self


def _how_many(teacher: Any) -> str:
    several = "by" in teacher if isinstance(teacher, Mapping) else isinstance(teacher, Teachers)
    return "(several)" if several else "(one)"


AnyTeacher = Annotated[
    Annotated[Teacher, Tag("(one)")] | Annotated[Teachers, Tag("(several)")],
    Discriminator(_how_many),
]


class Data(Section):
    prompts: str  # a .jsonl or .parquet file, a Hub dataset, or embedded:train
    split: str = "train"
    column: str = "problem"
    teacher_column: str | None = None  # another prompt for the teacher
    chat: dict[str, Any] | None = Field(default_factory=lambda: {"enable_thinking": False})
    system: str | None = None
    shuffle: bool = True


class Rollout(Section):
    engine: Literal["transformers"] = "transformers"
    max_new_tokens: PositiveInt = 1024
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: all
    per_prompt: PositiveInt = 1
    batch_size: PositiveInt = 128  # completions sampled at once
    correction: Literal["none", "truncated"] = "none"  # importance weights, student over sampler
    score: Literal["full", "truncated"] = "full"  # softmax over all, or over top_k's and top_p's


class Reward(Section):
    """`name` and the parameters of that reward; `rewards.py` holds their defaults."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str = "power"

    @model_validator(mode="after")
    def _valid(self) -> Self:
        self.create()
        return self

    def create(self) -> rewards.Reward:
        return rewards.create(self.name, **(self.model_extra or {}))


class Select(Section):
    name: Literal["dial", "random"]
    keep: Annotated[float, Field(gt=0, le=1)] = 0.4  # of each completion's trained tokens
    beta: Annotated[float, Field(ge=0, le=1)] = 1.0  # of dial


class Objective(Section):
    kind: Literal["sampled", "full_vocab"] = "sampled"
    stop: Literal["raw", "mask", "canonical", "cross", "semantic"] = "mask"
    top_k: PositiveInt | None = None  # of full_vocab: the student's most probable ids only
    baseline: Literal["none", "value"] = "none"  # of sampled
    select: Select | None = None


class Train(Section):
    steps: PositiveInt = 1500
    prompts_per_step: PositiveInt = 32  # over all processes
    max_tokens_per_batch: PositiveInt = 16384
    learning_rate: PositiveFloat = 5e-7
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegativeFloat = 0.0
    clip_grad_norm: PositiveFloat | None = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class Evaluate(Section):
    every: PositiveInt
    benchmarks: Annotated[list[str], Field(min_length=1)]
    n: PositiveInt = 1
    limit: PositiveInt | None = None
    data_dir: str | None = None  # a folder with NAME.jsonl, instead of the Hub
    max_new_tokens: PositiveInt = 4096
    temperature: NonNegativeFloat = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    top_k: Annotated[int, Field(ge=0)] = 20
    best: str = "avg_at_k"  # the metric, averaged over the benchmarks, by which best/ is kept


class Checkpoint(Section):
    every: PositiveInt = 100
    keep: PositiveInt = 2


class Log(Section):
    trackers: list[Tracker] = Field(default_factory=list)


class Config(Section):
    """A whole recipe. `Config.load` reads one; a dict goes through `Config.from_dict`."""

    run: Run = Field(default_factory=Run)
    model: Model
    teacher: AnyTeacher
    data: Data
    rollout: Rollout = Field(default_factory=Rollout)
    reward: Reward = Field(default_factory=Reward)
    objective: Objective = Field(default_factory=Objective)
    train: Train = Field(default_factory=Train)
    evaluate: Evaluate | None = None
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    log: Log = Field(default_factory=Log)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for holds, message in contradictions.of(self):
            if holds:
                raise ValueError(message)
        return self

    @property
    def teachers(self) -> dict[str, Teacher]:
        """By the values of column `teacher.by`; a single teacher has the name ""."""
        if isinstance(self.teacher, Teacher):
            return {"": self.teacher}
        return dict(self.teacher.__pydantic_extra__)

    @property
    def domain_column(self) -> str | None:
        """The column of the data that says which of several teachers a prompt belongs to."""
        return None if isinstance(self.teacher, Teacher) else self.teacher.by

    @property
    def truncates_scores(self) -> bool:
        """Whether `rollout.score` leaves any id out."""
        truncates = self.rollout.top_k > 0 or self.rollout.top_p < 1
        return self.rollout.score == "truncated" and truncates

    @property
    def needs_local_teacher(self) -> str | None:
        """The setting that needs the teacher's hidden states, as "objective.kind=full_vocab".

        None where its log-probs of the sampled tokens do, which a server can give as well.
        """
        needs = {
            "objective.kind=full_vocab": self.objective.kind == "full_vocab",
            "objective.baseline=value": self.objective.baseline == "value",
            "objective.stop=semantic": self.objective.stop == "semantic",
            "rollout.score=truncated": self.truncates_scores,
        }
        return next((setting for setting, holds in needs.items() if holds), None)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a recipe file and applies overrides such as "reward.alpha=10"."""
        path = Path(path)
        tree = read_yaml(path)
        overridden = [apply_override(tree, override) for override in overrides]
        return cls._from_tree(tree, name=path.stem, where=Where(path, tree, overridden))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], name: str = "run") -> Self:
        return cls._from_tree(tree, name, Where(None, tree, []))

    @classmethod
    def _from_tree(cls, tree: Mapping[str, Any], name: str, where: "Where") -> Self:
        try:
            config = cls.model_validate(plain(tree))
        except ValidationError as error:
            # A misspelt key is also a missing one: what the user wrote comes first.
            first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
            raise UsageError(where.describe(cls, first)) from None
        run = Run(dir=config.run.dir.replace("{name}", name))
        reward = Reward(**{**config.reward.model_dump(), **_parameters(config.reward.create())})
        return config.model_copy(update={"run": run, "reward": reward})

    def to_yaml(self) -> str:
        yaml = YAML()
        yaml.representer.add_representer(
            type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
        )
        text = io.StringIO()
        yaml.dump(self.model_dump(), text)
        return text.getvalue()

    def flat(self) -> dict[str, Any]:
        """Every value under its dotted key."""
        return flatten(self.model_dump())

    def flat_text(self) -> dict[str, Any]:
        """As `flat`, with text for whatever trackers cannot hold."""
        return {
            key: value if isinstance(value, int | float | str | bool) else str(value)
            for key, value in self.flat().items()
        }

    def differences(self, other: "Config") -> list[str]:
        """The keys whose values differ, as "key: this != other".

        run.dir is not compared, nor where a teacher's servers are and how they are asked.
        """
        mine, theirs = (
            {k: v for k, v in flatten(c.model_dump(exclude={"run"})).items() if not _is_access(k)}
            for c in (self, other)
        )
        missing = "(absent)"
        return [
            f"{key}: {mine.get(key, missing)!r} != {theirs.get(key, missing)!r}"
            for key in sorted({*mine, *theirs})
            if mine.get(key, missing) != theirs.get(key, missing)
        ]


def _is_access(key: str) -> bool:
    access = {"servers", "api_key_env", "timeout", "concurrency", "give_up_after"}
    return key.startswith("teacher.") and key.rpartition(".")[2] in access


def _parameters(reward: rewards.Reward) -> dict[str, Any]:
    """Name and parameters of a reward, defaults included; {} for a user's own."""
    names = {kind: name for name, kind in rewards.REWARDS.items()}
    if type(reward) not in names:
        return {}
    values = {field.name: vars(reward)[field.name] for field in dataclasses.fields(reward)}
    for key, value in values.items():
        if isinstance(value, rewards.Reward):
            values[key] = _parameters(value)
            if not values[key]:  # a user's own: stays as it was written
                return {}
        elif isinstance(value, rewards.Schedule):
            values[key] = dataclasses.asdict(value)
    return {"name": names[type(reward)], **values}
