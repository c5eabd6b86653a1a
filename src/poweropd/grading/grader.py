r"""Grades completions against gold answers, in processes that can be killed.

    grade("18", "She makes 9 * 2 = 18 dollars.\n#### 18")        # Grade(correct=True, ...)

    with Grader(workers=4, timeout=3.0) as grader:
        futures = [grader.submit(gold, completion) for gold, completion in pairs]
        grades = [future.result() for future in futures]
        grader.counts                                            # reason -> how many

How an answer is found and compared is told in docs/grading.md. No input raises: whatever goes wrong
is a reason of the grade, counted, with the error's text in `detail`.
"""

import atexit
import threading
from collections import Counter, OrderedDict
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Self

from pebble import ProcessFuture

from poweropd.grading import answers, exact, rules, workers
from poweropd.grading.rules import REASONS, Rule, Verdict

__all__ = ["REASONS", "Grade", "Grader", "Rule", "grade"]

DEFAULT_TIMEOUT = 3.0
DEFAULT_WORKERS = 2
#: Longer answers are not tried: no benchmark's gold comes near, and none would end in time.
LONGEST_ANSWER = 5_000
_CACHE_SIZE = 100_000

_Key = tuple[str, str, Rule]


@dataclass(frozen=True)
class Grade:
    """How a completion fared. `reason` is a key of REASONS; `detail` holds an error's text."""

    correct: bool
    answer: str | None
    reason: str
    detail: str = ""


class Grader:
    """Grades with `workers` processes, at most `timeout` seconds for each comparison.

    Verdicts are cached by (gold, answer, rule). Safe to use from several threads.
    """

    def __init__(self, *, workers: int = DEFAULT_WORKERS, timeout: float = DEFAULT_TIMEOUT) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1; got {workers}")
        if timeout <= 0:
            raise ValueError(f"timeout must be positive, in seconds; got {timeout}")
        self.timeout = timeout
        self._workers = workers
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._verdicts: OrderedDict[_Key, Future[Verdict]] = OrderedDict()
        self._pool = workers_pool(workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(wait=error is None)

    def close(self, *, wait: bool = True) -> None:
        """Ends the workers, after the work that was submitted unless `wait` is false."""
        if wait:
            self._pool.close()
        else:
            self._pool.stop()
        self._pool.join()

    @property
    def counts(self) -> dict[str, int]:
        """How many grades had each reason so far, every reason of REASONS named."""
        with self._lock:
            return {reason: self._counts[reason] for reason in REASONS}

    def warm_up(self) -> None:
        """Returns once the workers have started and loaded what they need."""
        pending = [self._pool.schedule(workers.compare_in_worker, args=("x+1", "1+x", Rule()))
                   for _ in range(self._workers)]  # fmt: skip
        for future in pending:
            future.result()

    def grade(self, gold: str, completion: str, *, rule: Rule = Rule()) -> Grade:  # noqa: B008
        """The grade of one completion; see `submit` for many."""
        return self.submit(gold, completion, rule=rule).result()

    def submit(
        self,
        gold: str,
        completion: str,
        *,
        rule: Rule = Rule(),  # noqa: B008
    ) -> "Future[Grade]":
        """A future of the grade, which never holds an exception."""
        future: Future[Grade] = Future()
        gold = _plain_gold(gold)
        found = answers.extract(completion)
        answer = found.answer
        if answer is not None and found.joined is not None and exact.is_several(gold):
            answer = found.joined if not exact.is_several(answer) else answer
        if found.whole is not None and exact.identical(gold, found.whole):
            answer = found.whole
        if answer is None:
            self._finish(future, None, Verdict(rules.NO_ANSWER))
        else:
            verdict = self._verdict((gold, answer, rule))
            verdict.add_done_callback(lambda done: self._finish(future, answer, done.result()))
        return future

    def _finish(self, future: "Future[Grade]", answer: str | None, verdict: Verdict) -> None:
        with self._lock:
            self._counts[verdict.reason] += 1
        correct = verdict.reason == rules.CORRECT
        future.set_result(Grade(correct, answer, verdict.reason, verdict.detail))

    def _verdict(self, key: _Key) -> "Future[Verdict]":
        """The cached verdict, or a new one, decided at once where no algebra is needed."""
        with self._lock:
            known = self._verdicts.get(key)
            if known is not None:
                self._verdicts.move_to_end(key)
                return known
            verdict: Future[Verdict] = Future()
            self._verdicts[key] = verdict
            if len(self._verdicts) > _CACHE_SIZE:
                self._verdicts.popitem(last=False)
        gold, answer, rule = key
        quick = _too_long(gold, answer) or exact.quick(gold, answer, rule)
        if quick is not None:
            verdict.set_result(quick)
        else:
            work = self._pool.schedule(workers.compare_in_worker, args=key, timeout=self.timeout)
            work.add_done_callback(lambda done: self._receive(key, verdict, done))
        return verdict

    def _receive(
        self, key: _Key, verdict: "Future[Verdict]", done: "ProcessFuture[Verdict]"
    ) -> None:
        """The worker's verdict, or what became of the worker."""
        result = self._outcome(done)
        if result.reason == rules.CRASH:
            with self._lock:  # a death may have been the machine's fault: let it be tried again
                self._verdicts.pop(key, None)
        verdict.set_result(result)

    def _outcome(self, done: "ProcessFuture[Verdict]") -> Verdict:
        if done.cancelled():
            return Verdict(rules.CRASH, "the grader was closed before this comparison ended")
        error = done.exception()
        if error is None:
            return done.result()
        if isinstance(error, (TimeoutError, FutureTimeoutError)):
            return Verdict(rules.TIMEOUT, f"no result within {self.timeout:g} s")
        if isinstance(error, CancelledError):
            return Verdict(rules.CRASH, "the comparison was cancelled")
        return Verdict(rules.CRASH, f"{type(error).__name__}: {error}"[:500])


def workers_pool(count: int) -> "workers.ProcessPool":
    """Separate so that the argument `workers` does not hide the module."""
    return workers.worker_pool(count)


def _plain_gold(gold: str) -> str:
    """A gold given as a worked solution stands for what is in its last box."""
    return (answers.boxed(gold) or gold) if "box" in gold else gold


def _too_long(gold: str, answer: str) -> Verdict | None:
    if len(answer) <= max(LONGEST_ANSWER, 2 * len(gold)):
        return None
    return Verdict(rules.TIMEOUT, f"not tried: {len(answer)} characters, at most {LONGEST_ANSWER}")


@cache
def _shared() -> Grader:
    grader = Grader()
    atexit.register(grader.close, wait=False)
    return grader


def grade(gold: str, completion: str, *, rule: Rule = Rule()) -> Grade:  # noqa: B008
    """Grades one completion against its gold answer with a grader shared by the process."""
    return _shared().grade(gold, completion, rule=rule)
