"""The section `teacher` of a recipe: one teacher, several, or the student itself.

`docs/configuration.md` and `docs/recipe.schema.json` are made from these classes.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from poweropd import net
from poweropd.config.fields import (
    Address,
    DtypeOrAuto,
    MayChange,
    PositiveFloat,
    PositiveInt,
    Private,
    Section,
    one_of,
)
from poweropd.config.sections import ModelConfig
from poweropd.models import AUTO_DTYPE
from poweropd.teachers import SERVER_TYPES

TeacherPlace = Literal["in process", "served", "several", "self"]


class TeacherConfig(Section):
    """One teacher, in the training process or, with `servers`, behind servers."""

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
    align: Literal["ids", "spans"] = "ids"
    """What is compared: ids that both tokenizers have, or spans of text, by any two tokenizers."""
    offload: bool = False
    """In the training process: whether the weights are on the CPU while they are not used."""
    servers: Annotated[list[str], MayChange, Private] = Field(default_factory=list)
    """Base URLs of servers with this teacher, such as http://127.0.0.1:8000."""
    server_type: Annotated[str, one_of(SERVER_TYPES), MayChange] = "vllm"
    """What the servers are; llama_cpp takes a request for each token."""
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
    weight: PositiveFloat = 1.0
    """Of several teachers: factor of its tokens' loss; with mix its part of the mixture."""

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
    """Several teachers, each under a name: the value that `by` has for its prompts, or with `mix`.

    All teachers of a mixture score every completion, with the weighted mean of their probabilities.
    """

    model_config = ConfigDict(extra="allow")
    place: ClassVar[TeacherPlace] = "several"

    __pydantic_extra__: dict[str, TeacherConfig] = Field(init=False)
    by: str | None = None
    """Column of the prompts' data that says which teacher a prompt belongs to; null with mix."""
    mix: bool = False
    """Whether the teachers are one mixture, which scores every prompt, in place of `by`."""

    @model_validator(mode="after")
    def _valid(self) -> Self:
        if self.mix == (self.by is not None):
            raise ValueError("by: expected either a column, or mix: true without one")
        if self.by is not None and not self.model_extra:
            raise ValueError(f"by: expected a teacher for each value of column {self.by!r}")
        if self.mix and len(self.model_extra or {}) < 2:
            raise ValueError("mix: expected at least two teachers, each under a name")
        return self


class SelfTeacherConfig(Section):
    """The student itself as its teacher, which reads more than the student does."""

    by: ClassVar[None] = None
    place: ClassVar[TeacherPlace] = "self"

    self: Literal["base", "live", "ema"]
    """Its weights: the student's before training, as they are now, or their moving average."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """With ema: share of the average that each optimizer step keeps."""
    max_tokens_per_batch: PositiveInt = 32768
    """Tokens of one forward with padding; halved if memory is short."""

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, tree: object) -> object:
        if isinstance(tree, Mapping):
            for key in ("model", "servers"):
                if tree.get(key):
                    raise ValueError(
                        f"{key}: it cannot go with self={tree['self']}, whose weights are the "
                        "student's in this process, whatever samples: drop one of the two"
                    )
        return tree

    @property
    def title(self) -> str:
        """Returns what it is, in words."""
        return {
            "base": "itself before training",
            "live": "itself",
            "ema": f"its own moving average (decay {self.ema_decay:g})",
        }[self.self]

    def as_model(self, model: ModelConfig) -> TeacherConfig:
        """Returns the student of a recipe as a teacher in this process."""
        return TeacherConfig(
            model=model.student,
            trust_remote_code=model.trust_remote_code,
            dtype=model.dtype,
            max_tokens_per_batch=self.max_tokens_per_batch,
        )


def by_key(teacher: "AnyTeacher") -> dict[str, TeacherConfig]:
    """Returns the teachers of a recipe by their keys in it, such as "teacher.math".

    The student itself has no key.
    """
    if isinstance(teacher, TeachersConfig):
        return {f"teacher.{name}": one for name, one in teacher.__pydantic_extra__.items()}
    return {} if isinstance(teacher, SelfTeacherConfig) else {"teacher": teacher}


class ReferenceConfig(Section):
    """The reference model of a reward that has one, frozen and in this process."""

    model: Annotated[str | None, Address] = None
    """Reference: a directory or a Hub model; null is the student as it was before training."""
    trust_remote_code: bool = False
    """Whether Python code that the reference's repository ships may be run."""
    dtype: DtypeOrAuto = AUTO_DTYPE
    """Number format of weights and forward; auto as `model.dtype`, whose value the student has."""
    max_tokens_per_batch: PositiveInt = 32768
    """Tokens of one forward with padding; halved if memory is short."""
    offload: bool = False
    """Whether its weights are on the CPU while they are not used."""

    def as_teacher(self, student: ModelConfig) -> TeacherConfig:
        """Returns what a teacher's section would say of it."""
        own = self.model_dump()
        if self.model is None:
            own |= {"model": student.student, "trust_remote_code": student.trust_remote_code}
        if self.model is None and self.dtype == AUTO_DTYPE:
            own["dtype"] = student.dtype
        return TeacherConfig(**own)


def _kind(teacher: object) -> str:
    keys = teacher.keys() if isinstance(teacher, Mapping) else ()
    if isinstance(teacher, TeachersConfig) or "by" in keys or "mix" in keys:
        return "(several)"
    return "(self)" if isinstance(teacher, SelfTeacherConfig) or "self" in keys else "(one)"


AnyTeacher = Annotated[
    Annotated[TeacherConfig, Tag("(one)")]
    | Annotated[TeachersConfig, Tag("(several)")]
    | Annotated[SelfTeacherConfig, Tag("(self)")],
    Discriminator(_kind),
]
