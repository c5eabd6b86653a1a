"""Completions of a file beside those that the student samples: which, when, of what weight."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_cases import make_request
from test_rollouts_engines import AHEAD, metrics

from poweropd import Config, Trainer
from poweropd.data.off_policy import Completion, OffPolicy
from poweropd.data.rollout import Rollout
from poweropd.errors import UsageError

MAKES = Callable[..., Config]
Row = Mapping[str, Any]
IDS, LOG_PROBS = [40, 41, 42, 43], [-0.5, -3.0, -6.0, -40.0]


@pytest.fixture
def mixed(recipe: MAKES, tmp_path: Path) -> Callable[..., Config]:
    """A recipe with a file of these rows; by default every prompt has a completion."""

    def make(rows: Sequence[Row] | None = None, weights: str = "truncated", **keys: Any) -> Config:
        path = tmp_path / "given.jsonl"
        whole = [
            {"row": i, "completion_ids": IDS, "sampling_log_probs": LOG_PROBS} for i in range(64)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in (rows or whole)))
        section = {"file": str(path), "share": 0.5, "weights": weights}
        return recipe(**{"rollout.off_policy": section, **keys})

    return make


def given(trainer: Trainer, step: int) -> list[Rollout]:
    return [rollout for rollout in trainer.sample(step) if rollout.off_policy]


def test_a_share_of_every_step_comes_from_the_file(mixed: MAKES, tmp_path: Path) -> None:
    config = mixed(**{"rollout.per_prompt": 2})
    trainer = Trainer(config, progress=False)
    rollouts = list(trainer.sample(0))
    assert sorted(r.key for r in rollouts) == sorted(r.key for r in trainer.requests(0))
    assert sum(r.off_policy for r in rollouts) == 4
    assert {tuple(r.completion_ids) for r in rollouts if r.off_policy} == {tuple(IDS)}
    assert given(trainer, 0) == [r for r in rollouts if r.off_policy]
    assert {r.key for r in given(trainer, 0)} != {r.key for r in given(trainer, 1)}
    # Those that are sampled are what they would be without the file.
    plain = Config.from_dict(
        config.model_dump() | {"rollout": {**config.rollout.model_dump(), "off_policy": None}}
    )
    plain = plain.model_copy(update={"run": type(plain.run)(dir=str(tmp_path / "plain"))})
    own = {r.key: r for r in Trainer(plain, progress=False).sample(0)}
    sampled = [r for r in rollouts if not r.off_policy]
    assert [r.completion_ids for r in sampled] == [own[r.key].completion_ids for r in sampled]


def test_which_completions_are_given_is_a_function_of_the_step() -> None:
    lists = {i: [Completion([i, k], [-1.0, -2.0], False) for k in range(3)] for i in range(6)}
    off_policy = OffPolicy(lists, 0.3, seed=7)
    counts = []
    for step in range(10):
        asked = [
            make_request(i, [1], sample=k, seed=1000 * step + 10 * i + k)
            for i in range(8)
            for k in range(2)
        ]
        found = list(off_policy.rollouts(step, asked, 9))
        assert sorted(found, key=lambda r: r.key) == sorted(
            off_policy.rollouts(step, asked[::-1], 9), key=lambda r: r.key
        )
        counts.append(len(found))
        assert all(r.request.prompt.index < 6 for r in found)  # the others have none
        for i in range(6):
            own = [r.completion_ids for r in found if r.request.prompt.index == i]
            assert len({*map(tuple, own)}) == len(own)  # two samples are two completions
    assert sum(counts) == 48  # 0.3 of 160
    assert set(counts) == {4, 5}
    assert len(list(OffPolicy(lists, 1.0, seed=7).rollouts(0, asked, 9))) == 12


def test_a_completion_is_cut_where_a_sampled_one_would_be() -> None:
    whole = OffPolicy({0: [Completion([5, 6, 7], [-1.0, -2.0, -3.0], True)]}, 1.0, seed=0)
    for tokens, ids, stopped in ((3, [5, 6, 7], True), (2, [5, 6], False)):
        (found,) = whole.rollouts(0, [make_request(0, [1])], tokens)
        assert (found.completion_ids, found.stopped) == (ids, stopped)
        assert len(found.sampling_log_probs) == tokens


def gradient(trainer: Trainer) -> torch.Tensor:
    examples = trainer.scored(given(trainer, 0))
    reward = trainer.reward.at(0)
    trainer.updater.accumulate(examples, reward, sum(e.num_tokens for e in examples))
    parameters = trainer.student.trained_weights().values()
    return torch.cat([p.grad.flatten().double() for p in parameters])


def test_tokens_of_the_file_have_the_weight_of_who_sampled_them(mixed: MAKES) -> None:
    """Each token's gradient is multiplied by min(p / q, 2); those of the student's are not."""
    trainer = Trainer(mixed(), progress=False)
    examples = trainer.scored(trainer.sample(0))
    outcome = trainer.updater.update(examples, trainer.reward.at(0), 0)
    assert outcome is not None
    record, keys = outcome.record, {r.key for r in given(trainer, 0)}
    owners = zip(record.prompt_indices.tolist(), record.sample_indices.tolist(), strict=True)
    own = torch.tensor([owner in keys for owner in owners])
    sampled_by = torch.tensor(LOG_PROBS).repeat(2).double()
    expected = (record.student_log_probs[own].double() - sampled_by).exp().clamp(max=2.0)
    torch.testing.assert_close(record.weights[own].double(), expected, rtol=1e-5, atol=1e-6)
    assert 0 < (expected == 2.0).sum() < len(expected)
    assert record.weights[~own].eq(1.0).all()


def test_weights_are_in_the_gradient_and_in_the_metrics(mixed: MAKES, tmp_path: Path) -> None:
    sure = [{"row": i, "completion_ids": [40], "sampling_log_probs": [-1e-4]} for i in range(64)]
    keys = {"train.prompts_per_step": 2}
    trainer = Trainer(mixed(sure, **keys), progress=False)
    plain = Trainer(mixed(sure, "none", **keys, **{"run.dir": f"{tmp_path}/none"}), progress=False)
    (example,) = plain.scored(given(plain, 0))
    assert example.sampling_log_probs.isnan().all()
    ((log_prob,),) = plain.student_log_probs([example])
    weight = torch.tensor(log_prob + 1e-4).double().exp()
    assert 0 < weight < 0.5
    torch.testing.assert_close(gradient(trainer), weight * gradient(plain), rtol=1e-4, atol=1e-9)
    row, unknown = trainer.step(0), plain.step(0)
    assert row["off_policy/share"] == 0.5
    assert row["off_policy/mean_weight"] == pytest.approx(weight.item(), rel=1e-4)
    tokens = row["num_tokens"]
    total, squares = tokens - 1 + weight.item(), tokens - 1 + weight.item() ** 2
    size = total**2 / (tokens * squares)
    assert row["sampler/effective_sample_size"] == pytest.approx(size, rel=1e-5)
    assert row["sampler/mean_abs_difference"] < 1e-4  # of what the student sampled
    assert unknown["off_policy/mean_weight"] == 1.0
    assert "sampler/effective_sample_size" not in unknown


@pytest.mark.parametrize(
    "keys",
    [
        {"objective.kind": "full_vocab"},
        {"objective.stop": "semantic", "objective.baseline": "value"},
        {"rollout.correction": "truncated", "objective.select": {"name": "dial"}},
        {"rollout.score": "truncated", "rollout.top_k": 10},
        {"train.packing": "flat", "train.max_tokens_per_batch": 60},
    ],
)
def test_every_objective_takes_them(mixed: MAKES, keys: dict[str, Any]) -> None:
    rows = [{"row": i, "completion": "12+34", "stopped": i % 2 == 0} for i in range(64)]
    weights = "none" if keys.get("objective.kind") != "full_vocab" else "truncated"
    row = Trainer(mixed(rows, weights, **keys), progress=False).step(0)
    assert row["num_tokens"] > 0
    assert row["off_policy/share"] == 0.5
    assert row["off_policy/mean_weight"] == 1.0  # full_vocab needs none


def test_a_run_of_files_alone_samples_nothing(mixed: MAKES) -> None:
    config = mixed()
    section = {**config.rollout.off_policy.model_dump(), "share": 1.0}
    trainer = Trainer(mixed(**{"rollout.off_policy": section}), progress=False)
    row = trainer.step(0)
    assert (row["off_policy/share"], row["tokens_per_second"]) == (1.0, 0.0)
    assert "completions/mean_length" not in row


def test_prompts_are_found_by_their_row_or_by_what_they_say(
    mixed: MAKES, prompts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [json.loads(line)["problem"] for line in prompts.read_text().splitlines()]
    rows = [
        {"problem": texts[3], "completion": "7"},
        {"row": 5, "completion": "8", "stopped": False},
        {"problem": texts[3], "completion": "9"},
        {"problem": "no such prompt", "completion": "1"},
        {"row": 64, "completion": "1"},
    ]
    with caplog.at_level("INFO", "poweropd"):
        trainer = Trainer(mixed(rows, "none"))
    found = trainer.inputs.off_policy.completions
    tokenizer, stop = trainer.inputs.tokenizer, trainer.inputs.student_stop_ids[0]
    ids = [tokenizer(digit)["input_ids"] for digit in "789"]
    assert [one.ids for one in found[3]] == [[*ids[0], stop], [*ids[2], stop]]
    assert [(one.ids, one.stopped) for one in found[5]] == [(ids[1], False)]
    assert "3 completions of 2 of 64 prompts; 2 of prompts that are not trained on" in caplog.text


@pytest.mark.thorough
def test_a_stale_and_mixed_run_resumes(mixed: MAKES, tmp_path: Path) -> None:
    keys = {**AHEAD, "rollout.staleness": 2, "train.steps": 4, "rollout.correction": "truncated"}
    Trainer(mixed(**keys), progress=False).train()
    parts = mixed(**keys, **{"run.dir": str(tmp_path / "parts")})
    for until in (2, None):
        Trainer(parts, progress=False).train(until=until)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "parts")


def test_a_run_does_not_go_on_with_another_file(mixed: MAKES) -> None:
    Trainer(mixed(), progress=False).train(until=1)
    other = [{"row": 0, "completion_ids": [41], "sampling_log_probs": [-1.0]}]
    with pytest.raises(UsageError, match=r"rollout.off_policy.file changed since the run began"):
        Trainer(mixed(other), progress=False)


GOOD = {"row": 0, "completion_ids": [40, 41], "sampling_log_probs": [-1.0, -2.0]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"row": 0}, "expected a text under completion, or completion_ids; its columns are row"),
        ({"completion": "7"}, r"data.column=auto looks for problem, prompt"),
        ({**GOOD, "row": "3"}, "row: expected the number of a row, got '3'"),
        ({"row": 0, "completion": 3}, "expected text in column 'completion', got 3"),
        ({"row": 0, "completion": "7"}, r"sampling_log_probs, by which .* set it to none"),
        ({"row": 0, "completion": "7", "stopped": 1}, "stopped: expected true or false, got 1"),
        ({**GOOD, "sampling_log_probs": [-1.0]}, "sampling_log_probs: expected 2, one for an id, "),
        ({**GOOD, "sampling_log_probs": [-1.0, 2.0]}, "expected log-probs of at most 0, got 2.0"),
        ({**GOOD, "sampling_log_probs": [-1.0, None]}, "log-probs of at most 0, got None"),
        ({**GOOD, "completion_ids": "40"}, "completion_ids: expected a list of ids, got '40'"),
        ({**GOOD, "completion_ids": []}, "expected a completion of at least one token, got none"),
        (
            {**GOOD, "completion_ids": [40, 103]},
            "expected ids of the student's 103 tokens, got 103",
        ),
        ({**GOOD, "completion_ids": [0, 40]}, "holds the stop token .* before its end"),
    ],
)
def test_a_bad_row_is_named(mixed: MAKES, row: Row, message: str) -> None:
    with pytest.raises(UsageError, match=rf"given.jsonl:2: .*{message}") as refused:
        Trainer(mixed([GOOD, row]), progress=False)
    assert "\n" not in str(refused.value)


def test_a_file_of_other_prompts_and_a_task_reward_without_weights_are_refused(
    mixed: MAKES,
) -> None:
    with pytest.raises(UsageError, match=r"none of the 1 rows of .* completes a prompt of"):
        Trainer(mixed([{**GOOD, "row": 99}]), progress=False)
    task = {"rollout.task_reward": {"name": "math"}, "objective.kind": "full_vocab"}
    with pytest.raises(UsageError, match=r"task_reward: beside rollout.off_policy it needs obj"):
        mixed(**task)
    with pytest.raises(UsageError, match=r"rollout.off_policy.share: this key is required"):
        mixed(**{"rollout.off_policy": {"file": "x.jsonl"}})
