"""Teachers that tell more than the sampled token's log-prob, on servers of each kind and here."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from other_servers import LOWEST_FLOAT, LlamaCppServer, SGLangServer
from rollout_cases import make_rollout
from teacher_server import NAME, TeacherServer, a_short_list, error_500

from poweropd import Config, Trainer
from poweropd.config.teachers import TeacherConfig
from poweropd.data.rollout import Example, make_example
from poweropd.errors import RunError, UsageError
from poweropd.teachers import base
from poweropd.teachers.server import ServerTeacher
from poweropd.training import build

pytestmark = pytest.mark.usefixtures("soon")
MAKES = Callable[..., Config]
WHOLE = {"objective.kind": "full_vocab"}
KINDS = {"vllm": TeacherServer, "sglang": SGLangServer, "llama_cpp": LlamaCppServer}


@pytest.fixture(params=KINDS)
def any_server(request: pytest.FixtureRequest, teacher_dir: Path) -> Iterator[TeacherServer]:
    with KINDS[request.param](teacher_dir) as running:
        yield running


@pytest.fixture
def server(teacher_dir: Path) -> Iterator[TeacherServer]:
    with TeacherServer(teacher_dir) as running:
        running.most_told = 103
        yield running


def served_by(server: TeacherServer, teacher_dir: Path) -> dict[str, Any]:
    """The keys of a recipe whose teacher is on a server."""
    kind = next(name for name, made in KINDS.items() if type(server) is made)
    teacher = {"model": NAME, "servers": [server.url], "tokenizer": str(teacher_dir)}
    teacher |= {"server_type": kind}
    return {f"teacher.{key}": value for key, value in teacher.items()}


def loss_and_gradient(trainer: Trainer) -> tuple[float, torch.Tensor]:
    examples = trainer.scored(trainer.sample(0))
    num_tokens = trainer.updater.objective.num_tokens([e.num_tokens for e in examples])
    loss, _ = trainer.updater.accumulate(examples, trainer.reward.at(0), num_tokens)
    weights = trainer.student.trained_weights().values()
    return loss, torch.cat([weight.grad.flatten() for weight in weights])


def assert_same_update(one: Config, other: Config) -> None:
    (loss, gradient), (other_loss, others) = (
        loss_and_gradient(Trainer(config, progress=False)) for config in (one, other)
    )
    assert loss == pytest.approx(other_loss, abs=1e-5)
    assert (gradient - others).norm() < 1e-4 * others.norm()


# The objective.


def test_the_teachers_most_probable_tokens_are_summed_over(recipe: MAKES, tmp_path: Path) -> None:
    """All of them are the whole vocabulary; one is not, and the metrics say how much is outside."""
    found = {}
    for k in (None, 103, 1):
        keys = {"objective.teacher_top_k": k, "run.dir": str(tmp_path / str(k)), "train.steps": 1}
        config = recipe(**WHOLE, **keys, **{"reward.name": "log_ratio"})
        found[k] = loss_and_gradient(trainer := Trainer(config, progress=False))[1]
        trainer.train()
        (line,) = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
        tails = [json.loads(line).get(f"tail/{who}") for who in ("student", "teacher")]
        assert tails == [None] * 2 if k is None else all(tail is not None for tail in tails)
        if k == 1:
            assert all(0.5 < tail < 1 for tail in tails)  # of random weights
        elif k:
            assert all(tail < 1e-5 for tail in tails)
    size = found[None].norm()
    assert (found[103] - found[None]).norm() < 1e-4 * size
    assert (found[1] - found[None]).norm() > 0.1 * size


SLOWER = pytest.mark.thorough


@pytest.mark.parametrize(
    "keys",
    [
        WHOLE | {"reward.name": "power"},
        pytest.param(WHOLE | {"objective.select": {"name": "dial"}}, marks=SLOWER),
        {"objective.baseline": "value", "reward": {"name": "zscore", "base": {"name": "clip"}}},
        pytest.param({"objective.baseline": "value", "objective.stop": "cross"}, marks=SLOWER),
    ],
    ids=["power", "dial", "zscore", "cross"],
)
def test_a_server_gives_the_update_of_a_local_teacher(
    recipe: MAKES, server: TeacherServer, teacher_dir: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    top = {"objective.teacher_top_k": 7}
    remote = {**served_by(server, teacher_dir), "run.dir": str(tmp_path / "served")}
    assert_same_update(recipe(**keys, **top), recipe(**keys, **top, **remote))


def test_offloaded_and_several_teachers_tell_theirs(
    recipe: MAKES, server: TeacherServer, prompts: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """One of the two on a server, and the other one here."""
    lines = prompts.read_text().splitlines()
    rows = [json.loads(line) | {"who": "ab"[i % 2]} for i, line in enumerate(lines)]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {**WHOLE, "objective.teacher_top_k": 5, "data.prompts": str(data)}
    there = {"model": NAME, "servers": [server.url], "tokenizer": str(teacher_dir)}
    here = {"model": str(teacher_dir), "dtype": "float32", "offload": True}
    several = recipe(**keys, teacher={"by": "who", "a": here, "b": there})
    assert_same_update(several, recipe(**keys, **{"run.dir": str(tmp_path / "one")}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "3 needs objective.kind=full_vocab or objective.baseline=value"),
        (WHOLE | {"objective.top_k": 4}, "3 cannot go with objective.top_k, the"),
        (WHOLE | {"objective.stop": "semantic"}, "3 cannot go with objective.stop=semantic"),
        (
            WHOLE | {"rollout.score": "truncated", "rollout.top_p": 0.9},
            "3 cannot go with rollout.score=truncated",
        ),
        (WHOLE | {"objective.select": {"name": "teachable"}}, "3 cannot go with objective.select"),
    ],
)
def test_what_needs_the_whole_distribution_is_refused(
    recipe: MAKES, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"objective.teacher_top_k: {message}"):
        recipe(**keys, **{"objective.teacher_top_k": 3})


def test_a_teacher_of_other_tokens_is_refused(recipe: MAKES) -> None:
    keys = {"teacher.align": "spans", "objective.teacher_top_k": 3}
    with pytest.raises(UsageError, match=r"teacher.align: spans cannot go with .*teacher_top_k"):
        recipe(**WHOLE, **keys)


def test_more_than_the_vocabulary_is_refused(recipe: MAKES) -> None:
    config = recipe(**WHOLE, **{"objective.teacher_top_k": 104})
    with pytest.raises(UsageError, match=r"expected at most 103, the number of ids .* got 104"):
        Trainer(config, progress=False)


# Servers that give less.


@pytest.mark.parametrize("clips", [False, True])
def test_a_server_with_fewer_log_probs_is_refused(any_server: TeacherServer, clips: bool) -> None:
    any_server.clips = clips
    said = "told of 2[01]" if clips else "HTTP 400: .*max allowed: 20"
    message = f"objective.teacher_top_k: {any_server.url} does not give 30 log-probs .*{said}"
    with pytest.raises(UsageError, match=message) as error:
        connect(any_server, 30).check([[5]])
    assert "\n" not in str(error.value)
    assert ("--max-logprobs 30" in str(error.value)) == (type(any_server) is TeacherServer)


def test_that_is_seen_before_any_weight_is_loaded(
    recipe: MAKES, server: TeacherServer, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "load_models", None)
    server.most_told = 20
    config = recipe(**WHOLE, **{"objective.teacher_top_k": 30}, **served_by(server, teacher_dir))
    with pytest.raises(UsageError, match="does not give 30 log-probs of a context: start it with"):
        Trainer(config, progress=False)


def test_a_short_list_is_asked_for_again(
    recipe: MAKES, server: TeacherServer, teacher_dir: Path, tmp_path: Path
) -> None:
    top = {**WHOLE, "objective.teacher_top_k": 7}
    trainer = Trainer(recipe(**top, **served_by(server, teacher_dir)), progress=False)
    server.faults = [a_short_list, a_short_list, error_500]
    found = loss_and_gradient(trainer)
    assert not server.faults
    local = recipe(**top, **{"run.dir": str(tmp_path / "local")})
    assert found[0] == pytest.approx(loss_and_gradient(Trainer(local, progress=False))[0], abs=1e-5)
    server.faults = [a_short_list] * 1000
    trainer.teacher.pool.patience = 0.2
    with pytest.raises(RunError, match="an answer with fewer than 7 ids of a context"):
        loss_and_gradient(trainer)


# Every kind of server.


def some_examples() -> list[Example]:
    ids = [[4, 17, 30, 2], [9, 60, 5]]
    rollouts = [make_rollout(i, [5 + i, 40, 8], own, stopped=False) for i, own in enumerate(ids)]
    made = [make_example(rollout, [2], [2], "raw") for rollout in rollouts]
    return [example for example in made if example is not None]


def connect(server: TeacherServer, top_k: int | None = None) -> ServerTeacher:
    kind = next(name for name, made in KINDS.items() if type(server) is made)
    section = TeacherConfig(model=NAME, servers=[server.url], server_type=kind, patience=0.3)
    return ServerTeacher(section, top_k)


def test_every_kind_of_server_gives_the_models_log_probs(any_server: TeacherServer) -> None:
    teacher = connect(any_server, 6)
    assert teacher.context() == any_server.context - 1
    assert teacher.vocab_size(200, 103) == 103
    teacher.check([[1, 2, 3, 50], [7]])
    examples = some_examples()
    scored = base.score(teacher, examples)
    agreed = teacher.greedily(examples, [2, 3])
    for example, found, (log_probs, greedy) in zip(examples, scored, agreed, strict=True):
        prompt, ids = example.prompt.teacher_prompt_ids, example.rollout.completion_ids
        rows = any_server.log_probs([*prompt, *ids])[len(prompt) - 1 : -1]
        own = rows.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(found.teacher_log_probs, own, atol=1e-5, rtol=0)
        values, tops = rows.topk(6)
        assert torch.equal(found.teacher_top.ids, tops)
        torch.testing.assert_close(found.teacher_top.log_probs, values, atol=1e-5, rtol=0)
        inner = [i for i, token in enumerate(ids) if token != 2]
        torch.testing.assert_close(log_probs[inner], own[inner], atol=1e-5, rtol=0)
        assert set(greedy.tolist()) <= set(range(103))


@pytest.mark.thorough
def test_a_run_is_that_of_a_local_teacher_on_every_kind_of_server(
    recipe: MAKES, any_server: TeacherServer, teacher_dir: Path, tmp_path: Path
) -> None:
    keys = {"train.steps": 2, "rollout.max_new_tokens": 4}
    remote = {**served_by(any_server, teacher_dir), "run.dir": str(tmp_path / "served")}
    losses = []
    for config in (recipe(**keys), recipe(**keys, **remote)):
        Trainer(config, progress=False).train()
        lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_server_of_another_kind_is_named(teacher_dir: Path) -> None:
    with SGLangServer(teacher_dir) as server:
        section = TeacherConfig(model=NAME, servers=[server.url], server_type="llama_cpp")
        teacher = ServerTeacher(section)
        with pytest.raises(RunError, match="properties without a context"):
            teacher.context()


def test_a_stale_prefix_cache_is_found_at_the_start(
    any_server: TeacherServer, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang reads its cache up to the first token that it scores; llama.cpp, all but one."""
    prompt = list(range(3, 43))
    connect(any_server).check([prompt])
    any_server.stale = -0.4
    message = r"scored from the prefix cache got .* differ by 0.4 .* flush it"
    with pytest.raises(RunError, match=message) as error:
        connect(any_server).check([prompt])
    assert "\n" not in str(error.value)


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "too few": lambda about: about["input_token_logprobs"].pop(),
    "another id": lambda about: about["input_token_logprobs"][-1].__setitem__(1, 3),
    "null": lambda about: about["input_token_logprobs"][-1].__setitem__(0, None),
    "positive": lambda about: about["input_token_logprobs"][-1].__setitem__(0, 0.5),
    "a first log-prob": lambda about: about["input_token_logprobs"][0].__setitem__(0, -1.0),
    "another length": lambda about: about.__setitem__("prompt_tokens", 3),
    "no top": lambda about: about.pop("input_top_logprobs"),
    "an id as text": lambda about: about["input_top_logprobs"][-1][0].__setitem__(1, "4"),
    "too much mass": lambda about: about["input_top_logprobs"][-1][1].__setitem__(0, -0.001),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_of_sglang_is_asked_for_again(teacher_dir: Path, name: str) -> None:
    with SGLangServer(teacher_dir) as server:
        teacher = connect(server, 4)
        right = base.score(teacher, some_examples())

        def fault(handler: Any, status: int, body: Any) -> None:
            WRONG[name](body["meta_info"])
            handler.answer(status, body)

        server.faults = [fault]
        for one, other in zip(base.score(teacher, some_examples()), right, strict=True):
            assert torch.equal(one.teacher_log_probs, other.teacher_log_probs)
            assert torch.equal(one.teacher_top.ids, other.teacher_top.ids)
        assert not server.faults


WRONG_TOKENS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another token": lambda b: b["completion_probabilities"][0].__setitem__("id", 3),
    "no token": lambda b: b.__setitem__("completion_probabilities", []),
    "two tokens": lambda b: b["completion_probabilities"].append(b["completion_probabilities"][0]),
    "another prompt": lambda b: b.__setitem__("tokens_evaluated", b["tokens_evaluated"] + 1),
    "truncated": lambda b: b.__setitem__("truncated", True),
    "a short list": lambda b: b["completion_probabilities"][0].__setitem__("top_logprobs", []),
}


@pytest.mark.parametrize("name", WRONG_TOKENS)
def test_a_wrong_answer_of_llama_cpp_is_asked_for_again(teacher_dir: Path, name: str) -> None:
    with LlamaCppServer(teacher_dir) as server:
        teacher = connect(server, 4)
        right = base.score(teacher, some_examples())

        def fault(handler: Any, status: int, body: Any) -> None:
            WRONG_TOKENS[name](body)
            handler.answer(status, body)

        server.faults = [fault]
        for one, other in zip(base.score(teacher, some_examples()), right, strict=True):
            assert torch.equal(one.teacher_log_probs, other.teacher_log_probs)
        assert not server.faults


def test_a_token_that_ends_within_a_character_is_found_among_all(teacher_dir: Path) -> None:
    """llama.cpp gives no log-probs for it, since it has no text yet."""
    with LlamaCppServer(teacher_dir) as server:
        teacher = connect(server, 4)
        right = base.score(teacher, some_examples())
        server.partial, server.most_told = frozenset([17, 60]), 2**24
        for one, other in zip(base.score(teacher, some_examples()), right, strict=True):
            torch.testing.assert_close(one.teacher_log_probs, other.teacher_log_probs)
            assert torch.equal(one.teacher_top.ids, other.teacher_top.ids)


def test_the_lowest_float_of_llama_cpp_is_minus_infinity(teacher_dir: Path) -> None:
    with LlamaCppServer(teacher_dir) as server:

        def fault(handler: Any, status: int, body: Any) -> None:
            body["completion_probabilities"][0]["logprob"] = LOWEST_FLOAT
            handler.answer(status, body)

        server.faults = [fault] * 3
        one, _ = base.score(connect(server), some_examples())
        assert one.teacher_log_probs.isinf().any()
