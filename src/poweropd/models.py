"""Loading models, and the `Student` and `Teacher` modules: a backbone and a head, apart.

The head is never called on a whole batch. `LanguageModel.hidden_states` gives the N hidden states
that predict trained tokens; objectives run the head over chunks of them.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from poweropd import embedded
from poweropd.batching import Batch, Sequences
from poweropd.errors import UsageError
from poweropd.kernels import Head, TokenStatistics, linear_log_prob
from poweropd.objectives import Objective, TokenRecord
from poweropd.sharding import like, whole

if TYPE_CHECKING:  # so that models, and benchmarks of them, need no pydantic
    from poweropd import sections

EMBEDDED_PREFIX = "embedded:"
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


def load_trained(model: "sections.Model") -> Any:
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


def add_lora(model: Any, lora: "sections.Lora") -> Any:
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


class LanguageModel(nn.Module):
    """A transformers causal LM (or a peft model of one) as a backbone and a head.

    `model` holds the weights; computing happens in `compute_dtype`, by autocast where the weights
    have another dtype.
    """

    def __init__(
        self, model: Any, vocab_size: int, compute_dtype: torch.dtype, lora: bool = False
    ) -> None:
        super().__init__()
        self.model, self.lora = model, lora
        self.vocab_size, self.compute_dtype = vocab_size, compute_dtype
        self.flat = False  # whether its micro-batches are flat rows, see `batching`
        options = model.config.to_dict()
        # Cohere multiplies logits, Granite divides them, Gemma 2 and 3 soft-cap them.
        self.scale = options.get("logit_scale", 1.0) / options.get("logits_scaling", 1.0)
        self.softcap = options.get("final_logit_softcapping")

    @property
    def causal_lm(self) -> Any:
        return self.model.get_base_model() if self.lora else self.model

    @property
    def layers(self) -> list[nn.Module]:
        """Its decoder layers."""
        kinds = self.causal_lm._no_split_modules or ()
        return [m for m in self.causal_lm.modules() if type(m).__name__ in kinds]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def autocast(self) -> torch.autocast:
        different = self.model.dtype != self.compute_dtype
        return torch.autocast(self.device.type, self.compute_dtype, enabled=different)

    def hidden_states(self, sequences: Sequences) -> Tensor:
        """[N, H] hidden states that predict the trained tokens, in the compute dtype."""
        with self.autocast():
            output = self.causal_lm.base_model(**sequences.inputs, use_cache=False)
        flat = output.last_hidden_state.flatten(0, 1)
        return flat.index_select(0, sequences.index).to(self.compute_dtype)

    def head(self) -> Head:
        """The head over the shared vocabulary, in the weights' dtype: kernels cast it themselves,
        so that the gradient of float32 weights is not rounded."""
        layer = self.causal_lm.get_output_embeddings()
        rows = slice(self.vocab_size) if layer.weight.shape[0] > self.vocab_size else slice(None)
        return Head(
            weight=layer.weight[rows],
            bias=None if layer.bias is None else layer.bias[rows],
            scale=self.scale,
            softcap=self.softcap,
        )


class Student(LanguageModel):
    """The trained model. Its forward is a whole micro-batch, loss included, so that DDP and FSDP
    wrap all of it."""

    def forward(self, batch: Batch, objective: Objective) -> tuple[Tensor, TokenRecord]:
        return objective(self.hidden_states(batch.student), self.head(), batch)

    def trained_weights(self) -> dict[str, Tensor]:
        """Name -> trained parameter, tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def gathered_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) of the whole model as it is now, by its names in transformers.

        Parameters come in the compute dtype, unsharded, adapters merged in (the trained module
        stays as it is); a tied head comes under both names. Every process must iterate to the end
        where parameters are sharded.
        """
        deltas = {}
        if self.lora:
            from peft.tuners.lora import LoraLayer

            layers = self.causal_lm.named_modules()
            deltas = {
                f"{name}.base_layer.weight": m for name, m in layers if isinstance(m, LoraLayer)
            }
        parameters = {name for name, _ in self.causal_lm.named_parameters(remove_duplicate=False)}
        for name, tensor in self.causal_lm.state_dict().items():
            if ".lora_" in name:
                continue
            full = whole(tensor)
            if name in deltas:
                (adapter,) = deltas[name].active_adapters
                full = full + whole(deltas[name].get_delta_weight(adapter)).to(full.dtype)
            dtype = self.compute_dtype if name in parameters else full.dtype
            yield name.replace(".base_layer.", "."), full.to(dtype)

    def exported(self, merge: bool = False) -> Iterator[tuple[str, Tensor]]:
        """What `save` writes: all weights, tied ones once, or the adapter's unless merged."""
        if self.lora and not merge:
            return iter(self.trained_weights().items())
        tied = self.causal_lm.all_tied_weights_keys
        return ((name, tensor) for name, tensor in self.gathered_weights() if name not in tied)

    def save(
        self, folder: Path, weights: dict[str, Tensor], stop_ids: list[int], merge: bool = False
    ) -> None:
        """Saves a Hugging Face model in the compute dtype, or a peft adapter unless merged.

        `weights` are those of `exported`. The generation config stops where it was trained to.
        """
        self.causal_lm.generation_config.eos_token_id = stop_ids
        if self.lora and not merge:
            self.model.save_pretrained(folder, state_dict=weights)
            return
        self.causal_lm.save_pretrained(folder, state_dict=weights)
        # transformers writes the dtype of the model, not that of the weights it was given.
        path = folder / "config.json"
        config = json.loads(path.read_text()) | {"dtype": str(self.compute_dtype).split(".")[1]}
        path.write_text(json.dumps(config, indent=2) + "\n")

    @torch.no_grad()
    def load_trained_weights(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.trained_weights().items():
            parameter.copy_(like(weights[name], parameter))


class Teacher(LanguageModel):
    """The frozen model."""

    def __init__(self, model: Any, vocab_size: int, compute_dtype: torch.dtype) -> None:
        super().__init__(model.requires_grad_(False).eval(), vocab_size, compute_dtype)

    @torch.inference_mode()
    def score(self, sequences: Sequences) -> TokenStatistics:
        """Of the N targets: their log-probabilities are its `student_log_probs`."""
        head, targets = self.head(), sequences.targets
        statistics = TokenStatistics.empty(len(targets), targets.device)
        hidden_states = self.hidden_states(sequences)
        linear_log_prob(hidden_states, head.weight, targets, statistics=statistics, **head.options)
        return statistics


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
