"""Tiny random models of any architecture of transformers, with a byte tokenizer and a template."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from poweropd import Config

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT, TURN_START, TURN_END = range(3)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A template that iterates over the parts of a content, and finds none in a plain text.
PARTS = CHATML.replace(
    "{{ m['content'] }}",
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}",
)
NEEDS_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn is needed') }}"
    "{% endif %}" + CHATML
)

# Small values for whichever of these fields a config has; a field may have several names.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **{"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8, "rotary_dim": 8},
    **{
        "mamba_d_ssm": 64,
        "mamba_expand": 2,
        "mamba_chunk_size": 16,
        "chunk_size": 16,
        "time_step_rank": 4,
    },
    **{"linear_num_key_heads": 2, "linear_key_head_dim": 16, "lru_width": 32, "sliding_window": 16},
    **{"eos_token_id": TURN_END, "bos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT},
}
# What an architecture needs beside them.
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
LATENT = {"num_key_value_heads": 4}  # attention with a latent has as many as attention heads
NEEDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), HYBRID),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "axk1", "axk2"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "dots3_note_text"), LATENT),
    **dict.fromkeys(("minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), CONVOLUTION),
    "bailing_hybrid": HYBRID | LATENT,
    "bamba": {"attn_layer_indices": [1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": HYBRID | LATENT,
    "qwen4_exp_text": HYBRID,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "mamba2": {"head_dim": 16},
}


def make_config(kind: str, vocab_size: int, **fields: Any) -> PreTrainedConfig:
    """A small config; of what a kind does not have, nothing is set."""
    default = AutoConfig.for_model(kind)
    known = {*default.to_dict(), *default.attribute_map}
    small = {name: value for name, value in SIZES.items() if name in known}
    small |= {"vocab_size": vocab_size}
    return AutoConfig.for_model(kind, **{**small, **NEEDS.get(kind, {}), **fields})


def kinds() -> list[str]:
    """All kinds of causal LMs that transformers has."""
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def make_byte_tokenizer(template: str = CHATML, extra: int = 0) -> PreTrainedTokenizerFast:
    """One token for each byte, and `extra` more that no text of bytes gives."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(SPECIAL + letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=SPECIAL[TURN_END], pad_token=SPECIAL[END_OF_TEXT]
    )
    if extra:
        tokenizer.add_tokens([f"<new_{i}>" for i in range(extra)])
    tokenizer.chat_template = template
    return tokenizer


def make_model(
    kind: str,
    folder: Path,
    seed: int = 0,
    *,
    template: str = CHATML,
    extra: int = 0,
    eos: int | list[int] = TURN_END,
    generation: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """Saves a random model whose distributions are not flat; `fields` are of its config."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(kind, 320, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    make_byte_tokenizer(template, extra).save_pretrained(folder)
    text = json.dumps({"eos_token_id": eos, **(generation or {})})
    (folder / "generation_config.json").write_text(text)
    return folder


def make_recipe(student: Path, teacher: Path, folder: Path, **overrides: Any) -> Config:
    """A run of two steps; overrides are dotted keys."""
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        texts = ["2+2?", "What is three and four?", "Name a colour.", "5?"]
        prompts.write_text("".join(json.dumps({"problem": t}) + "\n" for t in texts))
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run")},
        "model": {"student": str(student), "dtype": "float32"},
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "data": {"prompts": str(prompts)},
        "rollout": {"max_new_tokens": 8},
        "reward": {"name": "log_ratio"},
        "train": {"steps": 2, "prompts_per_step": 4, "learning_rate": 1e-3},
    }
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return Config.from_dict(tree)
