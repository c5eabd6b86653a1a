"""Which attention a model runs, and whether its micro-batches can be flat."""

import inspect
import logging

import torch
from transformers.utils import is_flash_attn_2_available

from poweropd.data.batch import Sequences
from poweropd.errors import UsageError
from poweropd.models.language_model import LanguageModel

logger = logging.getLogger("poweropd")

# These compute the whole square of a sequence and mask it: in a flat batch that costs more than the
# padding that it saves (docs/lab-notes.md). The others skip what is masked.
PADDED = ("sdpa", "eager")
# The kinds of layers that follow position ids at any length.
LAYER_TYPES = {"full_attention", "sliding_attention"}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}


def implementation(model: LanguageModel) -> str:
    """Returns the name of the attention that the model runs."""
    return str(model.causal_lm.config._attn_implementation)


def set_attention(model: LanguageModel, wanted: str) -> None:
    """Sets an attention implementation of transformers by its name, in place.

    "auto" stands for flash attention if it is installed and the model can run it, else for the
    choice of transformers. Raises UsageError for one that the model or this machine cannot run.
    """
    name = wanted
    if wanted == "auto":
        if model.compute_dtype == torch.float32 or not is_flash_attn_2_available():
            return
        name = "flash_attention_2"
    reason = "it cannot be changed for this model"
    try:
        model.causal_lm.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        reason = str(error).partition("\n")[0]
    if wanted != "auto" and implementation(model) != wanted:
        raise UsageError(f"model.attention: {wanted}: {reason}")


def packs_flat(model: LanguageModel, packing: str, who: str) -> bool:
    """Decides whether the micro-batches of this model are flat, by the recipe's `packing`.

    Raises UsageError if flat ones are asked for and the model would mix their sequences.
    """
    if packing == "padded" or (packing == "auto" and implementation(model) in PADDED):
        return False
    reason = why_not_flat(model)
    if reason is None:
        return True
    if packing == "flat":
        raise UsageError(f"train.packing: flat: the {who} {reason}: use auto or padded")
    logger.warning("the %s's micro-batches are padded: it %s", who, reason)
    return False


def why_not_flat(model: LanguageModel) -> str | None:
    """Says what would go wrong in a flat batch; None if each sequence sees only itself."""
    if "position_ids" not in inspect.signature(model.backbone.forward).parameters:
        return "takes no position ids"
    kinds = set(model.causal_lm.config.to_dict().get("layer_types") or ())
    if not kinds <= LAYER_TYPES:
        return f"has layers of type {', '.join(sorted(kinds - LAYER_TYPES))}"
    error = mixing(model)
    if error > TOLERANCES[model.compute_dtype]:
        return (
            f"computes other hidden states in a flat batch than in a padded one (relative "
            f"difference {error:.2g})"
        )
    return None


@torch.no_grad()
def mixing(model: LanguageModel) -> float:
    """Measures the largest relative difference of a hidden state in a flat and a padded batch."""
    ids = torch.randint(model.vocab_size, (19,), generator=torch.Generator().manual_seed(0))
    sequences = [part.tolist() for part in ids.split([7, 12])]
    indices = [torch.arange(len(own)) for own in sequences]
    flat, padded = (
        model.hidden_states(
            Sequences.collate(sequences, indices, ids, flat).to(model.device)
        ).double()
        for flat in (True, False)
    )
    return float(((flat - padded).norm(dim=1) / padded.norm(dim=1)).max())
