r"""Grades completions against gold answers, in processes that can be killed.

    grade("18", "She makes 9 * 2 = 18 dollars.\n#### 18")        # Grade(correct=True, ...)

    with Grader(workers=4, timeout=3.0) as grader:
        futures = [grader.submit(gold, completion) for gold, completion in pairs]
        grades = [future.result() for future in futures]
        grader.counts                                            # reason -> how many

golds.py says what a gold may be, and docs/grading.md how an answer is found and compared. No input
raises: whatever goes wrong is a reason of the grade, counted, with the error's text in `detail`.
"""

import atexit
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import cache
from typing import Self, TypeVar

from pebble import ProcessFuture

from poweropd.grading import answers, exact, rules
from poweropd.grading.golds import LONGEST_GOLD, read_gold
from poweropd.grading.rules import REASONS, Rule, Verdict
from poweropd.grading.shapes import lists_several
from poweropd.grading.workers import compare_in_worker, worker_pool

__all__ = ["REASONS", "Grade", "Grader", "Rule", "grade"]

DEFAULT_TIMEOUT = 3.0
DEFAULT_WORKERS = 2
#: Longer answers are not tried: no benchmark's gold comes near, and none would end in time.
LONGEST_ANSWER = 5_000
#: Longer completions are searched by a worker, under the time limit.
_SHORT_COMPLETION = 16_000
_CACHE_SIZE = 100_000
_PLAIN_RULE = Rule()

_Key = tuple[str, str, Rule]
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Grade:
    """The outcome for a completion: `reason` is a key of REASONS, `detail` an error's text.

    score: 1 for a correct answer and 0 for any other; graders of the user's own may give any
    number, and `scores` beside it, by name. `correct` is whether the score is at least 1.
    """

    correct: bool
    answer: str | None
    reason: str
    detail: str = ""
    score: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)


class Grader:
    """Grades with `workers` processes, at most `timeout` seconds for each search and comparison.

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
        self._searches: set[Future[Grade]] = set()
        self._verdicts: OrderedDict[_Key, Future[Verdict]] = OrderedDict()
        self._pool = worker_pool(workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(wait=error is None)

    def close(self, *, wait: bool = True) -> None:
        """Ends the workers, after the work that was submitted unless `wait` is false."""
        if wait:
            with self._lock:
                searches = set(self._searches)
            futures.wait(searches)  # Their comparisons need an open pool.
            self._pool.close()
        else:
            self._pool.stop()
        self._pool.join()

    @property
    def counts(self) -> dict[str, int]:
        """Returns how many grades had each reason of REASONS so far."""
        with self._lock:
            return {reason: self._counts[reason] for reason in REASONS}

    def warm_up(self) -> None:
        """Returns once the workers have started and loaded what they need."""
        work = ("x+1", "1+x", _PLAIN_RULE)
        pending = [self._pool.schedule(compare_in_worker, args=work) for _ in range(self._workers)]
        for future in pending:
            future.result()

    def grade(self, gold: object, completion: str, *, rule: Rule = _PLAIN_RULE) -> Grade:
        """Returns the grade of one completion; see `submit` for many."""
        return self.submit(gold, completion, rule=rule).result()

    def submit(self, gold: object, completion: str, *, rule: Rule = _PLAIN_RULE) -> "Future[Grade]":
        """Returns a future of the grade, which never holds an exception.

        gold: text, a number or a list of them; `golds.read_gold` says how they are read.
        """
        future: Future[Grade] = Future()
        try:
            wanted = read_gold(gold)
        except ValueError as error:
            self._finish(future, None, Verdict(rules.UNPARSED_GOLD, f"the gold answer: {error}"))
            return future
        if len(completion) <= _SHORT_COMPLETION:
            self._compare(future, wanted, answers.extract(completion), rule)
        else:
            with self._lock:
                self._searches.add(future)
            future.add_done_callback(self._end_search)
            search = self._pool.schedule(answers.extract, args=(completion,), timeout=self.timeout)
            search.add_done_callback(lambda done: self._found(future, wanted, done, rule))
        return future

    def _found(
        self,
        future: "Future[Grade]",
        gold: str,
        search: "ProcessFuture[answers.Extraction]",
        rule: Rule,
    ) -> None:
        """Compares what a worker found in a long completion, or grades its failure."""
        failure = self._failure(search)
        if failure is None:
            try:
                self._compare(future, gold, search.result(), rule)
            except RuntimeError as error:  # The pool was stopped since the search ended.
                failure = Verdict(rules.CRASH, str(error))
        if failure is not None:
            self._finish(future, None, failure)

    def submit_work(
        self,
        work: Callable[..., _Found],
        arguments: tuple[object, ...],
        judge: Callable[[_Found], tuple[str | None, Verdict]],
    ) -> "Future[Grade]":
        """Returns a future of the grade that `judge` gives to what `work` finds in a worker.

        judge: returns the answer and the verdict. Work that fails or takes too long is graded so.
        """
        future: Future[Grade] = Future()

        def receive(done: "ProcessFuture[_Found]") -> None:
            failure = self._failure(done)
            self._finish(future, *((None, failure) if failure else judge(done.result())))

        task = self._pool.schedule(work, args=arguments, timeout=self.timeout)
        task.add_done_callback(receive)
        return future

    def _end_search(self, future: "Future[Grade]") -> None:
        with self._lock:
            self._searches.discard(future)

    def _compare(
        self, future: "Future[Grade]", gold: str, found: answers.Extraction, rule: Rule
    ) -> None:
        """Chooses the reading of the completion that suits the gold, and grades it."""
        answer = found.answer
        if len(gold) > LONGEST_GOLD:
            texts = (text for text in (answer, found.whole) if text is not None)
            same = next((text for text in texts if text.strip() == gold.strip()), None)
            detail = f"not tried: {len(gold)} characters, at most {LONGEST_GOLD}"
            unread = Verdict(rules.UNPARSED_GOLD, detail)
            if same is None:
                self._finish(future, answer, unread)
            else:
                self._finish(future, same, exact.verdict_of(True))
            return
        if answer is not None and found.joined is not None and lists_several(gold):
            whole_list = len(answer) > exact.LONGEST or lists_several(answer)
            answer = answer if whole_list else found.joined
        if found.whole is not None and exact.identical(gold, found.whole):
            answer = found.whole
        if answer is None:
            self._finish(future, None, Verdict(rules.NO_ANSWER))
        else:
            verdict = self._verdict((gold, answer, rule))
            verdict.add_done_callback(lambda done: self._finish(future, answer, done.result()))

    def _finish(self, future: "Future[Grade]", answer: str | None, verdict: Verdict) -> None:
        with self._lock:
            self._counts[verdict.reason] += 1
        correct = verdict.reason == rules.CORRECT
        grade = Grade(correct, answer, verdict.reason, verdict.detail, float(correct))
        future.set_result(grade)

    def _verdict(self, key: _Key) -> "Future[Verdict]":
        """Returns the cached verdict, or a new one, decided at once if no algebra is needed."""
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
            work = self._pool.schedule(compare_in_worker, args=key, timeout=self.timeout)
            work.add_done_callback(lambda done: self._receive(key, verdict, done))
        return verdict

    def _receive(
        self, key: _Key, verdict: "Future[Verdict]", done: "ProcessFuture[Verdict]"
    ) -> None:
        """Passes on the worker's verdict, or a verdict that says what became of the worker."""
        result = self._failure(done) or done.result()
        if result.reason == rules.CRASH:
            with self._lock:  # The machine may be to blame, so the pair may be tried again.
                self._verdicts.pop(key, None)
        verdict.set_result(result)

    def _failure(self, done: ProcessFuture) -> Verdict | None:
        """Returns the verdict on work that failed; None for work that ended with a result."""
        if done.cancelled() or isinstance(error := done.exception(), CancelledError):
            return Verdict(rules.CRASH, "the grader was closed before this comparison ended")
        if error is None:
            return None
        if isinstance(error, TimeoutError):
            return Verdict(rules.TIMEOUT, f"no result within {self.timeout:g} s")
        return Verdict(rules.CRASH, f"{type(error).__name__}: {error}"[:500])


def _too_long(gold: str, answer: str) -> Verdict | None:
    if len(answer) <= max(LONGEST_ANSWER, 2 * len(gold)):
        return None
    return Verdict(rules.TIMEOUT, f"not tried: {len(answer)} characters, at most {LONGEST_ANSWER}")


@cache
def _shared_grader() -> Grader:
    grader = Grader()
    atexit.register(grader.close, wait=False)
    return grader


def grade(gold: object, completion: str, *, rule: Rule = _PLAIN_RULE) -> Grade:
    """Grades one completion against its gold answer with a grader shared by the process."""
    return _shared_grader().grade(gold, completion, rule=rule)
