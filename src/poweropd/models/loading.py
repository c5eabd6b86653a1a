"""Loads models and tokenizers, and checks that they can be trained together."""

import hashlib
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from poweropd.data.batch import Sequences
from poweropd.errors import UNREADABLE, UsageError, one_line
from poweropd.kernels import score_tokens
from poweropd.models import AUTO_DTYPE, DTYPES
from poweropd.models.devices import torch_dtype
from poweropd.models.language_model import LanguageModel, dropout_rates
from poweropd.models.places import resolve

if TYPE_CHECKING:  # benchmarks of models need no pydantic
    from poweropd.config.sections import LoraConfig, ModelConfig

UNLIMITED = 10**9
ADAPTER = "adapter_config.json"
# What a forward raises that does not fit its config, or its arguments.
FORWARD_FAILURES: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, LookupError)
FORWARD_FAILURES += (AttributeError, AssertionError)
# Fields of configs that state the context; a config may map one to a name of its own.
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


def adapted(name: str) -> str | None:
    """Returns the model that an adapter's directory adapts; None for any other name."""
    path = Path(resolve(name)) / ADAPTER
    if not path.is_file() or (path.parent / "config.json").is_file():
        return None
    try:
        return str(json.loads(path.read_text("utf-8"))["base_model_name_or_path"])
    except (KeyError, TypeError, *UNREADABLE) as error:
        raise UsageError(f"{path}: expected an adapter's config ({error!r})") from None


def _with_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Merges the adapter of a directory into its base model; its generation config counts."""
    peft = import_peft(f"{adapter} is an adapter, which")
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    if (Path(adapter) / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(adapter)
    return merged


def import_peft(what: str) -> ModuleType:
    """Imports peft; raises UsageError, which says what needs it, if it is not installed."""
    try:
        return importlib.import_module("peft")
    except ModuleNotFoundError:
        raise UsageError(f"{what} needs peft: pip install 'poweropd[peft]'") from None


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model directory or Hub model; raises UsageError without one."""
    return _load(AutoTokenizer, name, trust_remote_code=trust_remote_code)


def load_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Loads the config of a model directory or Hub model; raises UsageError without one."""
    return _load(AutoConfig, adapted(name) or name, trust_remote_code=trust_remote_code)


def load_model(
    name: str,
    dtype: str,
    trust_remote_code: bool = False,
    dropout: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Loads a causal LM in eval mode with weights of `dtype`, and checks that its head is plain.

    `options` are passed on to `from_pretrained`. Raises UsageError if it cannot be loaded.
    """
    if dtype not in (AUTO_DTYPE, *DTYPES):
        known = ", ".join((AUTO_DTYPE, *DTYPES))
        raise UsageError(f"dtype: expected one of {known}, got {dtype!r}")
    transformers_logging.disable_progress_bar()
    config = load_config(name, trust_remote_code)
    if not dropout:
        _switch_dropout_off(config)
    model, info = _load(
        AutoModelForCausalLM,
        adapted(name) or name,
        config=config,
        dtype=torch_dtype(dtype),
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told below
        **options,
    )
    absent = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if absent:
        raise UsageError(
            f"{name}: its files lack {len(absent)} of the model's weights in its shapes, such as "
            f"{absent[0]}, which would be random: they are not of this model, or a part of them is "
            "missing"
        )
    if adapted(name) is not None:
        model = _with_adapter(model, resolve(name))
    model.eval()
    _check_head(model, name)
    return model


def _switch_dropout_off(config: PreTrainedConfig) -> None:
    """Sets all dropout rates of a config to zero, also those of the configs in it."""
    rates = dropout_rates(config.to_dict())
    config.update({name: 0.0 for name, value in rates.items() if isinstance(value, float)})
    for name in config.sub_configs:
        if name in rates:
            _switch_dropout_off(getattr(config, name))


def load_generation_config(name: str) -> GenerationConfig:
    """Loads a model's generation config; an empty one if it ships none."""
    try:
        return GenerationConfig.from_pretrained(resolve(name))
    except OSError:
        return GenerationConfig()


def load_trained(model: "ModelConfig") -> PreTrainedModel:
    """Loads the student in the master dtype, with a fresh LoRA adapter if asked for.

    Gradient checkpointing needs train mode; without it the model is in eval mode, which computes
    the same, since dropout is off.
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
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = one_line(str(error))[:200]
        raise UsageError(f"{name}: cannot load it as a model: {reason}") from error


def fingerprint(name: str, model: PreTrainedModel) -> str:
    """Returns a model's name with its Hub commit, or with a hash of its files' sizes and times."""
    path = Path(resolve(name))
    if not path.is_dir():
        return f"{name}@{model.config.to_dict().get('_commit_hash') or model.config._commit_hash}"
    files = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin"))
    stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{name}#{hashlib.sha256(str(stamp).encode()).hexdigest()[:12]}"


def context_length(config: PreTrainedConfig) -> int:
    """Returns the tokens of the model's context; `UNLIMITED` if its config states none."""
    text_config = config.get_text_config()
    fields = text_config.to_dict()
    named = (text_config.attribute_map.get(name, name) for name in CONTEXT_FIELDS)
    return next((int(fields[name]) for name in named if fields.get(name)), UNLIMITED)


def vocab_rows(config: PreTrainedConfig) -> int | None:
    """Returns how many ids the model's embedding has by its config; None if it does not say."""
    rows = config.get_text_config().to_dict().get("vocab_size")
    return None if rows is None else int(rows)


def add_lora(model: PreTrainedModel, lora: "LoraConfig") -> PreTrainedModel:
    """Adds a LoRA adapter; raises UsageError if peft is missing or refuses the settings."""
    peft = import_peft("model.lora")
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
def _check_head(model: PreTrainedModel, name: str) -> None:
    """Raises UsageError if the logits are not the head applied to the last hidden states.

    Also if a forward fails: then the config does not fit the architecture of this transformers.
    """
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
    try:
        logits = model(input_ids=ids).logits[0].float()
        hidden_states = language_model.hidden_states(sequences)
        got = score_tokens(hidden_states, language_model.head(), sequences.targets).log_probs
    except FORWARD_FAILURES as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UsageError(
            f"{name}: a forward of its {type(model).__name__} fails ({reason}): does its config "
            "fit its weights, and does this version of transformers know it?"
        ) from error
    expected = logits.log_softmax(-1).gather(1, ids[0][:, None])
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not torch.allclose(got, expected.squeeze(1), atol=tolerance, rtol=tolerance):
        raise UsageError(
            f"{name}: its {type(model).__name__} does more to its logits than a linear head with "
            "scale and soft-cap, which is all that is supported"
        )
