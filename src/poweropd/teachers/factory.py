"""The teachers of a recipe: what is known before any weight is loaded, then their scorers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.quantizers import AutoQuantizationConfig

from poweropd import stops
from poweropd.config import sections
from poweropd.errors import UsageError
from poweropd.models import language_model, loading
from poweropd.net import api_key, base_url
from poweropd.teachers.local import LocalTeacher
from poweropd.teachers.pool import PoolSettings
from poweropd.teachers.server import ServerTeacher


@dataclass(frozen=True)
class TeacherProfile:
    """What is known of a teacher before any weight is loaded."""

    tokenizer: Any
    stop_ids: list[int]
    context: int  # tokens of the longest sequence it reads
    server: ServerTeacher | None


def profile_teacher(section: sections.TeacherConfig) -> TeacherProfile:
    """Raises UsageError or RunError where there is no such model or server."""
    server = connect_servers(section) if section.servers else None
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
        context = loading.context_length(
            loading.load_config(section.model, section.trust_remote_code)
        )
    else:
        context = server.context()
    stop_ids = stops.stop_ids(tokenizer, loading.load_generation_config(name))
    return TeacherProfile(tokenizer, stop_ids, context, server)


def connect_servers(section: sections.TeacherConfig) -> ServerTeacher:
    key = api_key("teacher.api_key_env", section.api_key_env)
    settings = PoolSettings(
        section.model, section.timeout, section.concurrency, section.give_up_after, key
    )
    return ServerTeacher([base_url(url) for url in section.servers], settings)


def load_teacher_model(section: sections.TeacherConfig, device: torch.device) -> Any:
    """The weights of a teacher in this process, quantized where the recipe says so."""
    if section.quantization is not None:
        return _load_quantized(section, section.quantization, device)
    model = loading.load_model(section.model, section.dtype, section.trust_remote_code)
    return model if section.offload else model.to(device)


def _load_quantized(
    section: sections.TeacherConfig, quantization: Mapping[str, Any], device: torch.device
) -> Any:
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
    section: sections.TeacherConfig, teacher: language_model.Teacher, device: torch.device
) -> LocalTeacher:
    offload_from = device if section.offload else None
    return LocalTeacher(teacher, section.max_tokens_per_batch, offload_from)


def unquantized_teacher(
    section: sections.TeacherConfig, vocab_size: int, device: torch.device
) -> LocalTeacher:
    """The same teacher as it was before it was quantized."""
    plain = section.model_copy(update={"quantization": None})
    dtype = loading.DTYPES[section.dtype]
    return local_teacher(
        plain, language_model.Teacher(load_teacher_model(plain, device), vocab_size, dtype), device
    )
