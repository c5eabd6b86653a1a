"""Every causal LM of transformers is trained, or refused in one line: a dozen here, all if slow."""

from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_models import kinds, make_config, make_model, make_recipe
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from poweropd import Trainer
from poweropd.errors import RunError, UsageError
from poweropd.runs.directory import RunDirectory

LARGEST = 5_000_000  # parameters of what counts as tiny
# What is trained, whatever transformers says: dense, mixtures, latent and linear attention,
# convolutions, a state space beside attention, scaled and soft-capped logits.
TRAINED = (
    *("qwen2", "llama", "gpt2", "gemma2", "cohere2", "granite", "mixtral", "deepseek_v3"),
    *("gpt_oss", "qwen3_5_text", "lfm2", "falcon_h1", "llama4_text", "mpt"),
)
# What is not, with a part of the line that says why.
REFUSED = {
    "mamba": "decoding MambaForCausalLM with a cache gives other log-probs than its forward",
    "minimax": "decoding MiniMaxForCausalLM with a cache fails (ValueError: ",
    "roberta": "RobertaForCausalLM does more to its logits than a linear head",
    "xlm": "decoding XLMWithLMHeadModel with a cache fails (AssertionError: ",
    "xmod": "a forward of its XmodForCausalLM fails (ValueError: Input language unknown",
}
# What a config, or a model of one, raises that these small numbers do not fit.
NO_CONFIG: tuple[type[Exception], ...] = (ValueError, TypeError, AttributeError, LookupError)
NO_CONFIG += (AssertionError, RuntimeError, ImportError, StrictDataclassError)
# transformers warns about some architectures and configs.
pytestmark = pytest.mark.filterwarnings("default")


def outcome(kind: str, folder: Path) -> str:
    """The line with which a kind of model is refused; empty if it was trained."""
    models = [make_model(kind, folder / name, seed) for seed, name in enumerate("st")]
    config = make_recipe(*models, folder, **{"rollout.max_new_tokens": 6})
    try:
        result = Trainer(config, progress=False).train()
    except (UsageError, RunError) as error:
        return str(error)
    rows = RunDirectory(result.run_dir).metrics()
    assert result.steps == len(rows) == 2
    assert all(row["num_tokens"] and row["grad_norm"] for row in rows)
    return ""


@pytest.mark.parametrize("kind", TRAINED)
def test_these_architectures_are_trained(kind: str, tmp_path: Path) -> None:
    assert outcome(kind, tmp_path) == ""


@pytest.mark.parametrize("kind", REFUSED)
def test_these_are_refused_before_anything_is_trained(kind: str, tmp_path: Path) -> None:
    (line,) = outcome(kind, tmp_path).splitlines()
    assert REFUSED[kind] in line
    assert not RunDirectory(tmp_path / "run").metrics()


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds())
def test_each_architecture_is_trained_or_refused(kind: str, tmp_path: Path) -> None:
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(make_config(kind, 320))
        if sum(p.numel() for p in model.parameters()) > LARGEST:
            pytest.skip("no tiny config")
        make_model(kind, tmp_path / "probe")
    except NO_CONFIG as error:
        pytest.skip(f"no tiny config: {type(error).__name__} {str(error)[:80]}")
    assert len(outcome(kind, tmp_path).splitlines()) <= 1
