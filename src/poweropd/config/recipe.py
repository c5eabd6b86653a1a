"""The recipe: one typed tree, read from YAML 1.2, with `key=value` overrides.

Its sections, with every default but the rewards' own, are in `sections.py`. Errors are
`UsageError`s of one line that name the file and line or the override, the key, what was expected
and what was got.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML

from poweropd import rewards
from poweropd.config import rules
from poweropd.config.recipe_file import (
    Where,
    apply_override,
    flatten,
    plain,
    read_yaml,
    rename_keys,
)
from poweropd.config.sections import (
    AnyTeacher,
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    LogConfig,
    ModelConfig,
    ObjectiveConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    Section,
    TeacherConfig,
    TeachersConfig,
    TrainConfig,
)
from poweropd.errors import UsageError


class Config(Section):
    """A whole recipe. `Config.load` reads one; a dict goes through `Config.from_dict`."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig
    teacher: AnyTeacher
    data: DataConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig | None = None
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for holds, message in rules.of(self):
            if holds:
                raise ValueError(message)
        return self

    @property
    def has_one_local_teacher(self) -> bool:
        """Whether there is a single teacher, in this process."""
        return isinstance(self.teacher, TeacherConfig) and not self.teacher.servers

    @property
    def only_teacher(self) -> TeacherConfig:
        """Raises UsageError where there are several."""
        if isinstance(self.teacher, TeachersConfig):
            raise UsageError(
                f"teacher.by: expected a single teacher here, got several (by column "
                f"{self.teacher.by!r}): make a recipe of each"
            )
        return self.teacher

    @property
    def teachers(self) -> dict[str, TeacherConfig]:
        """By the values of column `teacher.by`; a single teacher has the name ""."""
        if isinstance(self.teacher, TeacherConfig):
            return {"": self.teacher}
        return dict(self.teacher.__pydantic_extra__)

    @property
    def domain_column(self) -> str | None:
        """The column of the data that says which of several teachers a prompt belongs to."""
        return None if isinstance(self.teacher, TeacherConfig) else self.teacher.by

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
        own = plain(tree)
        rename_keys(own)
        return cls._from_tree(own, name, Where(None, own, []))

    @classmethod
    def _from_tree(cls, tree: Mapping[str, Any], name: str, where: "Where") -> Self:
        try:
            config = cls.model_validate(plain(tree))
        except ValidationError as error:
            # A misspelt key is also a missing one: what the user wrote comes first.
            first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
            raise UsageError(where.describe(cls, first)) from None
        run = RunConfig(dir=config.run.dir.replace("{name}", name))
        reward = RewardConfig(
            **{**config.reward.model_dump(), **_parameters(config.reward.create())}
        )
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

        run.dir is not compared, nor where servers are, nor HOW a step is computed.
        """
        mine, theirs = (
            {
                k: v
                for k, v in flatten(c.model_dump(exclude={"run"})).items()
                if not _is_access(k) and k not in HOW
            }
            for c in (self, other)
        )
        missing = "(absent)"
        return [
            f"{key}: {mine.get(key, missing)!r} != {theirs.get(key, missing)!r}"
            for key in sorted({*mine, *theirs})
            if mine.get(key, missing) != theirs.get(key, missing)
        ]


# They say how a step is computed, not what: only rounding depends on them, so a run may go on with
# others, with less memory, say.
HOW = (
    *("train.max_tokens_per_batch", "train.packing", "train.sharding", "checkpoint.every"),
    *("checkpoint.keep", "model.gradient_checkpointing", "model.attention", "model.compile"),
    *("rollout.batch_size", "rollout.verify_every"),
)


def _is_access(key: str) -> bool:
    access = {"servers", "api_key_env", "timeout", "concurrency", "patience"}
    of_teacher = key.startswith("teacher.") and key.rpartition(".")[2] in access
    return of_teacher or key.startswith("rollout.server.")


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
