"""The update: exact normalisation, invariances, no logits, failures."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from poweropd.config import Config
from poweropd.data.batch import collate
from poweropd.data.rollout import Example
from poweropd.errors import RunError
from poweropd.objectives.sampled import Sampled
from poweropd.rewards import Reward, create
from poweropd.teachers.base import score
from poweropd.teachers.local import LocalTeacher
from poweropd.training.trainer import Trainer, token_metrics

MAKES = Callable[..., Config]


@pytest.fixture
def trainer(recipe: MAKES) -> Trainer:
    overrides = {"train.prompts_per_step": 16, "rollout.max_new_tokens": 24}
    return Trainer(recipe(**overrides), progress=False)


@pytest.fixture
def examples(trainer: Trainer) -> list[Example]:
    return trainer.scored(trainer.sample(0))


def gradient(trainer: Trainer, examples: list[Example], reward: Reward) -> torch.Tensor:
    num_tokens = sum(e.num_tokens for e in examples)
    trainer.updater.accumulate(examples, reward, num_tokens)
    parameters = trainer.student.trained_weights().values()
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    trainer.updater.optimizer.zero_grad()
    return flat


@pytest.mark.parametrize("reward", [create("power"), create("log_ratio"), create("zscore")])
@pytest.mark.parametrize("max_tokens", [1, 60, 130, 250])
def test_micro_batches_and_their_order_do_not_change_the_gradient(
    trainer: Trainer, examples: list[Example], reward: Reward, max_tokens: int
) -> None:
    whole = gradient(trainer, examples, reward)
    trainer.updater.max_tokens = max_tokens
    batches = len(trainer.updater._micro_batches(examples))
    assert batches > 1
    for given in (examples, examples[::-1]):
        split = gradient(trainer, given, reward)
        assert (split - whole).norm() <= 1e-6 * whole.norm()


def test_the_gradient_is_that_of_the_textbook_loss(
    trainer: Trainer, examples: list[Example]
) -> None:
    reward, model = create("power"), trainer.student.model
    total, num_tokens = torch.zeros(()), sum(e.num_tokens for e in examples)
    for e in examples:
        ids = torch.tensor([e.rollout.prompt_ids + e.rollout.completion_ids])
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        rows = len(e.rollout.prompt_ids) - 1 + e.positions
        student = log_probs[rows, e.student_targets]
        total = total - (reward(e.teacher_log_probs, student) * student).sum()
    (total / num_tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    trainer.updater.optimizer.zero_grad()
    got = gradient(trainer, examples, reward)
    assert (got - expected).norm() <= 1e-5 * expected.norm()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk's budget is made for real vocabularies; these models are tiny."""
    monkeypatch.setattr("poweropd.kernels.head.CHUNK_BYTES", {"cpu": 2**14, "cuda": 2**14})


def test_no_tensor_of_batch_times_length_times_vocabulary(
    student_rows: Callable[[int], str], recipe: MAKES, small_chunks: None
) -> None:
    vocabulary = 1009  # a prime above every other width
    model = student_rows(vocabulary)
    config = recipe(
        **{"model.student": model, "teacher.model": model, "train.prompts_per_step": 32}
    )
    trainer = Trainer(config, progress=False)
    rollouts = list(trainer.sample(0))
    with LargestTensor() as seen:
        examples = trainer.scored(rollouts)
        trainer.updater.update(examples, trainer.reward, 0)
    tokens = sum(e.num_tokens for e in examples)
    assert tokens > 256  # several chunks, which are of at least 64 tokens
    assert seen.numel < tokens * vocabulary / 2
    assert seen.numel >= vocabulary * 16  # the head's weight: the update was seen


def test_log_probs_of_minus_infinity_that_agree_leave_the_metrics_finite(
    trainer: Trainer, examples: list[Example]
) -> None:
    outcome = trainer.updater.update(examples, create("power"), 0)
    assert outcome is not None
    record = outcome.record
    record.student_log_probs[0] = record.teacher_log_probs[0] = -torch.inf
    known = (record.teacher_log_probs - record.student_log_probs)[1:].double()
    metrics = token_metrics(outcome)
    assert metrics["log_ratio/mean"] == pytest.approx(known.sum().item() / outcome.num_tokens)
    assert metrics["reverse_kl"] == -metrics["log_ratio/mean"]


def test_the_teachers_minus_infinity_stops_an_unbounded_reward_only(
    trainer: Trainer, examples: list[Example]
) -> None:
    log_probs = examples[0].teacher_log_probs
    assert log_probs is not None
    log_probs[0] = -torch.inf
    before = {n: p.clone() for n, p in trainer.student.trained_weights().items()}
    message = r"reward LogRatio\(\) is -inf at completion position 0 .* use a bounded reward"
    with pytest.raises(RunError, match=message):
        trainer.updater.update(examples, create("log_ratio"), 0)
    assert all(torch.equal(before[n], p) for n, p in trainer.student.trained_weights().items())
    outcome = trainer.updater.update(examples, create("power"), 0)
    assert outcome is not None
    assert torch.isfinite(torch.tensor(outcome.grad_norm))


def test_a_step_with_nothing_to_train_changes_no_weight(trainer: Trainer) -> None:
    before = {n: p.clone() for n, p in trainer.student.trained_weights().items()}
    assert trainer.updater.update([], trainer.reward, 0) is None
    assert all(torch.equal(before[n], p) for n, p in trainer.student.trained_weights().items())


def test_out_of_memory_restarts_the_update_at_half_the_budget(
    trainer: Trainer, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradient(trainer, examples, trainer.reward)
    whole = trainer.student.forward

    def small_memory(batch: Any, *given: Any) -> Any:
        if batch.student.input_ids.numel() > 150:
            raise torch.OutOfMemoryError("out of memory")
        return whole(batch, *given)

    monkeypatch.setattr(trainer.student, "forward", small_memory)
    steps = []
    monkeypatch.setattr(
        trainer.updater.optimizer, "step", lambda: steps.append(flat_gradient(trainer))
    )
    trainer.updater.train = trainer.updater.train.model_copy(update={"clip_grad_norm": None})
    assert trainer.updater.update(examples, trainer.reward, 0) is not None
    assert trainer.updater.max_tokens <= 150
    assert (steps[0] - expected).norm() <= 1e-6 * expected.norm()


def flat_gradient(trainer: Trainer) -> torch.Tensor:
    parameters = trainer.student.trained_weights().values()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def test_memory_that_never_suffices_is_said_with_advice(
    trainer: Trainer, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(batch: Any, *given: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(trainer.student, "forward", no_memory)
    with pytest.raises(RunError, match=r"lower it or rollout\.max_new_tokens"):
        trainer.updater.update(examples, trainer.reward, 0)


def test_full_vocabulary_is_the_expectation_of_sampling(recipe: MAKES) -> None:
    """Summing the sampled objective over every next token, weighted by p, is the exact one."""
    trainer = Trainer(recipe(**{"objective.kind": "full_vocab"}), progress=False)
    rollouts = list(trainer.sample(0))
    example = trainer.scored(rollouts)[0]
    one = replace(
        example,
        positions=example.positions[:1],
        student_targets=example.student_targets[:1],
        teacher_targets=example.teacher_targets[:1],
    )
    exact = gradient(trainer, [one], trainer.reward)
    student = trainer.student
    teacher = LocalTeacher(trainer.models.teacher, 1024)
    expected = torch.zeros_like(exact)
    with torch.no_grad():
        state = student.hidden_states(collate([one]).student)
        probs = (state @ student.head().weight.T).softmax(-1)[0]
    for token, prob in enumerate(probs):
        target = torch.tensor([token])
        there = replace(one, student_targets=target, teacher_targets=target)
        (scored,) = score(teacher, [there])
        loss, _ = student(collate([scored]), Sampled(), trainer.reward, prob.item())
        loss.backward()
        expected += flat_gradient(trainer)
        trainer.updater.optimizer.zero_grad()
    assert (exact - expected).norm() <= 1e-4 * expected.norm()
