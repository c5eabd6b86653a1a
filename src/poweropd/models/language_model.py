"""The `Student` and `Teacher` modules: a backbone and a head, apart.

The head is never called on a whole batch. `LanguageModel.hidden_states` gives the N hidden states
that predict trained tokens; objectives run the head over chunks of them.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from poweropd.data.batch import Batch, Sequences
from poweropd.kernels import Head, TeacherTopK, TokenStatistics, score_tokens, score_top_k
from poweropd.kernels.head import head_options
from poweropd.models.sharding import like, whole
from poweropd.objectives.base import Objective, TokenRecord
from poweropd.rewards import Reward

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


# The dropout rates of a config by field, nested as the config is.
Rates = dict[str, "float | Rates"]


def dropout_rates(fields: Mapping[str, object]) -> Rates:
    """Returns the dropout rates of a config, given as a dict, with those of nested configs."""
    rates: Rates = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and (inner := dropout_rates(value)):
            rates[name] = inner
        elif "drop" in str(name) and isinstance(value, float):
            rates[name] = value
    return rates


def with_dropout(fields: Mapping[str, Any], rates: Rates) -> dict[str, Any]:
    """Returns a config, given as a dict, with these dropout rates."""
    changed = {
        name: with_dropout(fields[name], value) if isinstance(value, dict) else value
        for name, value in rates.items()
        if name in fields
    }
    return {**fields, **changed}


class LanguageModel(nn.Module):
    """A transformers causal LM (or a peft model of one) as a backbone and a head.

    `model` holds the weights; computing happens in `compute_dtype`, by autocast where the weights
    have another dtype. Its distributions are over the ids below `vocab_size`, less `masked_ids`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        compute_dtype: torch.dtype,
        lora: bool = False,
        masked_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.model, self.lora = model, lora
        self.vocab_size, self.compute_dtype = vocab_size, compute_dtype
        self.masked_ids = tuple(masked_ids)
        self.flat = False  # whether its micro-batches are flat rows, see `data.batch`
        self.head_options = head_options(model.config.to_dict())

    @property
    def causal_lm(self) -> PreTrainedModel:
        """Returns the transformers model, without its adapter's wrapper."""
        return self.model.get_base_model() if self.lora else self.model

    @property
    def backbone(self) -> nn.Module:
        """Returns the model without its head."""
        backbone = self.causal_lm.base_model
        if backbone is self.causal_lm:  # a few name their backbone wrongly, such as Llama 4's text
            return next(m for m in backbone.children() if isinstance(m, PreTrainedModel))
        return backbone

    @property
    def layers(self) -> list[nn.Module]:
        """Returns the decoder layers."""
        kinds = self.causal_lm._no_split_modules or ()
        return [m for m in self.causal_lm.modules() if type(m).__name__ in kinds]

    def kept_ids(self) -> list[int]:
        """Returns the ids of its distributions."""
        masked = {*self.masked_ids}
        return [i for i in range(self.vocab_size) if i not in masked]

    @property
    def device(self) -> torch.device:
        """Returns the device of the weights."""
        return self.model.device

    def autocast(self) -> torch.autocast:
        """Returns a context that computes in the compute dtype."""
        different = self.model.dtype != self.compute_dtype
        return torch.autocast(self.device.type, self.compute_dtype, enabled=different)

    def hidden_states(self, sequences: Sequences) -> Tensor:
        """Computes the hidden states that predict the trained tokens, [N, H] of compute dtype."""
        with self.autocast():
            output = self.backbone(**sequences.inputs, use_cache=False)
        flat = output.last_hidden_state.flatten(0, 1)
        return flat.index_select(0, sequences.index).to(self.compute_dtype)

    def head(self) -> Head:
        """Returns the head over the shared vocabulary, in the weights' dtype.

        Kernels cast it themselves, so that the gradient of float32 weights is not rounded.
        """
        layer = self.causal_lm.get_output_embeddings()
        ids = slice(self.vocab_size) if layer.weight.shape[0] > self.vocab_size else slice(None)
        weight, bias = layer.weight[ids], None if layer.bias is None else layer.bias[ids]
        if self.masked_ids:
            mask = weight.new_zeros(self.vocab_size)
            mask[list(self.masked_ids)] = -torch.inf
            bias = mask if bias is None else bias + mask
        return replace(Head(weight, **self.head_options), bias=bias)


class Student(LanguageModel):
    """The trained model.

    Its forward is a whole micro-batch, loss included, so that DDP and FSDP wrap all of it. It is
    trained without dropout; `dropout` holds the rates that its exported config gets back.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        compute_dtype: torch.dtype,
        lora: bool = False,
        dropout: "Rates | None" = None,
        masked_ids: Sequence[int] = (),
    ) -> None:
        super().__init__(model, vocab_size, compute_dtype, lora, masked_ids)
        self.dropout = dropout or {}

    def forward(
        self, batch: Batch, objective: Objective, reward: Reward, token_weight: Tensor | float
    ) -> tuple[Tensor, TokenRecord]:
        """Returns the loss of a micro-batch, and the record of its trained tokens."""
        hidden_states = self.hidden_states(batch.student)
        return objective(hidden_states, self.head(), batch, reward, token_weight)

    def trained_weights(self) -> dict[str, Tensor]:
        """Returns the trained parameters by name, tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def gathered_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, full tensor) of the whole model as it is now, by its transformers names.

        Parameters come in the compute dtype, unsharded, adapters merged in (the trained module
        stays as it is); a tied head comes under both names. Every process must iterate to the end
        if parameters are sharded.
        """
        adapters = self._adapters()
        parameters = {name for name, _ in self.causal_lm.named_parameters(remove_duplicate=False)}
        for name, tensor in self.causal_lm.state_dict().items():
            if ".lora_" in name:
                continue
            full, plain = whole(tensor), name.replace(".base_layer", "")
            if plain in adapters:
                (active,) = adapters[plain].active_adapters
                full = full + whole(adapters[plain].get_delta_weight(active)).to(full.dtype)
            dtype = self.compute_dtype if name in parameters else full.dtype
            yield plain, full.to(dtype)

    def _adapters(self) -> "dict[str, LoraLayer]":
        """Returns the adapter of each adapted parameter, by the parameter's plain name.

        Two adapters of one module's parameters (the experts of a mixture) are wrapped one in the
        other, so a parameter may stand behind several `base_layer`.
        """
        if not self.lora:
            return {}
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora.layer import ParamWrapper

        return {
            f"{name.replace('.base_layer', '')}."
            f"{layer.parameter_name if isinstance(layer, ParamWrapper) else 'weight'}": layer
            for name, layer in self.causal_lm.named_modules()
            if isinstance(layer, LoraLayer)
        }

    def exported(self, merge: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yields what `save` writes: all weights, tied ones once, or the adapter's alone."""
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
        self.stop_at(stop_ids)
        if self.lora and not merge:
            self.model.save_pretrained(folder, state_dict=weights)
            self.causal_lm.generation_config.save_pretrained(folder)
            return
        self.causal_lm.save_pretrained(folder, state_dict=weights)
        # transformers writes the dtype of the model, not that of the weights it was given, and the
        # dropout of training, which is none.
        path = folder / "config.json"
        config = with_dropout(json.loads(path.read_text()), self.dropout)
        config["dtype"] = str(self.compute_dtype).split(".")[1]
        path.write_text(json.dumps(config, indent=2) + "\n")

    def stop_at(self, stop_ids: list[int]) -> None:
        """Makes the generation config stop where the student was trained to, and fit to be saved.

        transformers refuses to save sampling settings without do_sample=True, which published
        configs leave out.
        """
        generation = self.causal_lm.generation_config
        generation.eos_token_id = stop_ids
        try:
            generation.validate(strict=True)
        except ValueError:
            generation.do_sample = True

    @torch.no_grad()
    def load_trained_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copies weights as `trained_weights` names them into the student."""
        for name, parameter in self.trained_weights().items():
            parameter.copy_(like(weights[name], parameter))


class Teacher(LanguageModel):
    """The model that judges: a frozen one or, with `reading`, the student's own.

    `reading()` is a context in which the student's module holds the teacher's weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        compute_dtype: torch.dtype,
        masked_ids: Sequence[int] = (),
        lora: bool = False,
        reading: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> None:
        own = model.requires_grad_(False).eval() if reading is None else model
        super().__init__(own, vocab_size, compute_dtype, lora, masked_ids)
        self.reading = nullcontext if reading is None else reading

    @torch.no_grad()
    def hidden_states(self, sequences: Sequences) -> Tensor:
        """Computes the hidden states as any model does, without a gradient."""
        with self.reading():
            return super().hidden_states(sequences)

    @torch.no_grad()
    def head(self) -> Head:
        """Returns the head, which goes on with the weights if they are trained."""
        with self.reading():
            return super().head()

    @torch.no_grad()  # inference mode could leave buffers behind that no gradient may pass
    def score(self, sequences: Sequences) -> TokenStatistics:
        """Returns the teacher's statistics of the N targets, in one forward."""
        return score_tokens(self.hidden_states(sequences), self.head(), sequences.targets)

    @torch.no_grad()
    def score_top_k(self, sequences: Sequences, k: int) -> tuple[TokenStatistics, TeacherTopK]:
        """Returns the same, and the k most probable ids of each context."""
        return score_top_k(self.hidden_states(sequences), self.head(), sequences.targets, k)


@torch.no_grad()
def with_teacher(batch: Batch, teacher: Teacher) -> Batch:
    """Returns the batch with the teacher's hidden states, which some objectives need."""
    return replace(batch, teacher_hidden=teacher.hidden_states(batch.teacher))
