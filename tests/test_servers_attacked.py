"""Servers that answer with anything: either the right scores, or one line; the key is in neither.

Each fault of the tables is given once, after which the server is well again, and then for as long
as it is asked. Once, the scores must be the right ones, or the run ends with one line; for as long
as it is asked, the run must end.
"""

import gzip
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from attacked_server import (
    KEY,
    STOP,
    VOCAB,
    Attacked,
    Fault,
    Handler,
    Sampler,
    assert_one_line_without_key,
    assert_right_or_one_line,
    assert_right_rollouts,
    assert_right_scores,
    connect,
    connect_engine,
    hurry,
    running,
    says,
    teacher_answer,
)

from poweropd.errors import RunError
from poweropd.rollouts.guards import CheckedEngine


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture
def attacked() -> Iterator[Attacked]:
    with running(teacher_answer) as server:
        yield server


@pytest.fixture
def sampler(tmp_path: Path) -> Iterator[tuple[Attacked, CheckedEngine]]:
    with running(Sampler()) as server:
        yield server, connect_engine(server, tmp_path)


def echoes(status: int, text: str) -> Fault:
    """A fault that repeats the key, or a part of it."""
    return says({"error": {"message": text}}, status)


def reset(handler: Handler, right: Any) -> None:
    handler.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER: a close is a reset
    handler.connection.close()
    handler.close_connection = True


def early_close(handler: Handler, right: Any) -> None:
    handler.close_connection = True


def cut(share: float) -> Fault:
    """A fault that sends a part of the right answer, as if it were all, and closes."""

    def fault(handler: Handler, right: Any) -> None:
        content = json.dumps(right).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: int(len(content) * share)])
        handler.close_connection = True

    return fault


def short(share: float) -> Fault:
    """A fault that sends a part of the right answer with the length of that part."""

    def fault(handler: Handler, right: Any) -> None:
        content = json.dumps(right).encode()
        handler.send(content[: int(len(content) * share)])

    return fault


def drip(handler: Handler, right: Any) -> None:
    """One byte now and then, for longer than a request may take."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not handler.server.stopped.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def silence(handler: Handler, right: Any) -> None:
    handler.server.stopped.wait(5)
    handler.close_connection = True


def huge(handler: Handler, right: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(100 * 2**20))
    handler.end_headers()
    with suppress(OSError):
        for _ in range(100):
            handler.wfile.write(b" " * 2**20)


def bomb(handler: Handler, right: Any) -> None:
    """A hundred megabytes of blanks, compressed to little."""
    handler.send(gzip.compress(b" " * 100 * 2**20, 1), Content_Encoding="gzip")


def not_compressed(handler: Handler, right: Any) -> None:
    handler.send(json.dumps(right).encode(), Content_Encoding="gzip")


def endless_headers(handler: Handler, right: Any) -> None:
    with suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for i in range(20_000):
            handler.wfile.write(f"X-{i}: {'x' * 100}\r\n".encode())
    handler.close_connection = True


def raw(content: bytes) -> Fault:
    """A fault below HTTP."""

    def fault(handler: Handler, right: Any) -> None:
        handler.wfile.write(content)
        handler.close_connection = True

    return fault


# Faults of any server.
TRANSPORT: dict[str, Fault] = {
    "reset": reset,
    "early close": early_close,
    "cut at 0": cut(0),
    "cut at half": cut(0.5),
    "cut at the last byte": cut(0.99),
    "short": short(0.5),
    "empty": says(b""),
    "html": says("<html><body>502 Bad Gateway</body></html>"),
    "no utf-8": says(b'{"choices": "\xff\xfe"}'),
    "utf-16": says(json.dumps({"choices": []}).encode("utf-16")),
    "null": says(None),
    "a number": says(7),
    "a text": says('"choices"'),
    "a list": says([]),
    "nothing": says({}),
    "deep lists": says("[" * 100_000 + "]" * 100_000),
    "deep objects": says('{"choices":' * 50_000),
    "a long integer": says('{"choices": ' + "9" * 5000 + "}"),
    "two answers": says('{"choices": []}{"choices": []}'),
    "a line of events": says('data: {"choices": []}\n\n', Content_Type="text/event-stream"),
    "a huge answer": huge,
    "a compressed bomb": bomb,
    "not compressed": not_compressed,
    "endless headers": endless_headers,
    "a drip": drip,
    "silence": silence,
    "no http": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "status 0": raw(b"HTTP/1.1 000 \r\nContent-Length: 0\r\n\r\n"),
    "status 999": raw(b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n"),
    "a wrong length": raw(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}"),
    "wrong chunks": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}"),
    "204": says(b"", 204),
    "301": says(b"", 301, Location="/elsewhere"),
    "302 to another machine": says(b"", 302, Location="http://127.0.0.1:9/v1"),
    "307 without a place": says(b"", 307),
    "308 to itself": says(b"", 308, Location="/v1/completions"),
    "400": says({"error": {"message": "bad"}}, 400),
    "401": echoes(401, f"wrong key {KEY}"),
    "403": echoes(403, f"wrong key Bearer {KEY[:12]}..."),
    "404": says({"error": "no such model"}, 404),
    "408": says(b"", 408),
    "413": says("too large", 413),
    "418 with control characters": says("\x1b[2J\x1b]0;owned\x07\r\n\0\x9b31m", 418),
    "422 with an end of the key": echoes(422, f"key ...{KEY[-8:]} may not"),
    "429 in a while": says(b"", 429, Retry_After="0.01"),
    "429 tomorrow": says(b"", 429, Retry_After="86400"),
    "429 never": says(b"", 429, Retry_After="inf"),
    "429 at nan": says(b"", 429, Retry_After="nan"),
    "429 at a wrong date": says(b"", 429, Retry_After="Wed, 99 Foo 2026 99:99:99 GMT"),
    "429 at a date without zone": says(b"", 429, Retry_After="Wed, 21 Oct 2015 07:28:00"),
    "500": says({"error": {"message": "EngineCore died"}}, 500),
    "500 with the key": echoes(500, f"headers: authorization={KEY}"),
    "500 with the key in json": says({"k": KEY, "parts": [KEY[:9], KEY[9:]]}, 500),
    "502 of many lines": says("<html>\n" * 2000, 502),
    "503": says(b"", 503),
    "599": says(b"", 599),
}


# The teacher.


def changed(change: Callable[[dict[str, Any]], object]) -> Fault:
    """A fault that changes the only choice of the right answer."""

    def fault(handler: Handler, right: Any) -> None:
        change(right["choices"][0])
        handler.send(json.dumps(right).encode())

    return fault


def gives(value: object, last: bool = True) -> Fault:
    """A fault that gives a value as the log-prob of one token; a text stands for raw JSON."""

    def fault(handler: Handler, right: Any) -> None:
        entry = right["choices"][0]["prompt_logprobs"][-1 if last else 1]
        next(iter(entry.values()))["logprob"] = "VALUE" if isinstance(value, str) else value
        text = json.dumps(right)
        handler.send(
            (text.replace('"VALUE"', str(value)) if isinstance(value, str) else text).encode()
        )

    return fault


def drop_first(choice: dict[str, Any]) -> None:
    del choice["prompt_logprobs"][0]


def rename_last(choice: dict[str, Any]) -> None:
    (found,) = choice["prompt_logprobs"][-1].values()
    choice["prompt_logprobs"][-1] = {"0049": found}


def swap(choice: dict[str, Any]) -> None:
    entries = choice["prompt_logprobs"]
    entries[1], entries[2] = entries[2], entries[1]


WRONG_SCORES: dict[str, Fault] = {
    "true": gives(True),
    "false": gives(False, last=False),
    "a text as log-prob": gives('"-0.5"'),
    "a list as log-prob": gives([-0.5]),
    "null as log-prob": gives(None),
    "positive": gives(0.5),
    "a little positive": gives(0.01),
    "-1e300": gives(-1e300),
    "-1e308 written long": gives("-1" + "0" * 308 + ".0"),
    "below vLLM's sign": gives(-10000.0),
    "NaN": gives("NaN"),
    "Infinity": gives("Infinity"),
    "-Infinity": gives("-Infinity"),
    "400 digits": gives("-" + "9" * 400),
    "5000 digits": gives("-" + "9" * 5000),
    "an integer of 400 digits in exponent form": gives("-9e400"),
    "one too few": changed(lambda c: c["prompt_logprobs"].pop()),
    "one too many": changed(lambda c: c["prompt_logprobs"].append(c["prompt_logprobs"][-1])),
    "without the first null": changed(drop_first),
    "the first is no null": changed(lambda c: c["prompt_logprobs"].__setitem__(0, {})),
    "an entry is null": changed(lambda c: c["prompt_logprobs"].__setitem__(2, None)),
    "an entry is empty": changed(lambda c: c["prompt_logprobs"].__setitem__(2, {})),
    "an entry is a list": changed(lambda c: c["prompt_logprobs"].__setitem__(2, [-1.0])),
    "entries swapped": changed(swap),
    "another name of an id": changed(rename_last),
    "no prompt log-probs": changed(lambda c: c.pop("prompt_logprobs")),
    "prompt log-probs are null": changed(lambda c: c.__setitem__("prompt_logprobs", None)),
    "prompt log-probs are a text": changed(lambda c: c.__setitem__("prompt_logprobs", "x")),
    "an object of log-probs": changed(lambda c: c.__setitem__("prompt_logprobs", {"a": 1})),
    "other ids": changed(lambda c: c["prompt_token_ids"].__setitem__(0, 3)),
    "no ids": changed(lambda c: c.pop("prompt_token_ids")),
    "ids as texts": changed(
        lambda c: c.__setitem__("prompt_token_ids", [str(i) for i in c["prompt_token_ids"]])
    ),
    "two choices": lambda handler, right: handler.send(
        json.dumps({"choices": right["choices"] * 2}).encode()
    ),
    "a choice is null": says({"choices": [None]}),
    "choices are a text": says({"choices": "x"}),
}
TEACHER_FAULTS = TRANSPORT | WRONG_SCORES


@pytest.mark.parametrize("times", [1, 10**9], ids=["once", "always"])
@pytest.mark.parametrize("name", TEACHER_FAULTS)
def test_a_teacher_gives_right_scores_or_one_line(
    attacked: Attacked, name: str, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="poweropd")
    teacher = connect(attacked)
    teacher.check([[4, 5, 6], [7, 8]])
    attacked.fault, attacked.count, attacked.path = TEACHER_FAULTS[name], times, "/v1/completions"

    assert_right_or_one_line(lambda: assert_right_scores(teacher), caplog, must_fail=times > 1)
    assert attacked.faults >= 1


LISTS: dict[str, Fault] = {
    "a numeric id": says({"data": [{"id": 7, "max_model_len": 100}]}),
    "ids of all kinds": says({"data": [{"id": None}, {"id": 1.5}, {"id": True}]}),
    "a list as id": says({"data": [{"id": ["teacher"], "max_model_len": 100}]}),
    "an empty id": says({"data": [{"id": "", "max_model_len": 100}]}),
    "another model": says({"data": [{"id": "other", "max_model_len": 100}]}),
    "a name with the key": says({"data": [{"id": f"{KEY}\x1b[2J\n", "max_model_len": 100}]}),
    "models as texts": says({"data": ["teacher"]}),
    "no data": says({"object": "list"}),
    "data is an object": says({"data": {"id": "teacher"}}),
    "no context": says({"data": [{"id": "teacher"}]}),
    "a context of null": says({"data": [{"id": "teacher", "max_model_len": None}]}),
    "a context as text": says({"data": [{"id": "teacher", "max_model_len": "100"}]}),
    "a negative context": says({"data": [{"id": "teacher", "max_model_len": -1}]}),
    "a context of 0": says({"data": [{"id": "teacher", "max_model_len": 0}]}),
    "a boolean context": says({"data": [{"id": "teacher", "max_model_len": True}]}),
    "a fractional context": says({"data": [{"id": "teacher", "max_model_len": 99.5}]}),
    "a context that is a list": says({"data": [{"id": "teacher", "max_model_len": [100]}]}),
}


@pytest.mark.parametrize("name", LISTS | {k: TRANSPORT[k] for k in list(TRANSPORT)[::4]})
def test_a_list_of_models_that_is_none_is_refused_when_a_run_starts(
    attacked: Attacked, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    attacked.fault = (LISTS | TRANSPORT)[name]
    attacked.path, attacked.count = "/v1/models", 10**9
    teacher = connect(attacked)
    assert_right_or_one_line(teacher.context, caplog, must_fail=True)


def test_models_that_are_listed_twice_are_one(attacked: Attacked) -> None:
    card = {"id": "teacher", "max_model_len": 100}
    attacked.fault, attacked.path, attacked.count = says({"data": [card] * 2}), "/v1/models", 1
    assert connect(attacked).context() == 99


@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("connected", [True, False])
def test_no_score_of_another_model_behind_the_same_address_is_used(
    attacked: Attacked, first: int, connected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """From some request on another model answers, on the connections there are or on new ones."""
    teacher = connect(attacked)
    teacher.check([[4, 5, 6], [7, 8]])
    seen = iter(range(1000))

    def another(handler: Handler, right: Any) -> None:
        if next(seen) >= first:
            for entry in right["choices"][0]["prompt_logprobs"][1:]:
                next(iter(entry.values()))["logprob"] -= 0.5
        handler.close_connection = not connected
        handler.send(json.dumps(right).encode())

    attacked.fault, attacked.path, attacked.count = another, "/v1/completions", 10**9

    def attempt() -> None:
        for _ in range(3):
            assert_right_scores(teacher)

    assert_right_or_one_line(attempt, caplog, must_fail=True)


def test_no_score_of_another_model_that_is_there_for_one_connection_is_used(
    attacked: Attacked,
) -> None:
    """As behind a balancer: the second connection reaches another model, all others the first."""
    teacher = connect(attacked, concurrency=1)
    answered: dict[Any, int] = {}

    def balanced(handler: Handler, right: Any) -> None:
        own = answered[handler.client_address] = answered.get(handler.client_address, 0) + 1
        if len(answered) == 2:
            for entry in right["choices"][0]["prompt_logprobs"][1:]:
                next(iter(entry.values()))["logprob"] -= 0.5
        # The check of two sequences, twice, and of the cache takes six requests, and a score with
        # its check two.
        handler.close_connection = own == (6 if len(answered) == 1 else 2)
        handler.send(json.dumps(right).encode())

    attacked.fault, attacked.path, attacked.count = balanced, "/v1/completions", 10**9
    teacher.check([[4, 5, 6], [7, 8]])
    with pytest.raises(RunError, match="gives other log-probs than when the run started"):
        assert_right_scores(teacher)


# The rollout server.


def sets(**fields: Any) -> Fault:
    """A fault that sets fields of the choice; `log_probs` stands for those of the tokens."""

    def change(choice: dict[str, Any]) -> None:
        if "log_probs" in fields:
            choice["logprobs"] = {"token_logprobs": fields["log_probs"]}
        choice.update({k: v for k, v in fields.items() if k != "log_probs"})

    return changed(change)


def of_raw(text: str) -> Fault:
    """A fault that gives a text of JSON as the last log-prob."""

    def fault(handler: Handler, right: Any) -> None:
        right["choices"][0]["logprobs"]["token_logprobs"][-1] = "VALUE"
        handler.send(json.dumps(right).replace('"VALUE"', text).encode())

    return fault


ROLLOUT_FAULTS: dict[str, Fault] = {
    **{name: TRANSPORT[name] for name in list(TRANSPORT)[::3]},
    "ids as texts": sets(token_ids=["9", "11", "2"]),
    "fractional ids": sets(token_ids=[9.0, 11.0, 2.0]),
    "boolean ids": sets(token_ids=[True, 11, STOP]),
    "negative ids": sets(token_ids=[-9, 11, STOP]),
    "ids outside the vocabulary": sets(token_ids=[VOCAB, 11, STOP]),
    "an id of many digits": sets(token_ids=[10**300, 11, STOP]),
    "no id": sets(token_ids=[], log_probs=[]),
    "no id, too long": sets(token_ids=[], log_probs=[], finish_reason="length"),
    "ids are null": sets(token_ids=None),
    "ids are an object": sets(token_ids={"0": 9}),
    "ids are a text": sets(token_ids="abc"),
    "no stop": sets(token_ids=[9, 11, 12]),
    "longer than asked for": sets(token_ids=[9] * 8 + [STOP], log_probs=[-1.0] * 9),
    "shorter than asked for": sets(finish_reason="length"),
    "aborted": sets(finish_reason="abort"),
    "no reason": sets(finish_reason=None),
    "a reason with the key": sets(finish_reason=f"\x1b[2J{KEY}"),
    "a log-prob is null": sets(log_probs=[-1.0, None, -1.0]),
    "a log-prob is true": sets(log_probs=[-1.0, True, -1.0]),
    "a log-prob is a text": sets(log_probs=["-1.0", -1.0, -1.0]),
    "a log-prob is positive": sets(log_probs=[0.5, -1.0, -1.0]),
    "a log-prob of -1e300": sets(log_probs=[-1e300, -1.0, -1.0]),
    "a log-prob of vLLM's sign": sets(log_probs=[-9999.0, -1.0, -1.0]),
    "a log-prob of NaN": of_raw("NaN"),
    "a log-prob of -Infinity": of_raw("-Infinity"),
    "a log-prob of 400 digits": of_raw("-" + "9" * 400),
    "a log-prob too few": sets(log_probs=[-1.0, -1.0]),
    "a log-prob too many": sets(log_probs=[-1.0] * 4),
    "log-probs are null": sets(logprobs=None),
    "no log-probs": changed(lambda c: c.pop("logprobs")),
    "two choices": WRONG_SCORES["two choices"],
    "no choice": says({"choices": []}),
}


@pytest.mark.parametrize("times", [1, 10**9], ids=["once", "always"])
@pytest.mark.parametrize("name", ROLLOUT_FAULTS)
def test_a_rollout_server_gives_whole_completions_or_one_line(
    sampler: tuple[Attacked, CheckedEngine],
    name: str,
    times: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, engine = sampler
    engine.sync()
    server.fault, server.count, server.path = ROLLOUT_FAULTS[name], times, "/v1/completions"
    assert_right_or_one_line(lambda: assert_right_rollouts(engine), caplog, must_fail=times > 1)
    assert server.faults >= 1


@pytest.mark.parametrize("path", ["/weight_info", "/collective_rpc", "/update_weight_version"])
@pytest.mark.parametrize("name", ["reset", "cut at half", "500 with the key", "401", "a number"])
def test_weights_are_taken_over_or_one_line_says_why_not(
    sampler: tuple[Attacked, CheckedEngine],
    path: str,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, engine = sampler
    server.fault, server.count, server.path = TRANSPORT[name], 1, path

    def attempt() -> None:
        engine.sync()
        assert_right_rollouts(engine)

    assert_right_or_one_line(attempt, caplog, must_fail=False)


def test_a_restarted_rollout_server_is_given_the_weights_and_anothers_is_left(
    sampler: tuple[Attacked, CheckedEngine], caplog: pytest.LogCaptureFixture
) -> None:
    server, engine = sampler
    engine.sync()
    synced = server.answers.version
    server.answers.version = "default"
    assert_right_rollouts(engine)
    assert server.answers.version == synced
    server.answers.version = f"another\n{KEY}"
    with pytest.raises(RunError, match="another run has given this server its weights") as error:
        assert_right_rollouts(engine)
    assert_one_line_without_key([str(error.value)])
