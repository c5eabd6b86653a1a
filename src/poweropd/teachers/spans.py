"""A teacher with another tokenizer than the student: both are compared on spans of the text.

The teacher reads the completion's text in tokens of its own. The text is cut wherever a token of
the student and a token of the teacher end at the same byte. What lies between two cuts is a span:
the smallest piece that both models write in whole tokens. docs/objectives.md has the equations.
"""

import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate, groupby, pairwise, takewhile
from typing import NamedTuple, Self

import torch
from torch import Tensor

from poweropd.data.rollout import Example, Rollout, span_totals
from poweropd.models.token_bytes import REPLACEMENT, TokenBytes
from poweropd.teachers.base import TeacherScorer

logger = logging.getLogger("poweropd")

ESCAPE = "surrogateescape"  # decodes a byte that is no UTF-8 as a code point of its own
_ESCAPED = re.compile("[\udc80-\udcff]")
FEW = 0.5  # share of the trained tokens below which a user is warned


class Spans(NamedTuple):
    """A completion's tokens beside the teacher's tokens of the same text, each with its span.

    Spans are numbered from 0 on, in the order of the text, and there are `number` of them. A token
    with this number is in none.
    """

    student: list[int]
    canonical: list[bool]  # whether the student's tokenizer would have written this token here
    teacher_ids: list[int]
    teacher: list[int]
    number: int

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """Returns the spans of texts, one after the other."""
        parts = [*parts]
        found, first = cls([], [], [], [], sum(part.number for part in parts)), 0
        for part in parts:
            for own, numbers in ((found.student, part.student), (found.teacher, part.teacher)):
                own += [found.number if n == part.number else first + n for n in numbers]
            found.canonical.extend(part.canonical)
            found.teacher_ids.extend(part.teacher_ids)
            first += part.number
        return found


def one_to_one(ids: Sequence[int]) -> Spans:
    """Returns the spans of tokens that stand for one token of the teacher each, `ids`."""
    numbers = [*range(len(ids))]
    return Spans(numbers, [True] * len(ids), [*ids], numbers, len(ids))


def text_spans(student: TokenBytes, teacher: TokenBytes, ids: Sequence[int]) -> Spans:
    """Returns the spans of a text that the student wrote in tokens `ids`.

    A byte that is no UTF-8 is U+FFFD to the teacher. Where the teacher's tokenizer does not give
    the text back, nothing is in a span from there on.
    """
    text, own_ends = _read(student.of(ids))
    teacher_ids = teacher.encode(text)
    pieces = teacher.of(teacher_ids)
    ends = [*accumulate(map(len, pieces))]
    pairs = zip(b"".join(pieces), text.encode(), strict=False)
    matched = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    cuts = sorted({*own_ends} & {end for end in ends if 0 < end <= matched})
    canonical = student.encode(text)
    places = {*_places(canonical, [*accumulate(map(len, student.of(canonical)))])}
    return Spans(
        [bisect_left(cuts, end) for end in own_ends],
        [place in places for place in _places(ids, own_ends)],
        teacher_ids,
        [bisect_left(cuts, end) for end in ends],
        len(cuts),
    )


def _places(ids: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns each token with the bytes between which it stands."""
    return [(i, start, end) for i, (start, end) in zip(ids, pairwise([0, *ends]), strict=True)]


def _read(pieces: Sequence[bytes]) -> tuple[str, list[int]]:
    """Returns the text of tokens' bytes, and where in its UTF-8 bytes each of the tokens ends.

    Each byte that is no UTF-8 becomes U+FFFD, which has more bytes.
    """
    text = b"".join(pieces).decode(errors=ESCAPE)
    wrong = [len(text[: at.end()].encode(errors=ESCAPE)) for at in _ESCAPED.finditer(text)]
    more = len(REPLACEMENT.encode()) - 1
    ends = [end + more * bisect_right(wrong, end) for end in accumulate(map(len, pieces))]
    return _ESCAPED.sub(REPLACEMENT, text), ends


class Aligned(NamedTuple):
    """An example, and what the teacher is to score for it."""

    student: Example  # with `spans`
    teacher: Example  # the same text in the teacher's tokens; each token of a span is a target
    teacher_spans: Tensor  # [m] number of each target's span

    def scored(self, found: Example) -> Example:
        """Returns the student's example with the teacher's scores, given those of its own tokens.

        A span has the sum of its tokens' log-probs. What is known of a single token alone is passed
        on for spans that are one token to both.
        """
        spans = self.student.spans
        assert spans is not None
        assert found.teacher_log_probs is not None
        first = torch.searchsorted(self.teacher_spans, spans)  # each span's first target
        lone = (self.teacher_spans.bincount() == 1) & (spans.bincount() == 1)

        def of_lone(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[first].where(lone[spans], torch.nan)

        totals = span_totals(found.teacher_log_probs, self.teacher_spans)
        return self.student.scored(
            totals[first], of_lone(found.teacher_entropy), of_lone(found.teacher_top1)
        )


class Aligner:
    """Cuts completions into the spans of two tokenizers."""

    def __init__(
        self, student: TokenBytes, teacher: TokenBytes, teacher_stop: int, context: int
    ) -> None:
        """Takes the id with which the teacher ends a turn, and the most tokens that it reads."""
        self.student, self.teacher = student, teacher
        self.teacher_stop, self.context = teacher_stop, context
        self.same = student.vocabulary == teacher.vocabulary
        own, other = student.special, teacher.special
        # Special tokens that both have: the student's id -> the teacher's.
        self.marks = {own[token]: other[token] for token in own.keys() & other.keys()}

    def stop_ids(self, ids: Sequence[int]) -> list[int]:
        """Returns the student's ids of stop tokens of the teacher that the student has, too."""
        own = {other: own for own, other in self.marks.items()}
        return [own[i] for i in ids if i in own]

    def spans(self, ids: Sequence[int], stop_ids: Collection[int]) -> Spans:
        """Returns the spans of a completion; the stop token at its end is the teacher's own.

        A special token that the teacher has, too, is a span; another one counts as its name.
        """
        marks = [self.marks.get(i) for i in ids]
        if ids and ids[-1] in stop_ids:
            marks[-1] = self.teacher_stop
        if self.same:
            pairs = zip(ids, marks, strict=True)
            return one_to_one([own if mark is None else mark for own, mark in pairs])
        parts = []
        for is_text, group in groupby(zip(ids, marks, strict=True), lambda pair: pair[1] is None):
            run = [*group]
            if is_text:
                parts.append(text_spans(self.student, self.teacher, [own for own, _ in run]))
            else:
                parts.append(one_to_one([mark for _, mark in run if mark is not None]))
        return Spans.joined(parts)

    def align(self, example: Example, stop_ids: Collection[int]) -> Aligned | None:
        """Returns an example in spans, without tokens that cannot be compared; None if none can.

        Only spans are trained of which every token is: not written by somebody else, and canonical.
        """
        spans = self.spans(example.rollout.completion_ids, stop_ids)
        room = self.context - len(example.prompt.teacher_prompt_ids)
        positions = example.positions.tolist()
        trained = {i for i in positions if spans.canonical[i]}
        left_out = {spans.number, *spans.teacher[room:]}
        left_out |= {number for i, number in enumerate(spans.student) if i not in trained}
        kept = torch.tensor([spans.student[i] not in left_out for i in positions])
        if not kept.any():
            return None
        numbers = torch.tensor(spans.student)[example.positions[kept]]
        targets = [i for i, number in enumerate(spans.teacher) if number not in left_out]
        ids = torch.tensor(spans.teacher_ids)[targets]
        request, stopped = example.rollout.request, example.rollout.stopped
        rollout = Rollout(request, spans.teacher_ids, [], stopped)
        return Aligned(
            example.kept(kept, dense(numbers)),
            Example(rollout, torch.tensor(targets), ids, ids),
            dense(torch.tensor(spans.teacher)[targets]),
        )


def dense(numbers: Tensor) -> Tensor:
    """Returns increasing numbers renumbered from 0 on, without gaps."""
    return numbers.unique_consecutive(return_inverse=True)[1]


class SpanTeacher:
    """Scores with `teacher`, which reads completions in tokens of its own.

    A completion of which nothing can be compared is left out.
    """

    def __init__(self, teacher: TeacherScorer, aligner: Aligner, stop_ids: Collection[int]) -> None:
        """Takes the teacher's scorer; `stop_ids` are those with which a completion ends."""
        self.teacher, self.aligner, self.stop_ids = teacher, aligner, frozenset(stop_ids)
        self._waiting: list[Aligned] = []
        self._given = self._kept = 0  # tokens
        self._warned = False

    def submit(self, example: Example) -> None:
        aligned = self.aligner.align(example, self.stop_ids)
        self._given += example.num_tokens
        if aligned is not None:
            self._kept += aligned.student.num_tokens
            self.teacher.submit(aligned.teacher)
            self._waiting.append(aligned)

    def collect(self) -> list[Example]:
        waiting, self._waiting = self._waiting, []
        self._warn_of_few()
        pairs = zip(waiting, self.teacher.collect(), strict=True)
        return [aligned.scored(found) for aligned, found in pairs]

    def _warn_of_few(self) -> None:
        """Warns once if most tokens of a step cannot be compared."""
        few = self._kept < FEW * self._given
        if few and not self._warned:
            logger.warning(
                "teacher.align: spans: %d of %d tokens of a step are trained; the others are not "
                "the student's tokenizer's own way to write a text, or the teacher's tokenizer "
                "cannot write it",
                *(self._kept, self._given),
            )
        self._warned |= few
        self._given = self._kept = 0
