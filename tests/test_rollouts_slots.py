"""The transformers engine's slots: filled again, prompts read once, the same to the last bit."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import build_model
from rollout_cases import make_request
from tiny_models import make_model
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from poweropd.data.rollout import Request, Rollout
from poweropd.embedded import END_OF_TEXT
from poweropd.errors import DivergedError
from poweropd.models import loading
from poweropd.models.packed import PackedLinears
from poweropd.rollouts import continuous
from poweropd.rollouts.base import Sampling, completion_seed
from poweropd.rollouts.draws import Sampler, _truncated, inverse_cdf
from poweropd.rollouts.transformers import TransformersEngine

VOCABULARY = 103
Found = dict[tuple[int, int], tuple[list[int], list[float], bool]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two heads to a key and value, linear layers of several sizes; its completions are ragged."""
    path = build_model(tmp_path_factory.mktemp("model") / "m", END_OF_TEXT, 64, seed=0)
    return AutoModelForCausalLM.from_pretrained(path).eval()


def requests(prompts: int, samples: int = 1) -> list[Request]:
    """Prompts of 1 to 40 tokens."""
    ids = [[3 + (7 * i + j) % 100 for j in range(1 + 13 * i % 40)] for i in range(prompts)]
    return [
        make_request(i, own, sample=s, seed=completion_seed(0, 0, i, s))
        for i, own in enumerate(ids)
        for s in range(samples)
    ]


SAMPLING = Sampling(20, stop_ids=tuple(range(6)))


@pytest.fixture(scope="module")
def engine(model: Any) -> TransformersEngine:
    made = TransformersEngine(model, vocab_size=VOCABULARY)
    made.check_decoding()
    return made


def sampled(
    engine: TransformersEngine, asked: list[Request], batch_size: int, **options: Any
) -> Found:
    engine.batch_size = batch_size
    rollouts: Iterator[Rollout] = engine.generate(asked, replace(SAMPLING, **options))
    return {r.key: (r.completion_ids, r.sampling_log_probs, r.stopped) for r in rollouts}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs packed layers")
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}])
def test_completions_are_the_same_to_the_last_bit_in_any_batch(
    engine: TransformersEngine, options: dict[str, Any]
) -> None:
    asked = requests(20)
    whole = sampled(engine, asked, 32, **options)
    assert len({len(ids) for ids, *_ in whole.values()}) > 5  # they end at different times
    for batch_size, some in ((1, asked[:4]), (5, asked[::-1]), (32, asked[5:8])):
        assert sampled(engine, some, batch_size, **options) == {r.key: whole[r.key] for r in some}


class Counted:
    """Counts the tokens of a model's forwards: of prompts, and of each decoding step."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[int, ...]] = []
        self.steps: list[int] = []
        forward = type(model).forward

        def counting(own: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
            if "attention_mask" in inputs:
                self.steps.append(len(input_ids))
            else:
                self.read += [tuple(row) for row in input_ids.tolist()]
            return forward(own, input_ids=input_ids, **inputs)

        monkeypatch.setattr(type(model), "forward", counting)


@pytest.mark.parametrize("slots", [1, 4])
def test_a_prompt_is_read_once_for_all_its_completions(
    engine: TransformersEngine, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(5, samples=3)
    alone = {k: v for r in asked for k, v in sampled(engine, [r], 1).items()}
    counted = Counted(engine.model, monkeypatch)
    found = sampled(engine, asked, slots)
    assert (
        len(counted.read) == len(set(counted.read)) == 4
    )  # one prompt has one token, which is fed
    assert found == alone


def test_slots_are_filled_again_as_completions_end(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(engine.model, monkeypatch)
    tokens = sum(len(ids) for ids, *_ in sampled(engine, requests(48), 8).values())
    assert sum(counted.steps) == tokens  # no row is computed that has ended
    assert counted.steps[: tokens // 8 - 20] == [8] * (tokens // 8 - 20)


def test_looking_seldom_at_what_has_ended_changes_nothing(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where every look makes the host wait."""
    often = sampled(engine, requests(20), 6)
    monkeypatch.setattr(continuous, "LOOKS", {"cpu": 5})
    assert sampled(engine, requests(20), 6) == often


# Which models have slots.


@pytest.mark.parametrize(
    ("kind", "fields", "way"),
    [
        ("qwen2", {}, "slots, mask"),
        ("gpt2", {}, "slots, mask"),
        ("bloom", {}, "slots"),  # its positions are the mask's
        ("deepseek_v3", {}, "slots, mask"),
        ("gemma2", {}, "padded"),  # sliding windows
        ("lfm2", {}, "padded"),  # convolutions
        # A window over the last columns, of which its cache says nothing.
        ("gpt_neo", {"window_size": 200}, "padded"),
    ],
)
@pytest.mark.filterwarnings("default")
def test_a_check_that_runs_decides_which_models_have_slots(
    tmp_path: Path, kind: str, fields: dict[str, Any], way: str
) -> None:
    model = loading.load_model(str(make_model(kind, tmp_path, **fields)), "float32")
    engine = TransformersEngine(model, vocab_size=320)
    engine.check_decoding()
    ways = {"padded": engine._padded, "slots": engine._in_slots}
    assert next((n for n, own in ways.items() if own == engine._decode), "slots, mask") == way


def test_damaged_weights_are_named(engine: TransformersEngine) -> None:
    weight = engine.model.model.norm.weight
    healthy = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    try:
        with pytest.raises(DivergedError, match="logits are not finite"):
            list(engine.generate(requests(3), SAMPLING))
    finally:
        weight.data = healthy


def test_a_model_trains_as_before_once_its_layers_were_packed(model: Any) -> None:
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        before = model(ids).logits
        with PackedLinears(model).in_use() as none:
            assert none is None
            packed = model(ids).logits
        torch.testing.assert_close(packed, before)
        assert torch.equal(model(ids).logits, before)
    assert model(ids).logits.requires_grad


# Draws.


@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 1000, 4096, 5000])
def test_the_inverse_cdf_is_that_of_float64(size: int) -> None:
    """Blocks of float32 sums find the id that one float64 sum finds, but for ties by rounding."""
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(500, size, generator=generator).pow(8)
    weights[torch.rand(500, size, generator=generator) < 0.3] = 0
    weights[:, size // 2] = 0.1
    uniforms = torch.rand(500, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    ids, total = inverse_cdf(weights, uniforms)
    cumulative = weights.double().cumsum(1)
    torch.testing.assert_close(total, cumulative[:, -1], rtol=1e-6, atol=0)
    assert (weights.gather(1, ids[:, None]) > 0).all()
    passed = uniforms[:, None] * cumulative[:, -1:]
    expected = torch.searchsorted(cumulative, passed, right=True).squeeze(1)
    tie = (cumulative.gather(1, ids.minimum(expected)[:, None]) - passed).abs().squeeze(1)
    assert ((ids == expected) | (tie < 1e-6 * total)).all()
    assert (ids != expected).sum() <= 1 + (size > 4096)


def test_a_row_is_drawn_the_same_beside_any_others() -> None:
    logits = torch.randn(9, 1003, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(Sampling(1, ()), 1000, [7], torch.device("cpu"))
    uniforms = sampler.uniforms(range(9))[:, 0]
    tokens, log_probs = sampler.draw(logits.clone(), uniforms)
    logits[:, 7] = -torch.inf
    expected = logits[:, :1000].log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs, expected)
    for i in range(9):
        own = sampler.draw(logits[i : i + 1].clone(), uniforms[i : i + 1])
        assert (own[0].item(), own[1].item()) == (tokens[i].item(), log_probs[i].item())


@pytest.mark.parametrize("top_k", [0, 1, 20, 999, 5000])
@pytest.mark.parametrize("top_p", [0.1, 0.95, 1.0])
def test_truncation_is_that_of_transformers(top_k: int, top_p: float) -> None:
    """With equal logits at every boundary, as bfloat16 has them."""
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 3
    logits = logits.bfloat16().float()
    logits[:, 7] = -torch.inf
    expected = logits / 0.6
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = _truncated(logits, Sampling(4, (), temperature=0.6, top_k=top_k, top_p=top_p))
    kept = expected.isfinite()
    # Which of equal logits at the boundary of top-p stay is a matter of the sort.
    assert torch.equal(found.sort(1).values, expected.sort(1).values)
    apart = found.isfinite() != kept
    assert torch.equal(found[~apart], expected[~apart])
