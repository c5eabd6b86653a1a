"""Sampling: what a completion depends on, and what it does not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_cases import make_request
from transformers import AutoModelForCausalLM

from poweropd import Config, Trainer
from poweropd.data.rollout import Request, Rollout
from poweropd.rollouts.base import Sampling, completion_seed
from poweropd.rollouts.draws import draw
from poweropd.rollouts.transformers import TransformersEngine

STOPS = (0, 2)


@pytest.fixture(scope="module")
def model(student_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(student_dir).eval()


def requests(count: int) -> list[Request]:
    prompts = [[1, 5, 7, *range(20, 22 + i % 5)] for i in range(count)]
    return [make_request(i, ids, seed=completion_seed(0, 0, i, 0)) for i, ids in enumerate(prompts)]


def generate(
    model: Any, asked: list[Request], batch_size: int, sampling: Sampling
) -> dict[int, Rollout]:
    engine = TransformersEngine(model, vocab_size=103, batch_size=batch_size)
    return {r.request.prompt_index: r for r in engine.generate(asked, sampling)}


def test_completions_do_not_depend_on_the_batch_they_are_sampled_in(model: Any) -> None:
    sampling = Sampling(max_new_tokens=20, stop_ids=STOPS)
    whole = generate(model, requests(24), 24, sampling)
    for batch_size, asked in ((1, requests(24)), (5, requests(24)[::-1]), (24, requests(24)[7:9])):
        some = generate(model, asked, batch_size, sampling)
        for index, rollout in some.items():
            assert rollout.completion_ids == whole[index].completion_ids
            assert rollout.sampling_log_probs == pytest.approx(
                whole[index].sampling_log_probs, abs=1e-4
            )


def test_log_probs_are_the_models_own_at_temperature_1(model: Any) -> None:
    sampling = Sampling(max_new_tokens=10, stop_ids=STOPS, temperature=0.7, top_p=0.9, top_k=30)
    for rollout in generate(model, requests(6), 3, sampling).values():
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(rollout.prompt_ids) - 1
        expected = [
            log_probs[start + i, token].item() for i, token in enumerate(rollout.completion_ids)
        ]
        assert rollout.sampling_log_probs == pytest.approx(expected, abs=1e-4)


def test_a_completion_ends_at_the_first_stop_or_at_the_limit(model: Any) -> None:
    found = generate(model, requests(40), 16, Sampling(max_new_tokens=30, stop_ids=STOPS))
    assert {r.stopped for r in found.values()} == {True, False}
    for rollout in found.values():
        assert not set(STOPS) & set(rollout.completion_ids[:-1])
        assert rollout.stopped == (rollout.completion_ids[-1] in STOPS)
        assert rollout.stopped or len(rollout.completion_ids) == 30


def test_temperature_0_is_greedy(model: Any) -> None:
    sampling = Sampling(max_new_tokens=6, stop_ids=(), temperature=0.0)
    (rollout,) = generate(model, requests(1), 1, sampling).values()
    ids = list(rollout.prompt_ids)
    for token in rollout.completion_ids:
        with torch.no_grad():
            assert model(input_ids=torch.tensor([ids])).logits[0, -1, :103].argmax() == token
        ids.append(token)


def test_draws_follow_the_distribution_and_never_hit_a_zero() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 2.0]])
    uniforms = torch.linspace(0, 1 - 1e-9, 20_001, dtype=torch.float64)
    sampling = Sampling(max_new_tokens=1, stop_ids=())
    drawn, _ = draw(logits.repeat(20_001, 1), uniforms, sampling)
    shares = torch.bincount(drawn, minlength=4) / 20_001
    assert torch.allclose(shares, logits[0].softmax(-1), atol=1e-4)
    top, _ = draw(logits.repeat(20_001, 1), uniforms, Sampling(1, (), top_k=1))
    assert (top == 3).all()


def test_the_bfloat16_engine_computes_as_a_model_loaded_in_bfloat16(
    recipe: Callable[..., Config], student_dir: Path
) -> None:
    trainer = Trainer(recipe(**{"model.dtype": "bfloat16"}), progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.bfloat16).eval()
    ids = torch.arange(3, 103).repeat(1, 2)
    with torch.no_grad():
        assert torch.equal(trainer.engine.model(ids).logits, loaded(ids).logits)
    trainer.step(0)
    trained = copy.deepcopy(trainer.student.model).to(torch.bfloat16)
    for own, new in zip(trainer.engine.model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(own, new)
