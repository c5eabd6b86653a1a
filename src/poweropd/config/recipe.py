"""The recipe: one typed tree, read from YAML 1.2, with `key=value` overrides.

Its sections, with every default but those of the rewards' parameters, are in `sections.py`. Errors
are `UsageError`s of one line that name the file and line or the override, the key, what was
expected and what was got.
"""

import dataclasses
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, ValidationInfo, model_validator
from ruamel.yaml import YAML

from poweropd import rewards
from poweropd.config import evaluate as evaluation
from poweropd.config import rollouts, rules, sections, teachers
from poweropd.config.data import DataConfig
from poweropd.config.fields import MayChange, Section
from poweropd.config.recipe_file import (
    Key,
    Where,
    apply_override,
    check_values,
    flatten,
    plain,
    read_yaml,
    refuse_secrets,
    rename_keys,
)
from poweropd.config.teachers import SelfTeacherConfig
from poweropd.errors import UsageError, one_line

logger = logging.getLogger("poweropd")


class Config(Section):
    """A recipe of poweropd; `Config.load` reads one, `Config.from_dict` takes a mapping."""

    run: sections.RunConfig = Field(default_factory=sections.RunConfig)
    model: sections.ModelConfig
    teacher: teachers.AnyTeacher
    data: DataConfig
    rollout: rollouts.RolloutConfig = Field(default_factory=rollouts.RolloutConfig)
    reward: sections.RewardConfig = Field(default_factory=sections.RewardConfig)
    reference: teachers.ReferenceConfig | None = None
    objective: sections.ObjectiveConfig = Field(default_factory=sections.ObjectiveConfig)
    train: sections.TrainConfig = Field(default_factory=sections.TrainConfig)
    evaluate: evaluation.EvaluateConfig | None = None
    checkpoint: sections.CheckpointConfig = Field(default_factory=sections.CheckpointConfig)
    log: sections.LogConfig = Field(default_factory=sections.LogConfig)

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        reward, own = self.reward.checked(info.context), self.teacher_in_student
        found = chain(
            rules.conflicts(self.objective, self.rollout, reward, self.teacher),
            rules.turn_conflicts(self.rollout, self.data, self.teachers.values()),
            evaluation.evaluation_conflicts(
                self.evaluate, self.data, self.teachers, self.train, self.teacher.place
            ),
            () if own is None else rules.self_conflicts(own, self.model, self.train.sharding),
            rules.reference_conflicts(
                self.reference,
                reward,
                self.objective,
                self.rollout,
                self.teachers.values(),
                self._without_adapter,
            ),
            rules.weight_conflicts(self.teacher),
            rules.mixture_conflicts(
                self.teacher, self.data, self.objective, self.evaluate, self.train
            ),
        )
        if (conflict := next(found, None)) is not None:
            raise ValueError(conflict)
        return self

    @property
    def only_teacher(self) -> teachers.TeacherConfig:
        """Returns the single teacher; raises UsageError if there are several."""
        if isinstance(self.teacher, teachers.TeachersConfig):
            key = "mix" if self.teacher.mix else "by"
            how = "as a mixture" if self.teacher.mix else f"by column {self.teacher.by!r}"
            raise UsageError(
                f"teacher.{key}: expected a single teacher here, got several ({how}): make a "
                "recipe of each"
            )
        return self.teachers[""]

    @property
    def reference_model(self) -> teachers.TeacherConfig | None:
        """Returns the reference model of the reward, as a teacher's section; None without one."""
        if not self.reward.create().needs_reference:
            return None
        return (self.reference or teachers.ReferenceConfig()).as_teacher(self.model)

    @property
    def reference_in_student(self) -> bool:
        """Returns whether the reference is the student's module without its adapter.

        A sharded student is not read beside its update: then a copy is loaded.
        """
        itself = self.reference is None or self.reference.model is None
        return itself and self._without_adapter and self.reference_model is not None

    @property
    def _without_adapter(self) -> bool:
        """Returns whether the student before training is its module without its adapter."""
        return self.model.lora is not None and self.train.sharding == "none"

    @property
    def teachers(self) -> dict[str, teachers.TeacherConfig]:
        """Returns the teachers by their names, of which a single one has ""."""
        if isinstance(self.teacher, teachers.TeachersConfig):
            return dict(self.teacher.__pydantic_extra__)
        if isinstance(self.teacher, SelfTeacherConfig):
            return {"": self.teacher.as_model(self.model)}
        return {"": self.teacher}

    @property
    def mixes_teachers(self) -> bool:
        """Returns whether the teachers are a mixture, so that each of them scores every prompt."""
        return isinstance(self.teacher, teachers.TeachersConfig) and self.teacher.mix

    @property
    def self_teacher(self) -> SelfTeacherConfig | None:
        """Returns how the student is its own teacher; None if it is not."""
        return self.teacher if isinstance(self.teacher, SelfTeacherConfig) else None

    def teacher_names(self, named: Callable[[str], object] = str) -> str:
        """Returns the names of all teachers; `named` makes one of a model's name."""
        if isinstance(self.teacher, SelfTeacherConfig):
            return self.teacher.title
        return " and ".join(str(named(one.model)) for one in self.teachers.values())

    @property
    def teacher_in_student(self) -> SelfTeacherConfig | None:
        """Returns the self teacher if it is in the student's module, and nothing is loaded for it.

        It is not for base without an adapter, which needs a copy of the weights before training.
        """
        own = self.self_teacher
        copied = own is not None and own.self == "base" and self.model.lora is None
        return None if copied else own

    @property
    def needs_local_teacher(self) -> str | None:
        """Returns the setting that needs the teacher in this process, or None."""
        return rules.needs_local_teacher(self.objective, self.rollout)

    def with_steps(self, prompts: int) -> Self:
        """Returns the recipe with its epochs, if it has any, as steps with so many prompts."""
        if self.train.epochs is None:
            return self
        steps = {"steps": self.train.steps_of(prompts), "epochs": None}
        train = self.train.model_copy(update=steps)
        evaluate = evaluation.resolved(self.evaluate, self.data, train)
        return self.model_copy(update={"train": train, "evaluate": evaluate})

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a recipe file and applies overrides such as "reward.alpha=10"."""
        path = Path(path)
        tree = read_yaml(path)
        before = _reward_name(tree)
        overridden = [apply_override(tree, override) for override in overrides]
        if _reward_name(tree) != before:
            _drop_parameters(tree, overridden, before)
        _drop_other_length(tree, overridden)
        return cls._from_tree(tree, path.stem, Where(path, tree, overridden))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the recipe of a run that somebody else may have made: nothing it names is imported.

        A reward of the user's own is not checked, and is imported where it is created.
        """
        tree = read_yaml(path)
        return cls._from_tree(tree, path.stem, Where(path, tree, []), sections.READING)

    @classmethod
    def from_dict(cls, tree: Mapping[str, object], name: str = "run") -> Self:
        """Makes a recipe from a mapping of sections; `name` stands for {name} in run.dir."""
        try:
            own: dict[str, Any] = {key: plain(value) for key, value in tree.items()}
        except RecursionError:
            raise UsageError("a recipe: nested too deep") from None
        rename_keys(own)
        return cls._from_tree(own, name, Where(None, own, []))

    @classmethod
    def _from_tree(
        cls, tree: Mapping[str, object], name: str, where: Where, context: str | None = None
    ) -> Self:
        own: Any = plain(tree)
        check_values(own)
        refuse_secrets(tree)
        own = _with_rate_of_lora(own)
        try:
            config = cls.model_validate(own, context=context)
        except ValidationError as error:
            raise UsageError(where.describe(error.errors()[0])) from None
        run = sections.RunConfig(dir=config.run.dir.replace("{name}", name))
        created = config.reward.checked(context)
        resolved = config.reward.model_dump() | ({} if created is None else _parameters(created))
        reward = sections.RewardConfig.model_validate(resolved, context=context)
        evaluate = evaluation.resolved(config.evaluate, config.data, config.train)
        return config.model_copy(update={"run": run, "reward": reward, "evaluate": evaluate})

    def to_yaml(self, tree: Mapping[str, object] | None = None) -> str:
        """Returns the whole recipe, defaults included, as YAML that `load` reads as the same.

        `tree` is what is written instead of it.
        """
        yaml = YAML()
        yaml.representer.add_representer(
            type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
        )
        text = io.StringIO()
        yaml.dump(tree or self.model_dump(), text)
        return text.getvalue()

    def flat(self) -> dict[str, object]:
        """Returns every value under its dotted key."""
        return flatten(self.model_dump())

    def flat_text(self) -> dict[str, int | float | str]:
        """Returns the values of `flat`, as text if trackers cannot hold them."""
        return {
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in self.flat().items()
        }

    def differences(self, other: "Config") -> list[str]:
        """Returns the keys whose values differ, as "key: this != other".

        Keys that may change between the parts of a run are not compared.
        """
        mine, theirs = flatten(_lasting(self)), flatten(_lasting(other))
        missing = "(absent)"
        return [
            f"{key}: {mine.get(key, missing)!r} != {theirs.get(key, missing)!r}"
            for key in sorted({*mine, *theirs})
            if mine.get(key, missing) != theirs.get(key, missing)
        ]


def _reward_name(tree: Mapping[str, object]) -> object:
    """Returns the name of a recipe's reward, or the default."""
    section = tree.get("reward")
    default = sections.RewardConfig.model_fields["name"].default
    return section.get("name", default) if isinstance(section, Mapping) else default


def _drop_parameters(tree: dict[str, Any], overridden: Sequence[Key], of: object) -> None:
    """Leaves out the parameters of the recipe's reward after overrides named another reward.

    Those that the overrides set stay; nothing is left out if they replaced the whole section.
    """
    if ("reward",) in overridden:
        return
    own = {parts[1] for parts in overridden if parts[0] == "reward"}
    dropped = [key for key in tree["reward"] if key not in own]
    for key in dropped:
        del tree["reward"][key]
    if dropped:
        what = ", ".join(map(one_line, dropped))
        logger.info("reward.name: %s of reward %s is left out", what, one_line(str(of)))


def _drop_other_length(tree: dict[str, Any], overridden: Sequence[Key]) -> None:
    """Leaves out the recipe's train.epochs after an override set train.steps, or vice versa."""
    if ("train",) in overridden:
        return
    given = [key for key in ("steps", "epochs") if ("train", key) in overridden]
    if len(given) == 1 and tree["train"][given[0]] is not None:
        other = "epochs" if given == ["steps"] else "steps"
        if tree["train"].pop(other, None) is not None:
            logger.info("train.%s: train.%s of the recipe is left out", given[0], other)


def _with_rate_of_lora(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe with the learning rate of an adapter, if it has one and names no rate."""
    model, train = tree.get("model"), tree.get("train", {})
    adapted = isinstance(model, dict) and model.get("lora") is not None
    if not adapted or not isinstance(train, dict) or "learning_rate" in train:
        return tree
    return {**tree, "train": {**train, "learning_rate": sections.LORA_RATE}}


def _lasting(section: Section) -> dict[str, object]:
    """Returns the values that stay the same over all parts of a run, in nested dicts."""
    fields = type(section).model_fields
    return {
        key: _lasting(value) if isinstance(value, Section) else value
        for key, value in section
        if key not in fields or MayChange not in fields[key].metadata
    }


def _parameters(reward: rewards.Reward) -> dict[str, object]:
    """Returns the name and parameters of a reward, defaults included; {} for a user's own."""
    names = {kind: name for name, kind in rewards.REWARDS.items()}
    if type(reward) not in names:
        return {}
    values = dict(vars(reward))
    for key, value in values.items():
        if isinstance(value, rewards.Reward):
            values[key] = _parameters(value)
            if not values[key]:  # a user's own: stays as it was written
                return {}
        elif isinstance(value, rewards.Schedule):
            values[key] = dataclasses.asdict(value)
    return {"name": names[type(reward)], **values}
