"""Hostile answers of servers, made by hypothesis: the right result or one line, soon.

An answer is a right one of which some places were changed, or anything at all, under any status and
headers. `make fuzz` tries many more of them than the suite does.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import attacked_server
import pytest
from attacked_server import (
    LONGEST,
    SAMPLING,
    STOP,
    VOCAB,
    Fault,
    Handler,
    Sampler,
    assert_right_or_one_line,
    assert_right_scores,
    connect,
    connect_engine,
    hurry,
    running,
    teacher_answer,
)
from hostile_values import EXAMPLES, Change, changed_json, changes, fuzz, json_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_cases import make_request

from poweropd import net
from poweropd.net import JsonClient, Response
from poweropd.rollouts.guards import CheckedEngine

statuses = st.sampled_from([200, 200, 201, 204, 206, 301, 304, 307, 400, 401, 404, 429, 500, 503])
bodies = st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | json_texts.map(str.encode)
SECONDS = 30  # for an attempt with all that is tried again, on a busy machine


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(attacked_server, "PATIENCE", 0.03)


@dataclass
class Spoken:
    """A server without HTTP, which answers well but for the first `count` requests to `path`."""

    answers: Callable[[str, Any], Any]
    url = "http://127.0.0.1:9"
    path, count = "", 0
    fault: Callable[[Any], Response] | None = None

    def answer(self, path: str, body: Any) -> Response:
        right = self.answers(path, body)
        if self.count > 0 and self.fault and path.startswith(self.path):
            self.count -= 1
            return self.fault(right)
        return Response(200, json.dumps(right).encode(), 0.0)


@contextmanager
def speaking(answers: Callable[[str, Any], Any]) -> Iterator[Spoken]:
    """A server that all clients reach while the block runs."""
    server = Spoken(answers)

    async def bounded(client: JsonClient, method: str, path: str, body: Any) -> Response:
        return server.answer(path, body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JsonClient, "_bounded", bounded)
        yield server


@st.composite
def any_answer(draw: st.DrawFn) -> Callable[[Any], Response]:
    """A right answer with some changes, or any bytes, under any status."""
    made = draw(changes | st.none())
    status = 200 if draw(st.booleans()) else draw(statuses | st.integers(100, 999))
    content = draw(bodies) if made is None else b""
    wait = draw(st.sampled_from([0.0, 0.01, math.inf]))
    return lambda right: Response(
        status, content if made is None else changed_json(right, made).encode(), wait
    )


text_of_header = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30)
CHARSETS = ["utf-8", "utf-16", "utf-7", "idna", "punycode", "base64", "rot13", "zlib", "hex",
            "undefined", "unicode_escape", "raw_unicode_escape", "mbcs", "none"]  # fmt: skip
DATES = [
    *("Fri, 31 Dec 9999 23:59:59 -2359", "Mon, 01 Jan 0001 00:00:00 +2359", "1 Jan", "0:0", ","),
    *("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "Wed, 21 Oct 2015"),
]
retries = st.sampled_from([*DATES, "-1", "1e400", "nan", "0x1", "٣"]) | text_of_header
headers = st.fixed_dictionaries(
    {},
    optional={
        "Retry-After": retries,
        "Content-Type": st.sampled_from(CHARSETS).map("text/html; charset={}".format)
        | text_of_header,
        "Content-Encoding": st.sampled_from(["gzip", "deflate", "br", "zstd", "gzip, x", "x"]),
        "Location": st.sampled_from(["http://[::1", "//", "http://a:b/", "\x00", "http://\xff/"])
        | text_of_header,
        "Set-Cookie": text_of_header,
        "X": text_of_header,
    },
)


@st.composite
def any_http(draw: st.DrawFn) -> Fault:
    """A fault that answers with some status, some headers and some bytes, or the right answer."""
    status = draw(statuses | st.integers(200, 999))
    given_headers, content = draw(headers), draw(bodies | st.none())

    def fault(handler: Handler, right: Any) -> None:
        body = json.dumps(right).encode() if content is None else content
        lines = [f"HTTP/1.1 {status} Odd", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in given_headers.items()]
        handler.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body)
        handler.close_connection = True

    return fault


def attack(
    server: Any,
    path: str,
    fault: Any,
    attempt: Callable[[], object],
    caplog: pytest.LogCaptureFixture,
    times: int = 1,
) -> None:
    """The attempt gives what is right, or one line, and soon."""
    caplog.set_level(logging.DEBUG, logger="poweropd")
    caplog.clear()
    server.fault, server.path, server.count = fault, path, times
    start = time.monotonic()
    try:
        assert_right_or_one_line(attempt, caplog, must_fail=False)
    finally:
        server.count = 0
    assert time.monotonic() - start < SECONDS


KNOWN = [[4, 5, 6], [7, 8]]  # what a teacher scores when a run starts
often = st.sampled_from([1, 2, 10**9])


@fuzz
@given(any_answer(), often)
def test_no_answer_of_a_teacher_gives_a_wrong_score(
    caplog: pytest.LogCaptureFixture, fault: Any, times: int
) -> None:
    with speaking(teacher_answer) as server:
        teacher = connect(server)
        teacher.check(KNOWN)
        scores = partial(assert_right_scores, teacher)
        attack(server, "/v1/completions", fault, scores, caplog, times)


@fuzz
@given(any_answer(), often)
def test_any_answer_while_a_teacher_is_checked(
    caplog: pytest.LogCaptureFixture, fault: Any, times: int
) -> None:
    with speaking(teacher_answer) as server:
        teacher = connect(server)

        def attempt() -> None:
            teacher.vocab_size(VOCAB, VOCAB)
            teacher.check(KNOWN)
            assert_right_scores(teacher)

        attack(server, "/v1/completions", fault, attempt, caplog, times)


@fuzz
@given(any_answer(), often)
def test_any_list_of_models_gives_a_context_or_one_line(
    caplog: pytest.LogCaptureFixture, fault: Any, times: int
) -> None:
    with speaking(teacher_answer) as server:
        teacher = connect(server)

        def attempt() -> None:
            assert teacher.context() >= 1

        attack(server, "/v1/models", fault, attempt, caplog, times)


def assert_whole_rollouts(engine: CheckedEngine) -> None:
    """Completions that the protocol allows; which of them is for the server to say."""
    for rollout in engine.generate([make_request(i, [4 + i, 5]) for i in range(2)], SAMPLING):
        ids, log_probs = rollout.completion_ids, rollout.sampling_log_probs
        assert all(type(i) is int and 0 <= i < VOCAB for i in ids)
        assert all(type(x) is float and -9999 < x <= 0 for x in log_probs)
        assert 0 < len(ids) == len(log_probs) <= LONGEST
        assert rollout.stopped == (ids[-1] == STOP)
        assert rollout.stopped or len(ids) == LONGEST


ROUTES = ["/v1/completions", "/v1/completions", "/weight_info", "/collective_rpc",
          "/update_weight_version", "/v1/models", "/pause"]  # fmt: skip


@fuzz
@given(st.sampled_from(ROUTES), any_answer(), often)
def test_any_answer_of_a_rollout_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str, fault: Any, times: int
) -> None:
    with speaking(Sampler()) as server:

        def attempt() -> None:
            engine = connect_engine(server, tmp_path)
            engine.sync()
            assert_whole_rollouts(engine)

        attack(server, path, fault, attempt, caplog, times)


@settings(fuzz, max_examples=max(10, EXAMPLES // 4))
@given(any_http(), often)
def test_any_status_and_headers(caplog: pytest.LogCaptureFixture, fault: Fault, times: int) -> None:
    with running(teacher_answer) as server:
        teacher = connect(server)
        teacher.check(KNOWN)
        scores = partial(assert_right_scores, teacher)
        attack(server, "/v1/completions", fault, scores, caplog, times)


@fuzz
@given(retries)
def test_any_retry_after_is_a_time(value: str) -> None:
    assert net.retry_after(value) >= 0


def test_changes_reach_every_place() -> None:
    right = teacher_answer("/v1/completions", {"prompt": [4, 5, 6], "model": "teacher"})
    made = {changed_json(right, [Change(i, "replace", "NaN")]) for i in range(30)}
    assert len(made) > 15
    assert "NaN" in made
    assert all(json.loads(text) != right for text in made)
