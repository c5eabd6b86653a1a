"""The shape of a dense decoder, on which its FLOPs and bytes depend."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from poweropd.errors import UsageError

# Field of a transformers config -> field of `Geometry`; a config must have all of them.
_REQUIRED = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp",
    "vocab_size": "vocab",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Geometry:
    """A decoder of gated MLPs and grouped-query attention, such as Qwen3.

    Other decoders differ in small things: biases, norms of queries and keys.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int  # rows of the head
    tied: bool  # the head is the embedding
    context: int | None = None  # tokens; None where the config states none

    @property
    def query(self) -> int:
        """Returns the width of all queries, which in Qwen3 is not `hidden`."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Returns the width of all keys, which is that of all values."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Returns the linear maps of a layer: name -> (inputs, outputs)."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key_value),
            "v_proj": (self.hidden, self.key_value),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Counts the parameters of the linear maps of one layer."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def layer_parameters(self) -> int:
        """Counts the parameters of one layer."""
        return self.linear_parameters + 2 * self.hidden + 2 * self.head_dim

    @property
    def outer_parameters(self) -> int:
        """Counts the parameters outside the layers: embedding, head and last norm."""
        return self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Counts all parameters."""
        return self.layers * self.layer_parameters + self.outer_parameters

    @classmethod
    def from_fields(cls, name: str, fields: Mapping[str, Any]) -> "Geometry":
        """Reads a transformers config, given as a dict; messages call the model `name`.

        Raises UsageError for a mixture of experts and for a missing field.
        """
        for key in _EXPERTS:
            if (fields.get(key) or 0) > 1:
                raise UsageError(
                    f"{name}: a mixture of experts ({key}={fields[key]}): only dense models are "
                    "modelled, neither the memory of all experts nor the FLOPs of the active ones"
                )
        missing = [key for key in _REQUIRED if not fields.get(key)]
        if missing:
            raise UsageError(
                f"{name}: its config ({fields.get('model_type', 'no model_type')}) has no "
                f"{', '.join(missing)}: FLOPs and memory cannot be planned for it"
            )
        required = {ours: int(fields[theirs]) for theirs, ours in _REQUIRED.items()}
        return cls(
            **required,
            kv_heads=fields.get("num_key_value_heads") or required["heads"],
            head_dim=fields.get("head_dim") or required["hidden"] // required["heads"],
            tied=bool(fields.get("tie_word_embeddings")),
            context=fields.get("max_position_embeddings"),
        )


# The models of arXiv:2606.17199, as their configs have them.
KNOWN = {
    "Qwen/Qwen3-0.6B": Geometry(28, 1024, 16, 8, 128, 3072, 151_936, True, 40_960),
    "Qwen/Qwen3-0.6B-Base": Geometry(28, 1024, 16, 8, 128, 3072, 151_936, True, 32_768),
    "Qwen/Qwen3-1.7B": Geometry(28, 2048, 16, 8, 128, 6144, 151_936, True, 40_960),
    "Qwen/Qwen3-1.7B-Base": Geometry(28, 2048, 16, 8, 128, 6144, 151_936, True, 32_768),
    "Qwen/Qwen3-4B": Geometry(36, 2560, 32, 8, 128, 9728, 151_936, True, 40_960),
    "Qwen/Qwen3-8B": Geometry(36, 4096, 32, 8, 128, 12_288, 151_936, False, 40_960),
}
