"""The recipe: one typed tree, read from YAML 1.2, with `key=value` overrides.

Every default but the rewards' own is stated here and nowhere else. Errors are `UsageError`s of
one line that name the file and line or the override, the key, what was expected and what was got.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError

from poweropd import rewards
from poweropd.errors import UsageError

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
    model: str
    dtype: Dtype = "bfloat16"
    max_tokens_per_batch: PositiveInt = 32768
    trust_remote_code: bool = False


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


class Objective(Section):
    kind: Literal["sampled", "full_vocab"] = "sampled"
    stop: Literal["raw", "mask", "canonical", "cross"] = "mask"


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
    teacher: Teacher
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
        if self.objective.kind == "full_vocab" and self.reward.create().needs_statistics:
            raise ValueError("objective.kind: full_vocab needs a pointwise reward, got zscore")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a recipe file and applies overrides such as "reward.alpha=10"."""
        path = Path(path)
        tree = _read_yaml(path)
        overridden = [_apply_override(tree, override) for override in overrides]
        return cls._from_tree(tree, name=path.stem, where=_Where(path, tree, overridden))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], name: str = "run") -> Self:
        return cls._from_tree(tree, name, _Where(None, tree, []))

    @classmethod
    def _from_tree(cls, tree: Mapping[str, Any], name: str, where: "_Where") -> Self:
        try:
            config = cls.model_validate(_plain(tree))
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
        return _flatten(self.model_dump())

    def flat_text(self) -> dict[str, Any]:
        """As `flat`, with text for whatever trackers cannot hold."""
        return {
            key: value if isinstance(value, int | float | str | bool) else str(value)
            for key, value in self.flat().items()
        }

    def differences(self, other: "Config") -> list[str]:
        """The keys whose values differ, as "key: this != other"; run.dir is not compared."""
        mine, theirs = (_flatten(c.model_dump(exclude={"run"})) for c in (self, other))
        missing = "(absent)"
        return [
            f"{key}: {mine.get(key, missing)!r} != {theirs.get(key, missing)!r}"
            for key in sorted({*mine, *theirs})
            if mine.get(key, missing) != theirs.get(key, missing)
        ]


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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a YAML file: {error}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not valid YAML: {error.problem}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected a mapping of sections such as model and data")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> tuple[str, ...]:
    """Sets "a.b=value" in the tree; the value is read as YAML. Returns the key's parts."""
    key, equals, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise UsageError(f"{override}: expected an override key=value, such as train.steps=100")
    try:
        value = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        raise UsageError(f"{override}: not a YAML value: {error.problem}") from None
    node = tree
    for part in parts[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[parts[-1]] = value
    return parts


class _Where:
    """Says where in the user's input a key was set."""

    def __init__(self, path: Path | None, tree: Any, overridden: list[tuple[str, ...]]) -> None:
        self.path, self.tree, self.overridden = path, tree, overridden

    def describe(self, config: type[BaseModel], error: ErrorDetails) -> str:
        key, message = _explain(config, error)
        for parts in self.overridden:
            if parts == key[: len(parts)]:
                return f"override {message}"
        return f"{self._file_and_line(key)}{message}"

    def _file_and_line(self, key: tuple[str, ...]) -> str:
        if self.path is None:
            return ""
        node, line = self.tree, None
        for part in key:
            if not isinstance(node, CommentedMap) or part not in (node.lc.data or {}):
                break  # set by an override, or missing
            line = node.lc.key(part)[0] + 1
            node = node[part]
        return f"{self.path}:{line}: " if line else f"{self.path}: "


def _explain(config: type[BaseModel], error: ErrorDetails) -> tuple[tuple[str, ...], str]:
    """The key an error is about and a sentence: "train.steps: expected ..., got ..."."""
    key = tuple(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        known = ", ".join(_section(config, key[:-1]).model_fields)
        return key, f"{'.'.join(key)}: unknown key (known: {known})"
    if error["type"] == "missing":
        return key, f"{'.'.join(key)}: this key is required"
    if error["type"] == "value_error":  # ours, with its own key in front: "alpha: expected ..."
        inner = message.partition(":")[0]
        return (*key, inner), ".".join((*key, message))
    expected = message.replace("Input should be", "expected").replace("valid dictionary", "section")
    expected = expected.partition(" or instance of")[0]
    return key, f"{'.'.join(key)}: {expected}, got {error['input']!r}"


def _section(model: type[BaseModel], key: tuple[str, ...]) -> type[BaseModel]:
    for part in key:
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return model


def _plain(node: Any) -> Any:
    """ruamel's round-trip containers and numbers as plain Python ones."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
