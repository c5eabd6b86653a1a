"""What the sections of a recipe are made of: numbers with bounds, and choices from tables.

A choice has one table, in the module that implements it, and a recipe takes that table's keys. Two
tables stand here, since rooms that import this one implement them.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetPydanticSchema,
    Tag,
    model_validator,
)
from pydantic_core import core_schema

from poweropd.errors import shown
from poweropd.models import AUTO_DTYPE, DTYPES
from poweropd.rewards import SCHEDULES, Schedule

#: Learning-rate schedule -> its name in transformers, whose plain "constant" ignores the warm-up.
LEARNING_RATE_SCHEDULES = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
}
#: Trackers that accelerate starts; `training/trackers.py` has what each is started with.
TRACKER_NAMES = ("tensorboard", "wandb", "trackio", "mlflow", "swanlab")
#: How a recipe names the user's own code.
CUSTOM = "package.module:function"


def one_of(table: Iterable[str | int], custom: bool = False) -> GetPydanticSchema:
    """Returns the marker of a field whose values are the keys of `table`.

    With `custom` the field also takes the name of the user's own code.
    """
    keys = list(table)
    schema: core_schema.CoreSchema = core_schema.literal_schema(keys)
    if custom:
        schema = core_schema.custom_error_schema(
            core_schema.union_schema([schema, core_schema.str_schema(pattern=":")]),
            custom_error_type="choice",
            custom_error_message=f"expected one of {', '.join(map(str, [*keys, CUSTOM]))}",
        )
    return GetPydanticSchema(lambda source, handler: schema)


class MayChange:
    """Marks a field that may change between the parts of a run.

    It says where servers and files are, or how a step is computed and not what: only rounding
    depends on it, so a run may go on with another value, in less memory, say.
    """


class Address:
    """Marks a field that names a model or data; only the names that others can use are public."""


class Private:
    """Marks a field that says something of the user or of a machine, and is not published."""


PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Dtype = Annotated[str, one_of(DTYPES)]
DtypeOrAuto = Annotated[str, one_of([AUTO_DTYPE, *DTYPES])]


class Section(BaseModel):
    """A mapping of the recipe with known keys, each of one type."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, tree: object) -> object:
        # Before all other checks, since a misspelt key is also a missing one.
        if isinstance(tree, Mapping) and cls.model_config["extra"] == "forbid":
            for key in tree:
                if key not in cls.model_fields:
                    known = ", ".join(cls.model_fields)
                    name = shown(str(key))[1:-1]
                    raise ValueError(f"{name}: unknown key (known: {known})")
        return tree


class ScheduleConfig(Section):
    """A number that moves from `start` to `end` over the first `steps` optimizer steps."""

    schedule: Annotated[str, one_of(SCHEDULES)]
    """Its shape: a straight line, half a wave of the cosine, or always `start`."""
    start: NonNegativeFloat
    """Its value at the first step."""
    end: NonNegativeFloat | None = None
    """Its value after `steps` steps, which stays; a constant schedule has none."""
    steps: PositiveInt = 1
    """Optimizer steps in which it moves."""

    @model_validator(mode="after")
    def _valid(self) -> Self:
        if self.schedule != "constant" and self.end is None:
            raise ValueError(f"end: a {self.schedule} schedule needs it")
        if self.schedule == "constant" and self.end is not None:
            raise ValueError("end: a constant schedule has none")
        return self

    def resolved(self) -> Schedule:
        """Returns the schedule as rewards have it."""
        return Schedule(self.schedule, self.start, self.end, self.steps)


def number_at(number: float | ScheduleConfig, step: int) -> float:
    """Returns the value at optimizer step `step`, counted from 0, of what may be a schedule."""
    return number.resolved().at(step) if isinstance(number, ScheduleConfig) else number


def ends_of(number: float | ScheduleConfig) -> tuple[float, ...]:
    """Returns the values between which a number moves; the number itself if it is no schedule."""
    return number.resolved().ends() if isinstance(number, ScheduleConfig) else (number,)


def _how_given(number: object) -> str:
    return "(schedule)" if isinstance(number, Mapping | ScheduleConfig) else "(number)"


ScheduledTokens = Annotated[
    Annotated[PositiveInt, Tag("(number)")] | Annotated[ScheduleConfig, Tag("(schedule)")],
    Discriminator(_how_given),
]
ScheduledNumber = Annotated[
    Annotated[NonNegativeFloat, Tag("(number)")] | Annotated[ScheduleConfig, Tag("(schedule)")],
    Discriminator(_how_given),
]
