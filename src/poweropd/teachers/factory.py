"""Builds the teachers of a recipe: first what is known without weights, then their scorers."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import AutoQuantizationConfig

from poweropd import stops
from poweropd.config import Config
from poweropd.config.teachers import TeacherConfig
from poweropd.errors import UsageError
from poweropd.models import devices, language_model, loading, vocabulary
from poweropd.models.token_bytes import TokenBytes
from poweropd.teachers.base import TeacherScorer
from poweropd.teachers.local import LocalTeacher
from poweropd.teachers.mixture import MixedTeacher
from poweropd.teachers.routed import RoutedTeacher
from poweropd.teachers.server import ServerTeacher
from poweropd.teachers.spans import Aligner

logger = logging.getLogger("poweropd")


@dataclass(frozen=True)
class TeacherProfile:
    """What is known of a teacher before any weight is loaded."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    context: int  # tokens of the longest sequence that it reads
    server: ServerTeacher | None  # None for a teacher in this process
    shared_stop_ids: list[int] = field(default_factory=list)  # those with which the student ends
    aligner: Aligner | None = None  # for a teacher with a tokenizer of its own

    @property
    def known_stop_ids(self) -> list[int]:
        """Returns the student's ids of the teacher's stop tokens, those that it has."""
        return self.stop_ids if self.aligner is None else self.aligner.stop_ids(self.stop_ids)


def profile_teacher(section: TeacherConfig, top_k: int | None = None) -> TeacherProfile:
    """Reads a teacher's tokenizer and asks its servers, if it has any, for its context.

    Servers will be asked for `top_k` most probable ids of each context, if that is given.

    Raises UsageError or RunError if there is no such model or server.
    """
    server = ServerTeacher(section, top_k) if section.servers else None
    name = section.tokenizer or section.model
    try:
        tokenizer = loading.load_tokenizer(name, section.trust_remote_code)
    except UsageError as error:
        if server is None or section.tokenizer is not None:
            raise
        raise UsageError(
            f"{error}; set teacher.tokenizer to the directory or Hub model with the teacher's files"
        ) from None
    if server is None:
        config = loading.load_config(section.model, section.trust_remote_code)
        context = loading.context_length(config)
    else:
        context = server.context()
    stop_ids = stops.stop_ids(tokenizer, loading.load_generation_config(name))
    return TeacherProfile(tokenizer, stop_ids, context, server)


def profile_teachers(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> dict[str, TeacherProfile]:
    """Profiles the teachers of a recipe; those that are compared on spans have their aligner.

    `tokenizer` is the student's. Raises UsageError, too, for one whose tokens are not known as
    bytes.
    """
    sections, top_k = config.teachers, config.objective.teacher_top_k
    found = {name: profile_teacher(section, top_k) for name, section in sections.items()}
    apart = [name for name, section in sections.items() if section.align == "spans"]
    if apart:
        student = TokenBytes(tokenizer, "model.student")
    for name in apart:
        profile = found[name]
        other = TokenBytes(profile.tokenizer, f"teacher.{name}".rstrip("."))
        aligner = Aligner(student, other, profile.stop_ids[0], profile.context)
        found[name] = replace(profile, aligner=aligner)
    return found


def check_top_k(top_k: int | None, vocab_size: int) -> None:
    """Raises UsageError if a recipe wants more of the teacher's ids than all models share."""
    if top_k is not None and top_k > vocab_size:
        raise UsageError(
            f"objective.teacher_top_k: expected at most {vocab_size}, the number of ids that the "
            f"models share, got {top_k}"
        )


def unshared_with(
    tokenizer: PreTrainedTokenizerBase, teachers: Mapping[str, TeacherProfile], notify: bool
) -> frozenset[int]:
    """Returns the ids that are not the same token to the student and to every teacher.

    Teachers that are compared on spans have no part in it.
    `tokenizer` is the student's; it notifies the user of such ids. Raises UsageError if more than
    added tokens differ.
    """
    found: set[int] = set()
    for name, teacher in teachers.items():
        if teacher.aligner is not None:
            continue
        try:
            ids = vocabulary.unshared_ids(tokenizer, teacher.tokenizer)
        except UsageError as error:
            raise UsageError(f"teacher.{name}: {error}" if name else str(error)) from None
        found.update(ids)
        if ids and notify:
            notice = vocabulary.unshared_notice(ids, tokenizer, teacher.tokenizer)
            logger.warning("%s%s", f"teacher.{name}: " if name else "", notice)
    return frozenset(found)


def load_teacher_model(section: TeacherConfig, device: torch.device) -> PreTrainedModel:
    """Loads the weights of a teacher in this process, quantized if the recipe says so."""
    if section.quantization is not None:
        return _load_quantized(section, section.quantization, device)
    model = loading.load_model(section.model, section.dtype, section.trust_remote_code)
    return model if section.offload else model.to(device)


def over_vocabulary(
    section: TeacherConfig, model: PreTrainedModel, shared: vocabulary.Vocabulary
) -> language_model.Teacher:
    """Returns a teacher over the shared vocabulary, or over its own if it is compared on spans."""
    own = shared if section.align == "ids" else vocabulary.Vocabulary(vocabulary.head_rows(model))
    dtype = devices.torch_dtype(section.dtype)
    return language_model.Teacher(model, own.size, dtype, own.masked)


def _load_quantized(
    section: TeacherConfig, quantization: Mapping[str, Any], device: torch.device
) -> PreTrainedModel:
    """Loads quantized weights; raises UsageError if the quantization cannot be had here."""
    try:
        return loading.load_model(
            section.model,
            section.dtype,
            section.trust_remote_code,
            quantization_config=AutoQuantizationConfig.from_dict(dict(quantization)),
            device_map={"": device},  # quantized weights are made where they stay
        )
    except UsageError:
        raise
    except (ImportError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"teacher.quantization: {dict(quantization)} does not work here "
            f"({type(error).__name__}: {reason}); docs/teachers.md shows some that do, and "
            "pip install 'poweropd[quant]' has their libraries"
        ) from error


def local_teacher(
    section: TeacherConfig,
    teacher: language_model.Teacher,
    device: torch.device,
    top_k: int | None = None,
) -> LocalTeacher:
    """Returns the scorer of a teacher in this process."""
    offload_from = device if section.offload else None
    return LocalTeacher(teacher, section.max_tokens_per_batch, offload_from, top_k)


def combined(config: Config, scorers: Mapping[str, TeacherScorer]) -> TeacherScorer:
    """Returns one scorer of a recipe's teachers: the only one, several by domain, or a mixture."""
    weights = {name: section.weight for name, section in config.teachers.items()}
    if config.mixes_teachers:
        return MixedTeacher(scorers, weights)
    return RoutedTeacher(scorers, weights) if config.teacher.by else scorers[""]


def unquantized_teacher(
    section: TeacherConfig, student: language_model.Student, device: torch.device
) -> LocalTeacher:
    """Loads the same teacher as it was before it was quantized, over the student's vocabulary."""
    plain = section.model_copy(update={"quantization": None})
    teacher = language_model.Teacher(
        load_teacher_model(plain, device),
        student.vocab_size,
        devices.torch_dtype(section.dtype),
        student.masked_ids,
    )
    return local_teacher(plain, teacher, device)
