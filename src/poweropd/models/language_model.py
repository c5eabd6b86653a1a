"""Loading models, and the `Student` and `Teacher` modules: a backbone and a head, apart.

The head is never called on a whole batch. `LanguageModel.hidden_states` gives the N hidden states
that predict trained tokens; objectives run the head over chunks of them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from poweropd.data.batch import Batch, Sequences
from poweropd.kernels import Head, TokenStatistics, score_tokens
from poweropd.models.sharding import like, whole
from poweropd.objectives.base import Objective, TokenRecord
from poweropd.rewards import Reward

if TYPE_CHECKING:  # so that models, and benchmarks of them, need no pydantic
    pass


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
        self.flat = False  # whether its micro-batches are flat rows, see `data.batch`
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

    def forward(
        self, batch: Batch, objective: Objective, reward: Reward, token_weight: float
    ) -> tuple[Tensor, TokenRecord]:
        """Returns the loss of a micro-batch, and the record of its trained tokens."""
        hidden_states = self.hidden_states(batch.student)
        return objective(hidden_states, self.head(), batch, reward, token_weight)

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
        """Returns the teacher's statistics of the N targets, in one forward."""
        return score_tokens(self.hidden_states(sequences), self.head(), sequences.targets)
