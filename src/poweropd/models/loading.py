"""Loading models and tokenizers, and checking that they can be trained together."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from poweropd import embedded
from poweropd.config import sections
from poweropd.data.batch import Sequences
from poweropd.embedded import EMBEDDED_PREFIX
from poweropd.errors import UsageError
from poweropd.kernels import linear_log_prob
from poweropd.models.language_model import LanguageModel

UNLIMITED = 10**9


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve(name: str) -> str:
    """The directory of an embedded model; any other name or path as it is."""
    if name.startswith(EMBEDDED_PREFIX):
        try:
            return str(embedded.path(name.removeprefix(EMBEDDED_PREFIX)))
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UsageError(f"{name}: no such model directory")
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    return _load(AutoTokenizer, name, trust_remote_code=trust_remote_code)


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    return _load(AutoConfig, name, trust_remote_code=trust_remote_code)


def load_model(
    name: str,
    dtype: str,
    trust_remote_code: bool = False,
    dropout: bool = True,
    **options: Any,
) -> Any:
    """A causal LM in eval mode with weights of `dtype`; its head is checked to be a plain one.

    `options` are further ones of `from_pretrained`.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    transformers_logging.disable_progress_bar()
    config = load_config(name, trust_remote_code)
    if not dropout:
        rates = {k: v for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float)}
        config.update(dict.fromkeys(rates, 0.0))
    model = _load(
        AutoModelForCausalLM,
        name,
        config=config,
        dtype=DTYPES[dtype],
        trust_remote_code=trust_remote_code,
        **options,
    ).eval()
    _check_head(model, name)
    return model


def load_generation_config(name: str) -> Any:
    """A model's generation config; an empty one where it ships none."""
    try:
        return GenerationConfig.from_pretrained(resolve(name))
    except OSError:
        return GenerationConfig()


def load_trained(model: sections.ModelConfig) -> Any:
    """The student's weights in the master dtype, with a fresh LoRA adapter if asked for.

    In train mode, which checkpointing needs, or in eval mode: the same, for there is no dropout.
    """
    student = load_model(model.student, model.master_dtype, model.trust_remote_code, dropout=False)
    student = student.requires_grad_(True) if model.lora is None else add_lora(student, model.lora)
    if model.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return student.train(model.gradient_checkpointing)


def _load(kind: Any, name: str, **options: Any) -> Any:
    path = resolve(name)
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"{name}: cannot load it as a model: {reason}") from error


def check_vocabularies(student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """OPD scores the student's ids with the teacher: the same id must be the same token."""
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if student == teacher:
        return
    student_tokens = {i: token for token, i in student.items()}
    teacher_tokens = {i: token for token, i in teacher.items()}
    ids = sorted({*student_tokens, *teacher_tokens})
    differing = [i for i in ids if student_tokens.get(i) != teacher_tokens.get(i)]
    shown = ", ".join(
        f"{i} ({student_tokens.get(i)!r} / {teacher_tokens.get(i)!r})" for i in differing[:5]
    )
    raise UsageError(
        f"student and teacher must share one vocabulary: the student has {len(student)} tokens, "
        f"the teacher {len(teacher)}; {len(differing)} ids differ: {shown}"
        f"{', ...' if len(differing) > 5 else ''}"
    )


def fingerprint(name: str, model: Any) -> str:
    """A model's name with its Hub commit, or the size and time of a directory's weights."""
    path = Path(resolve(name))
    if not path.is_dir():
        return f"{name}@{model.config.to_dict().get('_commit_hash') or model.config._commit_hash}"
    files = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin"))
    stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{name}#{hashlib.sha256(str(stamp).encode()).hexdigest()[:12]}"


def context_length(config: Any) -> int:
    """Tokens of the model's context; unlimited where its config states none."""
    return int(config.get_text_config().to_dict().get("max_position_embeddings", UNLIMITED))


def shared_vocab_size(*models: Any) -> int:
    """Rows that all heads have. Rows past them are padding, left out of every softmax."""
    return min(m.get_output_embeddings().weight.shape[0] for m in models)


def add_lora(model: Any, lora: sections.LoraConfig) -> Any:
    try:
        import peft
    except ModuleNotFoundError:
        raise UsageError("model.lora needs peft: pip install 'poweropd[peft]'") from None
    if {"lm_head", "embed_tokens"} & set(lora.target_modules):
        raise UsageError("model.lora.target_modules: the head and the embeddings take no adapter")
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"model.lora: {str(error).partition(chr(10))[0]}") from None


@torch.no_grad()
def _check_head(model: Any, name: str) -> None:
    """Refuses a model whose logits are not its head applied to its last hidden states."""
    weight = model.get_output_embeddings().weight
    if type(weight) is not nn.Parameter:
        raise UsageError(
            f"{name}: its head is quantized ({type(weight).__name__}), but all tokens are scored "
            "with its plain weight: leave lm_head out of the quantization"
        )
    ids = torch.arange(1, 5, device=model.device)[None]
    sequences = Sequences({"input_ids": ids}, torch.arange(4, device=model.device), ids[0])
    language_model = LanguageModel(
        model, model.get_output_embeddings().weight.shape[0], model.dtype
    )
    head = language_model.head()
    expected = model(input_ids=ids).logits[0].float().log_softmax(-1).gather(1, ids[0][:, None])
    hidden_states = language_model.hidden_states(sequences)
    got = linear_log_prob(hidden_states, head.weight, sequences.targets, **head.options)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not torch.allclose(got, expected.squeeze(1), atol=tolerance, rtol=tolerance):
        raise UsageError(
            f"{name}: its {type(model).__name__} does more to its logits than a linear head with "
            "scale and soft-cap, which is all that is supported"
        )
