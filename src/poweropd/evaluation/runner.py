"""Runs benchmarks: samples completions, grades them as they end, and keeps every one.

Completions are appended with their grades to one JSONL file per benchmark, so an interrupted
evaluation goes on where it stopped. Requests are sampled in fixed groups; a group that was
interrupted is sampled again as a whole, and only its missing rows are appended. So a resumed
evaluation has the rows of an undisturbed one, to the last bit.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO, cast

import torch
from transformers import PreTrainedTokenizerBase

from poweropd import stops
from poweropd.data.chat import encode_chat
from poweropd.data.messages import Conversation
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Request, Rollout
from poweropd.errors import RunError, UsageError
from poweropd.evaluation.benchmarks import Problem, ProblemSet
from poweropd.evaluation.metrics import GradedPart, GradedRow, Summary, check_row, summarize
from poweropd.evaluation.settings import BATCH_SIZE, EvaluationSettings
from poweropd.grading.grader import Grade, Grader
from poweropd.grading.graders.base import NamedGrader, create_grader
from poweropd.models import loading
from poweropd.rollouts.base import RolloutEngine, Sampling, completion_seed
from poweropd.rollouts.transformers import TransformersEngine
from poweropd.runs import files
from poweropd.runs.pace import Say, WorkProgress

logger = logging.getLogger("poweropd")


@dataclass(frozen=True)
class Subject:
    """The model under evaluation: an engine that samples it, its tokenizer and its stop ids.

    `identity` names the weights, so that completions of other weights are not taken for theirs.
    """

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    context_length: int
    identity: str


class Evaluation:
    """One benchmark, or every `stride`-th problem of it from `first` on, on one model.

    `folder`/NAME.jsonl holds the completions; NAME.settings.json the model, settings and problems.
    """

    def __init__(
        self,
        name: str,
        problems: Sequence[Problem],
        settings: EvaluationSettings,
        folder: Path,
        model: str,
        share: tuple[int, int] = (0, 1),
        grader: NamedGrader | None = None,
    ) -> None:
        self.name, self.settings, self.model = name, settings, model
        self.grader = grader or create_grader("grader", settings.grader)
        self.first, self.stride = share
        self.problems = problems[self.first :: self.stride]
        self.path = folder / f"{name}.jsonl"
        self.settings_path = folder / f"{name}.settings.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._claim()
        self.rows = self._recovered()
        self.done = {(row["id"], row["sample"]) for row in self.rows}

    def _recovered(self) -> list[GradedRow]:
        """Returns the complete rows of the file; raises RunError for one that is none of ours."""
        rows = files.recover_jsonl(self.path)
        for number, row in enumerate(rows, 1):
            try:
                check_row(row)
            except ValueError as error:
                raise RunError(
                    f"{self.path}: row {number} is damaged ({error}): delete that line and run the "
                    "same command again"
                ) from None
        return cast(list[GradedRow], rows)

    def _claim(self) -> None:
        """Raises UsageError if the file is about another model, other settings or problems."""
        texts = [
            [p.id, p.problem, p.answer, *(p.conversation.turns if p.conversation else ())]
            for p in self.problems
        ]
        digest = hashlib.sha256(json.dumps(texts, default=str).encode()).hexdigest()[:16]
        asked = {"model": self.model, "problems": digest, "count": len(texts)}
        claim_rows(self.path, self.settings_path, asked | asdict(self.settings))

    def run(
        self, subject: Subject, grader: Grader, progress: bool = True, say: Say | None = None
    ) -> Summary:
        """Samples and grades what is missing, and returns the summary of all rows.

        progress, say: see `WorkProgress`.
        """
        prompts = prompt_ids(self.problems, self.settings, subject.tokenizer)
        longest = check_room(self.name, prompts, subject.context_length)
        requests, sampling = self._requests(prompts), self._sampling(subject, longest)
        with WorkProgress(self.name, len(requests), len(self.rows), progress, say) as shown:
            for group in self._unfinished(requests):
                rollouts = subject.engine.generate(group, sampling)
                for row in self._graded(rollouts, subject, grader):
                    shown.advance(tokens=row["tokens"])
        return summarize(self.rows, n=self.settings.n)

    def _sampling(self, subject: Subject, longest_prompt: int) -> Sampling:
        settings, room = self.settings, subject.context_length - longest_prompt
        if room < settings.max_new_tokens:
            logger.warning(
                "%s: at most %d new tokens instead of %d: the model's context has %d tokens",
                *(self.name, room, settings.max_new_tokens, subject.context_length),
            )
        return Sampling(
            max_new_tokens=min(room, settings.max_new_tokens),
            stop_ids=subject.stop_ids,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
        )

    def _requests(self, prompts: Sequence[list[int]]) -> list[Request]:
        return [
            Request(Prompt(i, ids, ids, self.problems[i].row), i, sample, self._seed(i, sample))
            for i, ids in enumerate(prompts)
            for sample in range(self.settings.n)
        ]

    def _seed(self, index: int, sample: int) -> int:
        """Returns a seed by the problem's place in the whole benchmark, whatever the shares are."""
        place = self.first + index * self.stride
        return completion_seed(self.settings.seed, 0, place, sample)

    def _unfinished(self, requests: list[Request]) -> Iterator[list[Request]]:
        """Yields the groups that miss something; what is done does not change the grouping."""
        ordered = sorted(requests, key=lambda r: -len(r.prompt_ids))  # stable
        for start in range(0, len(ordered), self.settings.group_size):
            group = ordered[start : start + self.settings.group_size]
            keys = {(self.problems[r.prompt_index].id, r.sample_index) for r in group}
            if not keys <= self.done:
                yield group

    def _graded(
        self, rollouts: Iterator[Rollout], subject: Subject, grader: Grader
    ) -> Iterator[GradedRow]:
        """Appends and yields the missing rows, in the order in which completions end."""
        waiting: deque[tuple[GradedRow, Future[Grade]]] = deque()
        try:
            with self.path.open("a", encoding="utf-8") as file:
                for rollout in rollouts:
                    problem = self.problems[rollout.request.prompt_index]
                    if (problem.id, rollout.request.sample_index) not in self.done:
                        row = _ungraded_row(problem, rollout, subject.tokenizer)
                        asked = problem.asked(self.name)
                        grade = self.grader.submit(grader, asked, row["completion"])
                        waiting.append((row, grade))
                    while waiting and waiting[0][1].done():
                        yield self._append(file, *waiting.popleft())
                while waiting:
                    yield self._append(file, *waiting.popleft())
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot write a completion ({error.strerror}); {len(self.rows)} are "
                "kept: free some space and run the same command again"
            ) from error

    def _append(self, file: TextIO, row: GradedRow, grade: "Future[Grade]") -> GradedRow:
        row |= graded_part(grade.result())
        file.write(json.dumps(row) + "\n")
        file.flush()
        self.rows.append(row)
        self.done.add((row["id"], row["sample"]))
        return row

    def check_not_empty(self) -> None:
        """Raises RunError if every completion is empty."""
        if not any(row["completion"].strip() for row in self.rows):
            raise RunError(
                f"{self.name}: every completion is empty or only special tokens; check the model, "
                f"its chat template and its stop tokens (the completions are in {self.path})"
            )


def claim_rows(path: Path, settings_path: Path, asked: Mapping[str, object]) -> None:
    """Keeps what the rows of a file are about, beside it.

    Raises UsageError if the file is about another model, other settings or problems.
    """
    wanted = json.loads(json.dumps(asked))
    if not settings_path.exists():
        files.write_json(settings_path, wanted)
        return
    # Before there were graders to choose from, there was this one.
    found = {"grader": EvaluationSettings.grader} | files.read_json(settings_path)
    differing = [f"{k}: {found.get(k)!r} != {v!r}" for k, v in wanted.items() if found.get(k) != v]
    if differing:
        raise UsageError(
            f"{path} holds completions of another evaluation ({'; '.join(differing)}): choose "
            "another folder, or delete this one"
        )


def prompt_ids(
    problems: Sequence[Problem], settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Returns the token ids of each problem as a prompt, up to the model's turn."""
    ending = f"\n{settings.instruction}" if settings.instruction else ""
    texts = (p.conversation or Conversation.of_text(p.problem) for p in problems)
    asked = [replace(one.with_ending(ending), tools=settings.tools) for one in texts]
    return encode_chat(tokenizer, asked, settings.chat, settings.system)


def check_room(name: str, prompts: Sequence[list[int]], context_length: int) -> int:
    """Returns the longest prompt's length in tokens. Raises UsageError if it fills the context."""
    longest = max(map(len, prompts))
    if longest >= context_length:
        raise UsageError(
            f"{name}: a prompt of {longest} tokens leaves no room in the model's context of "
            f"{context_length} tokens"
        )
    return longest


def _ungraded_row(
    problem: Problem, rollout: Rollout, tokenizer: PreTrainedTokenizerBase
) -> GradedRow:
    stop = rollout.completion_ids[-1] if rollout.stopped else None
    return {
        "id": problem.id,
        "sample": rollout.request.sample_index,
        "completion": tokenizer.decode(rollout.own_ids, skip_special_tokens=True),
        "tokens": len(rollout.completion_ids),
        "stop": None if stop is None else tokenizer.convert_ids_to_tokens(stop),
        "answer": None,
        "correct": False,
        "score": 0.0,
        "reason": "",
    }


def graded_part(grade: Grade) -> GradedPart:
    """Returns what the row of a completion has of its grade."""
    part: GradedPart = {
        "answer": grade.answer,
        "correct": grade.correct,
        "score": grade.score,
        "reason": grade.reason,
    }
    if grade.scores:
        part["scores"] = dict(grade.scores)
    if grade.detail:
        part["detail"] = grade.detail
    return part


def load_subject(
    model: str, dtype: str, trust_remote_code: bool = False, batch_size: int = BATCH_SIZE
) -> Subject:
    """Loads a model directory or Hub model, to be sampled by the transformers engine."""
    tokenizer = loading.load_tokenizer(model, trust_remote_code)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = loading.load_model(model, dtype, trust_remote_code).to(device)
    vocab_size = loaded.get_output_embeddings().weight.shape[0]
    engine = TransformersEngine(loaded, vocab_size=vocab_size, batch_size=batch_size)
    engine.check_decoding()
    return Subject(
        engine=engine,
        tokenizer=tokenizer,
        stop_ids=tuple(stops.stop_ids(tokenizer, loaded.generation_config)),
        context_length=loading.context_length(loaded.config),
        identity=f"{loading.fingerprint(model, loaded)} {dtype} in batches of {batch_size}",
    )


def run_benchmarks(
    subject: Subject,
    problem_sets: Mapping[str, ProblemSet],
    folder: Path,
    progress: bool = True,
    share: tuple[int, int] = (0, 1),
    say: Say | None = None,
) -> dict[str, Evaluation]:
    """Runs every benchmark of `problem_sets`, by its name, one after another.

    `folder` keeps rows and settings; an evaluation that runs on it again goes on where it was
    stopped. `share` (first, stride) leaves other problems to other processes. `progress` and `say`
    are those of `WorkProgress`. Raises UsageError if the folder holds other completions, and
    RunError if nothing can be written any more.
    """
    done = {}
    with Grader() as workers:
        for name, one in problem_sets.items():
            done[name] = Evaluation(
                *(name, one.problems, one.settings, folder, subject.identity, share), one.grader
            )
            if done[name].problems:
                done[name].run(subject, workers, progress, say)
    return done
