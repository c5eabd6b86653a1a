"""Completions of several turns: what is in them, what is trained, what cuts them off."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_tools import calculate
from rollout_cases import make_request
from tiny_models import TURN_END
from transformers import AutoModelForCausalLM
from turn_cases import STOPS, TOKENIZER, Scripted, call, ids_of, log_prob_of, make_writer

from poweropd import Config, Trainer
from poweropd.data.chat import encode_chat
from poweropd.data.messages import Conversation
from poweropd.data.rollout import Request, Rollout, TurnCounts, make_example
from poweropd.errors import RunError, UsageError
from poweropd.rollouts.base import Sampling
from poweropd.rollouts.guards import CheckedEngine
from poweropd.rollouts.prefetch import Ahead
from poweropd.rollouts.transformers import TransformersEngine
from poweropd.rollouts.turns import calculator
from poweropd.rollouts.turns.calls import read_hermes
from poweropd.rollouts.turns.engine import TurnsEngine, turn_seed
from poweropd.rollouts.turns.partners import EnvironmentPartner, ToolPartner, environment_class
from poweropd.rollouts.turns.tools import Toolbox, tool_schemas

QUESTION = "What is 2+3*4?"
CALL, ANSWER = call("calculate", expression="2+3*4"), "It is 14."
#: Beginnings of metrics that say how fast a machine is, or how it rounds in batches.
OF_THE_MACHINE = ("seconds/", "memory/", "tokens_per", "sampler/")
TOOLS = tool_schemas(["own_tools:calculate"])


@pytest.fixture(scope="module")
def toolbox() -> Iterator[Toolbox]:
    made = Toolbox(["own_tools:calculate"], timeout=30, workers=1, max_chars=200)
    yield made
    made.close()


def asked(text: str = QUESTION, seed: int = 5, index: int = 0) -> Request:
    (ids,) = encode_chat(TOKENIZER, [replace(Conversation.of_text(text), tools=TOOLS)], {})
    return make_request(index, ids, seed=seed)


def with_tools(toolbox: Toolbox, script: Callable[[str], str], max_turns: int = 4) -> TurnsEngine:
    partner = ToolPartner(toolbox, read_hermes, TOOLS or [])
    return TurnsEngine(Scripted(script), make_writer(), lambda prompt: partner, max_turns)


def calculating(text: str) -> str:
    """Calls the tool, and says what it answered."""
    return ANSWER if "<|im_start|>tool" in text else CALL


def generate(engine: TurnsEngine, *requests: Request, tokens: int = 400) -> list[Rollout]:
    return sorted(engine.generate(requests, Sampling(tokens, STOPS)), key=lambda r: r.key)


def test_the_trained_tokens_are_those_of_a_conversation_made_by_hand(toolbox: Toolbox) -> None:
    request = asked()
    (rollout,) = generate(with_tools(toolbox, calculating), request)
    first, second = [*ids_of(CALL), TURN_END], [*ids_of(ANSWER), TURN_END]
    between = ids_of("\n<|im_start|>tool\n14<|im_end|>\n<|im_start|>assistant\n")
    assert rollout.request == request
    assert rollout.completion_ids == [*first, *between, *second]
    assert rollout.completion_mask == [
        *([True] * len(first) + [False] * len(between) + [True] * len(second))
    ]
    seeds = [request.seed] * len(first) + [turn_seed(request.seed, 1)] * len(second)
    places = [*range(len(first)), *range(len(second))]
    own = [log_prob_of(seed, place) for seed, place in zip(seeds, places, strict=True)]
    mask = torch.tensor(rollout.completion_mask)
    assert torch.tensor(rollout.sampling_log_probs)[mask].tolist() == pytest.approx(own)
    assert rollout.stopped
    assert rollout.turns == TurnCounts(2, tool_calls=1)
    example = make_example(rollout, STOPS, STOPS, "mask")
    assert example is not None
    assert example.positions.tolist() == mask.nonzero().flatten().tolist()[:-1]


def test_the_tokens_are_those_that_the_template_writes_of_the_conversation(
    toolbox: Toolbox,
) -> None:
    request = asked()
    (rollout,) = generate(with_tools(toolbox, calculating), request)
    function = {"name": "calculate", "arguments": {"expression": "2+3*4"}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": calculate("2+3*4")},
        {"role": "assistant", "content": ANSWER},
    ]
    whole = TOKENIZER.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    # The template writes a call on lines of its own, which this student does not.
    written = whole.replace("<tool_call>\n", "<tool_call>").replace(
        "\n</tool_call>", "</tool_call>"
    )
    read = TOKENIZER.decode(request.prompt_ids + rollout.completion_ids)
    assert read + "\n" == written


def test_several_calls_of_a_turn_are_answered_in_their_order(toolbox: Toolbox) -> None:
    calls = [call("calculate", expression=text) for text in ("1+1", "2*x", "3*3")]

    def script(text: str) -> str:
        return "Done." if "<|im_start|>tool" in text else "".join([*calls, "<tool_call>{oops"])

    (rollout,) = generate(with_tools(toolbox, script), asked(), tokens=900)
    text = TOKENIZER.decode(rollout.completion_ids)
    answers = [part.partition("<|im_end|>")[0] for part in text.split("<|im_start|>tool\n")[1:]]
    assert answers[0] == "2"
    assert answers[1].startswith("error: ValueError: invalid literal for int()")
    assert answers[2] == "9"
    assert answers[3].startswith(
        "error: expected a tool call with a name and arguments, got '{oops"
    )
    assert rollout.turns == TurnCounts(2, tool_calls=4, tool_errors=2)
    assert TOKENIZER.decode(rollout.own_ids) == "".join(
        [*calls, "<tool_call>{oops<|im_end|>Done.<|im_end|>"]
    )


def test_a_call_in_thoughts_is_not_made(toolbox: Toolbox) -> None:
    (rollout,) = generate(with_tools(toolbox, lambda _: f"<think>{CALL}</think>Fourteen."), asked())
    assert rollout.turns == TurnCounts(1)
    assert rollout.stopped


def test_turns_and_room_cut_a_conversation_off(toolbox: Toolbox) -> None:
    turn = len(ids_of(CALL)) + 1
    said = len(ids_of("\n<|im_start|>tool\n14<|im_end|>\n<|im_start|>assistant\n"))
    endless = with_tools(toolbox, lambda _: CALL, max_turns=3)
    (rollout,) = generate(endless, asked(), tokens=1000)
    assert (len(rollout.completion_ids), rollout.stopped) == (3 * turn + 2 * said, False)
    for tokens in range(turn - 1, turn + said + 3):
        (rollout,) = generate(endless, asked(), tokens=tokens)
        spoken = tokens if tokens > turn + said else min(tokens, turn)
        assert len(rollout.completion_ids) == spoken
        assert rollout.completion_ids[-1] == TURN_END or rollout.completion_mask == [
            *([True] * min(turn, tokens) + [False] * said + [True] * tokens)[:tokens]
        ]
        assert not rollout.stopped
    plain = with_tools(toolbox, lambda _: ANSWER, max_turns=1)
    (rollout,) = generate(plain, asked())
    assert rollout.stopped


def test_a_turn_longer_than_its_room_is_cut(toolbox: Toolbox) -> None:
    """An engine of the user's may look at the sampling alone."""

    class Deaf(Scripted):
        def generate(self, requests: Any, sampling: Sampling) -> Iterator[Rollout]:
            free = [replace(request, max_new_tokens=None) for request in requests]
            pairs = {request.key: request for request in requests}
            for rollout in super().generate(free, sampling):
                yield replace(rollout, request=pairs[rollout.key])

    engine = with_tools(toolbox, calculating)
    engine.engine = Deaf(lambda text: calculating(text) if "3*4" in text else "x" * 300)
    short, long = generate(engine, asked(), asked("Say x.", index=1), tokens=200)
    assert short.stopped
    assert (len(long.completion_ids), long.stopped) == (200, False)
    (checked,) = generate(engine, asked("Say x."), tokens=100)
    assert len(checked.completion_ids) == 100


def test_a_guard_takes_conversations(toolbox: Toolbox) -> None:
    engine = with_tools(toolbox, calculating)
    guarded = CheckedEngine(engine, "turns", len(TOKENIZER), 4000)
    (rollout,) = guarded.generate([asked()], Sampling(400, STOPS))
    assert rollout.turns is not None


def test_conversations_survive_a_checkpoint(toolbox: Toolbox) -> None:
    request = asked()
    rollouts = generate(with_tools(toolbox, calculating), request)
    schedule = Ahead(lambda step: iter(rollouts), 2)
    schedule.ready = {1: rollouts}
    again = Ahead(lambda step: iter(()), 2)
    again.restore(json.loads(json.dumps(schedule.pending())), lambda step: [request])
    assert again.ready == {1: rollouts}


def test_ids_that_models_do_not_share_are_left_out_of_answers() -> None:
    (letter,) = ids_of("x")
    writer = make_writer(left_out={letter})
    assert TOKENIZER.decode(writer.ids([{"role": "user", "content": "axb"}])) == (
        "\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    )
    (newline,) = ids_of("\n")
    with pytest.raises(UsageError, match=r"writes .* \(id \d+\) between turns, which is not the"):
        make_writer(left_out={newline}).check("rollout.environment", {"role": "user"})


# Environments.


def with_environment(name: str, script: Callable[[str], str], max_turns: int = 8) -> TurnsEngine:
    kind = environment_class(f"own_tools:{name}", rewarded=True)
    return TurnsEngine(
        Scripted(script),
        make_writer(),
        lambda prompt: EnvironmentPartner(f"own_tools:{name}", kind, prompt),
        max_turns,
    )


def test_an_environment_answers_until_it_says_nothing() -> None:
    (rollout,) = generate(with_environment("Doubting", lambda _: "yes"), asked())
    assert TOKENIZER.decode(rollout.completion_ids) == (
        "yes<|im_end|>\n<|im_start|>user\n3+1=?<|im_end|>\n<|im_start|>assistant\n"
        "yes<|im_end|>\n<|im_start|>user\n3+2=?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )
    assert rollout.turns == TurnCounts(3, reward=9 / 8)
    assert rollout.stopped


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Raising", "rollout.environment own_tools:Raising: step raised KeyError: 'no\\nsuch' for"),
        ("Silent", "rollout.environment own_tools:Silent: step: message 1: expected text or text"),
    ],
)
def test_an_environment_that_fails_ends_the_run_with_one_line(name: str, message: str) -> None:
    with pytest.raises(RunError) as caught:
        generate(with_environment(name, lambda _: "yes"), asked())
    assert str(caught.value).startswith(message.replace("\\n", "\\n"))
    assert str(caught.value).endswith("for row 0")
    assert "\n" not in str(caught.value)


def test_what_is_no_environment_is_refused() -> None:
    for name, wanted in {"Stepless": "reset and step", "calculate": "raised TypeError"}.items():
        with pytest.raises(UsageError, match=wanted):
            environment_class(f"own_tools:{name}", rewarded=False)


# Training.


@pytest.mark.thorough
def test_conversations_with_an_environment_train_and_resume_to_the_last_bit(
    recipe: Callable[..., Config], tmp_path: Path
) -> None:
    rollout = {
        "environment": "own_tools:Doubting",
        "max_new_tokens": 40,
        "task_reward": {"name": "environment", "weight": 0.5},
        "max_turns": 3,
    }
    finals, rows = [], []
    for batch_size, stop_at in ((128, None), (3, 1)):
        own = {**rollout, "batch_size": batch_size}
        name = str(tmp_path / f"run-{batch_size}")
        config = recipe(rollout=own, **{"run.dir": name, "train.prompts_per_step": 8})
        if stop_at:
            Trainer(config, progress=False).train(until=stop_at)
        trainer = Trainer(config, progress=False)
        trainer.train()
        finals.append((trainer.run.final / "model.safetensors").read_bytes())
        rows.append(trainer.run.metrics())
    for one, other in zip(*rows, strict=True):
        same = {key for key in one if not key.startswith(OF_THE_MACHINE)}
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
    assert finals[0] == finals[1]
    assert max(row["completions/mean_turns"] for row in rows[0]) > 1
    assert rows[0][0]["completions/mean_tool_calls"] == 0
    assert all(row["task_reward/mean"] > 0 for row in rows[0])


def test_the_examples_of_the_docs_do_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parent.parent / "docs" / "rollouts.md").read_text()
    blocks = {"my_tools": "def days_between", "my_environment": "class Guessing"}
    for module, mark in blocks.items():
        (code,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if mark in b]
        (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    (schema,) = tool_schemas(["my_tools:days_between"]) or []
    assert schema["function"]["parameters"]["required"] == ["first", "second"]
    kind = environment_class("my_environment:Guessing", rewarded=True)
    prompt = replace(asked().prompt, row={"answer": "5"})
    game = EnvironmentPartner("my_environment:Guessing", kind, prompt)
    heard = [[say()["content"] for say in game.submit(text)] for text in ("3", "What?", "5")]
    assert heard == [["higher"], ["Name a number."], []]
    assert game.reward() == 1 / 3


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2+3*4", "14"), ("(7-1)/4", "1.5"), ("-2**2 % 5", "1"), ("7//2", "3"), ("0.5+1", "1.5")],
)
def test_the_calculator_calculates(expression: str, value: str) -> None:
    assert calculator.calculate(expression) == value


@pytest.mark.parametrize("expression", ["__import__('os')", "a+1", "'1'*3", "[1][0]", "True+x"])
def test_the_calculator_does_nothing_else(expression: str) -> None:
    with pytest.raises(ValueError, match="expected numbers"):
        calculator.calculate(expression)


@pytest.mark.parametrize("way", ["_in_slots", "_padded"])
def test_a_request_may_have_fewer_tokens_than_others(way: str, student_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student_dir)
    engine = TransformersEngine(model, vocab_size=model.config.vocab_size, batch_size=3)
    engine._decode = getattr(engine, way)
    prompts = [make_request(i, [5 + i, 6, 7], seed=i) for i in range(5)]
    limited = [replace(one, max_new_tokens=i + 1) for i, one in enumerate(prompts)]
    sampling = Sampling(6, stop_ids=())
    whole = sorted(engine.generate(prompts, sampling), key=lambda r: r.key)
    for i, rollout in enumerate(sorted(engine.generate(limited, sampling), key=lambda r: r.key)):
        assert rollout.completion_ids == whole[i].completion_ids[: i + 1]
        assert not rollout.stopped
