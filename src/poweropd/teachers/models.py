"""The models of a run in this process: its student, and the teachers that are not on servers."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from poweropd.config import Config
from poweropd.config.teachers import SelfTeacherConfig
from poweropd.models import attention, devices, loading, vocabulary
from poweropd.models.language_model import LanguageModel, Student, Teacher, dropout_rates
from poweropd.models.own_teacher import MovingAverage, own_teacher
from poweropd.teachers.factory import (
    TeacherProfile,
    check_top_k,
    load_teacher_model,
    over_vocabulary,
)

REFERENCE = "(reference)"  # stands for a teacher's name while models are loaded
AVERAGE = "average."  # begins the names of averaged weights in a checkpoint


@dataclass(frozen=True)
class RunModels:
    """The models of this process, over the vocabulary that all that compare ids have."""

    student: Student
    teachers: dict[str, Teacher]  # by domain, without those on servers
    average: MovingAverage | None = None  # of the student's weights, if that is its teacher
    reference: Teacher | None = None  # of a reward that has one

    @property
    def teacher(self) -> Teacher:
        """Returns the only teacher of a run that has it in this process."""
        return self.teachers[""]

    def trained_weights(self) -> dict[str, Tensor]:
        """Returns what a checkpoint holds: the student's trained weights, and their average."""
        average = {} if self.average is None else self.average.weights
        return self.student.trained_weights() | {f"{AVERAGE}{n}": w for n, w in average.items()}

    def load_trained_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes up what `trained_weights` gave."""
        self.student.load_trained_weights(weights)
        if self.average is not None:
            self.average.load({name: weights[f"{AVERAGE}{name}"] for name in self.average.weights})

    def with_own_teacher(self, section: SelfTeacherConfig) -> "RunModels":
        """Returns the models with the student's own module as the teacher."""
        ema = section.self == "ema"
        average = MovingAverage(self.student, section.ema_decay) if ema else None
        teacher = own_teacher(self.student, average, base=section.self == "base")
        return replace(self, teachers={"": teacher}, average=average)


def load_over_shared(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    profiles: Mapping[str, TeacherProfile],
    unshared: Collection[int],
    device: torch.device,
) -> RunModels:
    """Loads the student and the teachers of this process over the vocabulary they share.

    `tokenizer` is the student's; the ids `unshared` are not the same token to all models.
    Raises UsageError for a model that cannot be loaded, scored or packed as the recipe says.
    """
    model = loading.load_trained(config.model).to(device)
    own = config.teacher_in_student
    local = {} if own else {n: one for n, one in config.teachers.items() if not one.servers}
    if config.reference_model is not None and not config.reference_in_student:
        local[REFERENCE] = config.reference_model
    loaded = {name: load_teacher_model(section, device) for name, section in local.items()}
    comparable = [loaded[name] for name, section in local.items() if section.align == "ids"]
    rows = vocabulary.head_rows(model, *comparable)
    shared = vocabulary.Vocabulary.shared(rows, tokenizer, unshared)
    for profile in profiles.values():
        if profile.server is not None and profile.aligner is None:
            tokens = min(shared.size, len(tokenizer))
            shared = shared.cut(profile.server.vocab_size(shared.size, tokens))
    check_top_k(config.objective.teacher_top_k, shared.size)
    fields = loading.load_config(config.model.student, config.model.trust_remote_code).to_dict()
    made = RunModels(
        Student(
            model,
            shared.size,
            devices.torch_dtype(config.model.dtype),
            lora=config.model.lora is not None,
            dropout=dropout_rates(fields),
            masked_ids=shared.masked,
        ),
        {name: over_vocabulary(one, loaded[name], shared) for name, one in local.items()},
    )
    reference = made.teachers.pop(REFERENCE, None)
    if config.reference_in_student:
        reference = own_teacher(made.student, None, base=True)
    made = replace(made, reference=reference)
    if own is not None:
        made = made.with_own_teacher(own)
    frozen = {f"teacher {name}".strip(): teacher for name, teacher in made.teachers.items()}
    if reference is not None:
        frozen["reference"] = reference
    for who, one in {"student": made.student, **frozen}.items():
        _choose_attention(one, who, config, device)
    return made


def _choose_attention(model: LanguageModel, who: str, config: Config, device: torch.device) -> None:
    """Sets a model's attention and the layout of its micro-batches, as the recipe says."""
    home = model.device
    if home != device:  # an offloaded teacher is checked where it will run
        model.to(device)
    attention.set_attention(model, config.model.attention)
    model.flat = attention.packs_flat(model, config.train.packing, who)
    if home != device:
        model.to(home)
