"""The grader `json`: a completion that must parse, and equal the gold."""

import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future

from poweropd.grading import rules
from poweropd.grading.grader import Grade, Grader
from poweropd.grading.graders.base import Asked, Plain, graded

_FENCED = re.compile(r"```[ \t]*(?:json|JSON)?[ \t]*\n(.*?)```", re.DOTALL)
_OPENS = re.compile(r"[{\[]")
_MOST_PLACES = 64  # of opening brackets at which parsing is tried
_UNREADABLE = (ValueError, RecursionError)  # also integers of too many digits


class JsonAnswer(Plain):
    """Parses the completion's JSON: the whole text, its last fenced block, or the last in prose.

    keys: compares these keys of the two objects alone, and gives each a score of its own. Numbers
    are equal by value, texts if they are the same; the order of keys does not matter.
    """

    expected = "JSON in {}, as text or as a mapping"

    def __init__(self, keys: str | None = None) -> None:
        self.keys = None if keys is None else [k.strip() for k in keys.split(",") if k.strip()]

    def gold(self, value: object, row: Mapping[str, object]) -> object:
        """Returns the value that must be answered; raises ValueError if a key is missing."""
        if value is None:
            raise ValueError("got nothing")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except _UNREADABLE:
                raise ValueError(f"got text that is no JSON: {value!r:.80}") from None
        if self.keys is not None:
            if not isinstance(value, Mapping):
                raise ValueError(f"got {value!r:.80}, which has no keys")
            missing = [key for key in self.keys if key not in value]
            if missing:
                raise ValueError(f"got {', '.join(value)} without {', '.join(missing)}")
            value = {key: value[key] for key in self.keys}
        return value

    def submit(self, workers: Grader, asked: Asked, completion: str) -> "Future[Grade]":
        """Grades at once; text that does not parse has no answer."""
        scores = dict.fromkeys(self.keys or [], 0.0)
        found = next(_values(completion), None)
        if found is None:
            return graded(rules.NO_ANSWER, None, **scores)
        (value,) = found
        if self.keys is None:
            right = same_json(asked.gold, value)
        else:
            gold = asked.gold if isinstance(asked.gold, Mapping) else {}
            given = value if isinstance(value, dict) else {}
            scores = {k: float(k in given and same_json(gold[k], given[k])) for k in self.keys}
            right = all(scores.values())
            value = {key: given[key] for key in self.keys if key in given}
        answer = json.dumps(value, sort_keys=True, ensure_ascii=False)[:2_000]
        return graded(rules.CORRECT if right else rules.WRONG, answer, **scores)


def same_json(gold: object, answer: object) -> bool:
    """Returns whether two JSON values are equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(gold, Mapping) and isinstance(answer, dict):
        return gold.keys() == answer.keys() and all(same_json(gold[k], answer[k]) for k in gold)
    if isinstance(gold, list | tuple) and isinstance(answer, list):
        pairs = zip(gold, answer, strict=False)
        return len(gold) == len(answer) and all(same_json(a, b) for a, b in pairs)
    if isinstance(gold, bool) or isinstance(answer, bool):
        return gold is answer
    return gold == answer


def _values(completion: str) -> Iterator[tuple[object]]:
    """Yields the JSON values that a completion holds, the likeliest answer first.

    A value stands in a tuple, for it may be null.
    """
    _, tag, rest = completion.rpartition("</think>")
    text = (rest if tag and rest.strip() else completion).strip()
    for part in (text, *reversed(_FENCED.findall(text))):
        try:
            yield (json.loads(part),)
        except _UNREADABLE:
            continue
    values, end = [], 0
    for tried, place in enumerate(_OPENS.finditer(text)):
        if tried == _MOST_PLACES:
            break
        if place.start() < end:  # within a value that was read
            continue
        try:
            value, end = json.JSONDecoder().raw_decode(text, place.start())
        except _UNREADABLE:
            continue
        values.append((value,))
    yield from reversed(values)
