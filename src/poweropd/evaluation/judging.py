"""Samples completions of prompts and compares the student with its teacher in their contexts.

The same prompts get the same seeds at every evaluation, so that two of them differ by the student
and little else. Completions are sampled and judged in fixed groups, whose rows are kept: an
evaluation that was stopped goes on behind the last group.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from poweropd.data.batch import Batch, collate
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Example, Request, Rollout, make_example
from poweropd.errors import RunError
from poweropd.evaluation.divergence import DIVERGENCE, EXACT, SAMPLED, JudgedRow
from poweropd.evaluation.runner import Subject, claim_rows
from poweropd.evaluation.settings import DivergenceSettings
from poweropd.models.language_model import Teacher, with_teacher
from poweropd.net import NO_LOG_PROB
from poweropd.objectives.comparison import Compared, ComparedTokens
from poweropd.rewards import create
from poweropd.rollouts.base import Sampling, completion_seed
from poweropd.runs import files
from poweropd.runs.pace import Say, WorkProgress
from poweropd.teachers.server import ServerTeacher

STEP = -2  # in the seeds of completions: none of the steps of training
# (examples, a teacher that reads along, stop ids) -> the record of the examples' tokens. With
# several processes all of them call it.
Compare = Callable[[Sequence[Example], Teacher | None, Sequence[int]], ComparedTokens]
Flags = list[bool]


@torch.no_grad()
def compare_batches(
    student: nn.Module,
    batches: Sequence[Batch],
    teacher: Teacher | None,
    stop_ids: Sequence[int],
    device: torch.device,
) -> ComparedTokens:
    """Compares a student with a teacher in this process in micro-batches; returns their record.

    `student` is a `Student`, or what wraps one. Without a teacher its half alone is known. All
    `stop_ids` are one action: that a model ends counts, and not by which of them.
    """
    merged_ids = torch.tensor(stop_ids, device=device)
    objective = Compared(None if teacher is None else teacher.head(), merged_ids)
    reward = create("log_ratio")
    records = []
    for batch in batches or [collate([])]:
        own = batch.to(device)
        own = own if teacher is None else with_teacher(own, teacher)
        records.append(student(own, objective, reward, 0.0)[1])
    return ComparedTokens.cat(records)


class Judge(Protocol):
    """A teacher that judges completions."""

    @property
    def estimate(self) -> str:
        """Returns EXACT or SAMPLED, which the reverse KL is."""

    def compared(self, examples: Sequence[Example], stop_ids: Sequence[int]) -> ComparedTokens:
        """Returns the record of the examples' tokens; all processes call it, each with its own."""


@dataclass(frozen=True)
class LocalJudge:
    """A teacher in this process: both models are compared over the whole vocabulary."""

    teacher: Teacher
    compare: Compare
    offload_from: torch.device | None = None  # as for `LocalTeacher`
    estimate: str = EXACT

    def compared(self, examples: Sequence[Example], stop_ids: Sequence[int]) -> ComparedTokens:
        if self.offload_from is None:
            return self.compare(examples, self.teacher, stop_ids)
        self.teacher.to(self.offload_from)
        try:
            return self.compare(examples, self.teacher, stop_ids)
        finally:
            self.teacher.to("cpu")


@dataclass(frozen=True)
class ServedJudge:
    """A teacher on servers, which tells the log-prob of a token and the most probable token.

    The reverse KL is estimated from the tokens: E[ln p - ln t] over tokens of the student's own
    distribution is the reverse KL. A teacher's log-prob of minus infinity counts as NO_LOG_PROB.
    `together` makes a failure in one process one in all.
    """

    server: ServerTeacher
    compare: Compare
    together: Callable[[], AbstractContextManager[object]] = nullcontext
    estimate: str = SAMPLED

    def compared(self, examples: Sequence[Example], stop_ids: Sequence[int]) -> ComparedTokens:
        found = self.compare(examples, None, stop_ids)
        with self.together():
            scores = self.server.greedily(examples, stop_ids)
        order = {example.rollout.key: number for number, example in enumerate(examples)}
        log_probs, greedy = found.teacher_log_probs.clone(), found.teacher_greedy.clone()
        for key, tokens in token_places(found).items():
            own = scores[order[key]]
            log_probs[tokens] = own.log_probs.nan_to_num(neginf=NO_LOG_PROB)
            greedy[tokens] = own.greedy
        return replace(
            found,
            teacher_log_probs=log_probs,
            teacher_greedy=greedy,
            reverse_kl=found.student_log_probs - log_probs,
        )


def any_alone(flags: Flags) -> list[Flags]:
    """Returns the flags of all processes where there is only this one."""
    return [flags]


@dataclass(frozen=True)
class Judges:
    """The teachers of a run, by the domain of a prompt, and how processes agree.

    `gather` returns the flags of all processes. `informed` returns examples as the teachers read
    them, those that they can read.
    """

    judges: Mapping[str, Judge]
    gather: Callable[[Flags], list[Flags]] = any_alone
    together: Callable[[], AbstractContextManager[object]] = nullcontext
    informed: Callable[[Sequence[Example]], list[Example]] = list

    @property
    def estimate(self) -> str:
        """Returns EXACT if every teacher compares exactly, else SAMPLED."""
        exact = all(judge.estimate == EXACT for judge in self.judges.values())
        return EXACT if exact else SAMPLED

    def sums(
        self, examples: Sequence[Example], stop_ids: Sequence[int]
    ) -> "dict[tuple[int, int], Sums]":
        """Returns what is known of each example, by the key of its completion."""
        found: dict[tuple[int, int], Sums] = {}
        with self.together():
            examples = self.informed(examples)
        for domain, judge in self.judges.items():
            own = [example for example in examples if example.prompt.domain == domain]
            record = judge.compared(own, stop_ids)
            for key, tokens in token_places(record).items():
                found[key] = Sums.of(record, tokens)
        return found

    def any_process(self, flags: Flags) -> Flags:
        """Returns, for each place, whether any process has a true flag there."""
        return [any(place) for place in zip_longest(*self.gather(flags), fillvalue=False)]


@dataclass(frozen=True)
class Sums:
    """The sums over a completion's judged tokens."""

    tokens: int = 0
    reverse_kl: float = 0.0
    agreement: int = 0
    teacher_log_prob: float = 0.0

    @classmethod
    def of(cls, record: ComparedTokens, tokens: Tensor) -> "Sums":
        """Sums up the tokens of a record at these places."""
        agreeing = record.greedy[tokens] == record.teacher_greedy[tokens]
        return cls(
            len(tokens),
            record.reverse_kl[tokens].double().sum().item(),
            int(agreeing.sum()),
            record.teacher_log_probs[tokens].double().sum().item(),
        )


def token_places(record: ComparedTokens) -> dict[tuple[int, int], Tensor]:
    """Returns the key of each completion of a record -> the places of its tokens, in order."""
    keys = torch.stack([record.prompt_indices, record.sample_indices], 1)
    if not len(keys):
        return {}
    found, counts = keys.unique_consecutive(dim=0, return_counts=True)
    places = torch.arange(len(keys)).split(counts.tolist())
    pairs = zip(found.tolist(), places, strict=True)
    return {(prompt, sample): own for (prompt, sample), own in pairs}


@dataclass
class DivergenceEvaluation:
    """The evaluation of one student on prompts, or on every `stride`-th of them from `first` on.

    `folder`/divergence.jsonl holds the rows; divergence.settings.json what they are about, in which
    `models` names student and teacher. Raises UsageError if the folder holds other rows.
    """

    prompts: Sequence[Prompt]
    settings: DivergenceSettings
    folder: Path
    models: Mapping[str, str]
    share: tuple[int, int] = (0, 1)
    rows: list[JudgedRow] = field(init=False)

    def __post_init__(self) -> None:
        first, stride = self.share
        self.places = range(first, len(self.prompts), stride)
        self.path = self.folder / f"{DIVERGENCE}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        ids = [(p.index, p.prompt_ids, p.teacher_prompt_ids) for p in self.prompts]
        digest = hashlib.sha256(json.dumps([ids, self.share]).encode()).hexdigest()[:16]
        asked = {**self.models, "prompts": digest, "count": len(self.places)}
        claim_rows(
            self.path,
            self.folder / f"{DIVERGENCE}.settings.json",
            asked | asdict(self.settings),
        )
        self.rows = cast(list[JudgedRow], files.recover_jsonl(self.path))

    def run(
        self, subject: Subject, judges: Judges, progress: bool = True, say: Say | None = None
    ) -> list[JudgedRow]:
        """Samples and judges what is missing, and returns all rows of this process.

        progress, say: see `WorkProgress`.
        """
        groups = self._groups()
        done = {(row["id"], row["sample"]) for row in self.rows}
        missing = [not {_key(request) for request in group} <= done for group in groups]
        total = sum(map(len, groups))
        with WorkProgress(DIVERGENCE, total, len(done), progress, say) as shown:
            # A group that any process lacks is judged by all: the student may be sharded.
            for number, wanted in enumerate(judges.any_process(missing)):
                if wanted:
                    group = groups[number] if number < len(groups) else []
                    found = list(self._judged(group, subject, judges))
                    new = [r for r in found if (r["id"], r["sample"]) not in done]
                    with judges.together():
                        self._append(new)
                    shown.advance(len(new), sum(row["length"] for row in new))
        return self.rows

    def _groups(self) -> list[list[Request]]:
        seed = self.settings.seed
        requests = [
            Request(self.prompts[i], i, sample, completion_seed(seed, STEP, i, sample))
            for i in self.places
            for sample in range(self.settings.n)
        ]
        ordered = sorted(requests, key=lambda r: -len(r.prompt_ids))  # stable
        size = self.settings.group_size
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def _judged(
        self, group: Sequence[Request], subject: Subject, judges: Judges
    ) -> Iterator[JudgedRow]:
        """Yields the rows of a group, in the order of its completions."""
        sampling = Sampling(
            max_new_tokens=self.settings.max_new_tokens,
            stop_ids=subject.stop_ids,
            temperature=self.settings.temperature,
        )
        with judges.together():
            rollouts = list(subject.engine.generate(group, sampling)) if group else []
        rollouts.sort(key=lambda r: r.key)
        stops = subject.stop_ids
        made = [make_example(rollout, stops, stops, "semantic") for rollout in rollouts]
        sums = judges.sums([example for example in made if example is not None], stops)
        for rollout in rollouts:
            yield judged_row(rollout, sums.get(rollout.key, Sums()), subject.tokenizer)

    def _append(self, found: Sequence[JudgedRow]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in found))
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot write a completion ({error.strerror}); {len(self.rows)} are "
                "kept: free some space and run the same command again"
            ) from error
        self.rows += found


def _key(request: Request) -> tuple[str, int]:
    """Returns the id and the sample of the row that answers a request."""
    return str(request.prompt.index), request.sample_index


def judged_row(rollout: Rollout, sums: Sums, tokenizer: PreTrainedTokenizerBase) -> JudgedRow:
    """Returns the line of a completion."""
    id, sample = _key(rollout.request)
    stop = rollout.completion_ids[-1] if rollout.stopped else None
    return {
        "id": id,
        "sample": sample,
        "completion": tokenizer.decode(rollout.completion_ids, skip_special_tokens=True),
        "length": len(rollout.completion_ids),
        "stop": None if stop is None else tokenizer.convert_ids_to_tokens(stop),
        "tokens": sums.tokens,
        "reverse_kl": sums.reverse_kl,
        "agreement": sums.agreement,
        "teacher_log_prob": sums.teacher_log_prob,
    }
