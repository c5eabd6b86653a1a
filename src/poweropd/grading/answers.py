"""Finds the answer that a completion gives: a box, else a stated answer, else the last number.

The search works on plain text in time linear in the completion: every pattern either reads a
character a bounded number of times or looks at a part of bounded length, and no pattern goes back
over a run of characters that it has read. A test holds it to that.
"""

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

#: The last-number search looks at this many characters from the end, which bounds its cost.
_TAIL = 4_000
_MOST_BOXES = 32
#: So many of the last statements are tried, of which each may turn out to state nothing.
_MOST_STATEMENTS = 32

_SPECIAL_TOKEN = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|end_of_text)\|>|</s>")
_CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")  # GSM8K's annotations, 9*2=<<9*2=18>>18
_BLANKS = re.compile(r"[^\S\n]{3,}")
_BLANK_LINES = re.compile(r"\n{3,}")
_BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])\s*")
_BARE_BOX = re.compile(r"[^\s$\\{},;]+|\\[A-Za-z]+(?:\{[^{}]*\})*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
#: A word after a bare `\boxed` speaks of the command; it is not in the box: "in \boxed form".
_PROSE = re.compile(r"[a-z]{2,}[:!?]?|an?(?=\s+[A-Za-z])|[-.:;!?*_)\]\"'`]*")
_FORGOTTEN_BRACE = re.compile(r"[^$\n]*?(?=\$|\\\]|\\\)|\n)")

_STATED = re.compile(
    # GSM8K's marks, but neither headings (#### Step 2) nor the A: that opens a worked solution.
    r"(?<!\#)\#{4,}+[ \t]*(?=[^A-Za-z\s\#])(?!\d+[.)][ \t]+\S)"
    r"|^[ \t*]*A[ \t]*:[ \t*]*(?=[-$\\(.\d][^\n]{0,40}$)"
    r"|\bfinal[ ](?:result|solution|value)[^.\n:=]{0,40}?(?:\bis\b|:|=)"
    r"|\banswers?\b[^.\n:=$\\]{0,60}?(?:\bis\b|\bare\b|\bwas\b|\bbe\b|\bequals\b|:|=)"
    r"|\banswer\b[ \t*#]*$"
    r"|答案\s*[是为为:：]+",
    re.IGNORECASE | re.MULTILINE,
)
#: Text that runs on after its answer invents the next question, whose answer is not wanted.
_NEXT_QUESTION = re.compile(
    r"^[ \t>*#]*+(?:(?:next|new|another)[ ])?(?:question|problem|exercise|instruction|user|human|Q)"
    r"(?:[ ]?\d{1,4})?[ \t*]*+:",
    re.IGNORECASE | re.MULTILINE,
)
_STATED_FILLER = re.compile(
    r"[\s*_:>\"']*(?:(?:thus|therefore|simply|just|approximately|about|around|roughly|exactly|indeed"
    r"|equal to|given by|option|choice|that|then|hence|now|also|clearly|only)\b[\s*_:,]*)*",
    re.IGNORECASE,
)
_HOPE = re.compile(r"I hope (?:it|this) is correct.*", re.IGNORECASE | re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?](?=[\s*\"')\]]|$)(?<!\bno\.)(?<!\bRs\.)", re.IGNORECASE)
AFTERTHOUGHT = re.compile(
    r",?\s+(?:because|since|as|so|which|where|when|if|for|after|not|but|rather)\b.*", re.DOTALL
)
_CLAUSE = re.compile(r".*(?:\b(?:is|are|be|equals|was|were)\b|:)\s*", re.IGNORECASE | re.DOTALL)

# A dollar opens mathematics only if no space follows it, and closes it only if no space stands
# before it and no digit after it, so that prices in running text are not taken for formulas.
# A formula ends at its first closing mark for good (atomic), so that nothing reads it twice.
_SPAN = (
    r"(?>\$\$.{1,1500}?\$\$|\\\[.{1,1500}?\\\]|\\\(.{1,1500}?\\\)"
    r"|(?<![\\\d])\$(?![\s$])(?:\\\$|[^$\n]){1,1500}?(?<![\s\\])\$(?!\d)"
    r"|(?<![\\\d])\$ (?![\d.,]+ [a-z])(?:\\\$|[^$\n]){1,1500}? \$(?!\d)"
    r"|(?<![\\\d])\$(?=\\[a-z])(?:\\\$|[^$\n]){1,1500}?\$(?!\d))"
)
_PERCENT = r"\s*(?:\\?%|percent(?:age)?\b|pct\b)"
_CURRENCY = r"(?:\\?\$|[€£¥₹]|Rs\.?\s?)"
_DECIMAL = (
    r"(?:[1-9]\d{0,2}(?:(?:,|\{,\}|,?\\!|\\,)\s?\d{3}(?!\d))+|[1-9]\d{0,2}(?: \d{3}(?!\d))+|\d+)"
    r"(?:\.\d+|,\d{1,2}(?![\d,]))?|\.\d+"
)
_POINT = r"[(\[]\s?-?[\d./]+(?:\s?,\s?-?[\d./]+)+\s?[)\]]"
_NUMBER = (
    r"-?\s?\\[dtc]?frac\s*\{-?\d+\}\s*\{-?\d+\}"
    rf"|(?<![A-Za-z\d_^.\\{{])(?:-\s?)?{_CURRENCY}?\s?-?(?:{_DECIMAL})(?:[eE][+-]?\d+)?"
    r"(?:\s?[:/]\s?-?\d+(?:\.\d+)?|\s\d+/\d+)?"
)
_QUANTITY = re.compile(rf"(?:{_SPAN}|{_POINT}|{_NUMBER})(?:{_PERCENT})?", re.DOTALL)
_CONNECTOR = r"\s*(?:,?\s*\\?\b(?:and|or)\b|,|;)\s*"
_QUANTITIES = re.compile(
    rf"(?:{_QUANTITY.pattern})(?:{_CONNECTOR}(?:{_QUANTITY.pattern}))*", re.DOTALL
)
_LAST = re.compile(rf"(?:{_SPAN})(?:{_CONNECTOR}(?:{_SPAN}))+|{_QUANTITY.pattern}", re.DOTALL)
_UNIT_WORDS = re.compile(r"(?:\s*-?[A-Za-z]{1,20}\b|\s*[/^²³\d]){0,6}")
_SEPARATOR = re.compile(r"\b(?:and|or)\b|[,;]")
_EXPRESSION_GOES_ON = re.compile(r"\s*(?:[-+*/^=(<>]|\\[a-z])")
#: Words before a number: a sentence about the answer rather than the answer.
_PHRASE = re.compile(
    r"(?=.*[\d$])\W*(?:\$[^$]*\$|[A-Za-z']+)(?:\s+(?:\$[^$]*\$|[A-Za-z']{2,})){1,}"
)


@dataclass(frozen=True)
class Extraction:
    """What a completion answers.

    answer: the answer as written, or None if there is none.
    joined: neighbouring boxes (`\\boxed{1}` and `\\boxed{2}`) as a list, for golds that are lists.
    whole: the untrimmed text the answer was taken from, for golds that are sentences.
    """

    answer: str | None
    joined: str | None = None
    whole: str | None = None


class Box(NamedTuple):
    """A `\\boxed` command with its content; it covers the text from `start` to before `end`.

    The content of a box that is cut off by the end of the text is None.
    """

    start: int
    end: int
    content: str | None


def extract(completion: str) -> Extraction:
    """Returns the answer of a completion; nothing after an empty last box means there is none."""
    text = final_part(completion)
    boxes = _boxes(text)
    closed = [box for box in boxes if box.content is not None]
    if closed and closed[-1].content:
        return Extraction(closed[-1].content, joined=_joined(text, closed))
    if closed:  # The answer may follow an empty box, as in "put into \\boxed{}, it is 5".
        text = text[closed[-1].end :]
    elif boxes:
        # The completion ends inside its only box, which may therefore hold half a number.
        return Extraction(None)
    return _stated(text) or Extraction(_last_quantity(text[-_TAIL:]), whole=text.strip())


def boxed(text: str) -> str | None:
    """Returns the content of a text's last boxes, or None: for golds that are worked solutions."""
    boxes = [box for box in _boxes(text) if box.content is not None]
    return (_joined(text, boxes) or boxes[-1].content) if boxes else None


def final_part(completion: str) -> str:
    """Removes thinking, calculator annotations, what follows an end token, and invented questions.

    A question is invented if it comes after an answer.
    """
    _, tag, answer = completion.rpartition("</think>")
    text = answer if tag and answer.strip() else completion
    pieces = _SPECIAL_TOKEN.split(text)
    text = _CALCULATOR.sub("", next((piece for piece in pieces if piece.strip()), ""))
    text = _BLANK_LINES.sub("\n\n", _BLANKS.sub(" ", text))
    answered = [match.end() for pattern in (_STATED, _BOX) if (match := pattern.search(text))]
    invented = _NEXT_QUESTION.search(text, min(answered)) if answered else None
    return text[: invented.start()] if invented else text


def _boxes(text: str) -> list[Box]:
    """Returns the last boxes in the order of the text; those that are never closed have no content.

    Commands in mid-sentence that hold no box ("in \\boxed form") are left out.
    """
    matches = deque(_BOX.finditer(text), maxlen=_MOST_BOXES)
    closings = _closings(text, matches[0].end()) if matches else {}
    found = [_read_box(text, match.start(), match.end(), closings) for match in matches]
    # The outer one of two nested boxes has the inner one's command in its content.
    inner = [box for box in found if box and not (box.content and _BOX.search(box.content))]
    return inner or [box for box in found if box][-1:]


def _closings(text: str, start: int) -> dict[int, int]:
    """Returns the place of each opening brace after `start` with the place of its closing one."""
    closings: dict[int, int] = {}
    opened: list[int] = []
    for place in _BRACES.finditer(text, start):
        if place.group() == "{":
            opened.append(place.start())
        elif place.group() == "}" and opened:
            closings[opened.pop()] = place.start()
    return closings


def _read_box(text: str, start: int, opening: int, closings: Mapping[int, int]) -> Box | None:
    """Reads the box whose content begins at `opening`, in braces or bare; None if there is none."""
    if opening == len(text):
        return Box(start, opening, None)
    if text[opening] != "{":
        bare = _BARE_BOX.match(text, opening)
        if bare is None or _PROSE.fullmatch(bare.group()):
            return None
        return Box(start, bare.end(), bare.group().rstrip("."))
    if opening in closings:
        return Box(start, closings[opening] + 1, text[opening + 1 : closings[opening]].strip())
    # The brace was forgotten if the formula or its line ends; otherwise the completion is cut off.
    ended = _FORGOTTEN_BRACE.match(text, opening + 1)
    return Box(start, ended.end(), ended.group().strip()) if ended else Box(start, opening, None)


def _joined(text: str, boxes: list[Box]) -> str | None:
    """Joins the last box and the different ones listed just before it; None if it stands alone."""
    group = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box.end : group[0].start]
        listed = len(between) < 10 or (len(between) < 70 and _SEPARATOR.search(between))
        if not listed or box.content in [other.content for other in group]:
            break
        group.insert(0, box)
    return ", ".join(box.content or "" for box in group) if len(group) > 1 else None


def _stated(text: str) -> Extraction | None:
    """Returns the answer after the last "the answer is" that has one; None if there is none."""
    text = _HOPE.sub("", text)
    for match in reversed(deque(_STATED.finditer(text), maxlen=_MOST_STATEMENTS)):
        filler = _STATED_FILLER.match(text, match.end())
        start = filler.end() if filler else match.end()
        tail = text[start : start + _TAIL]
        if not tail.strip() or _opens_a_solution(tail):
            continue
        whole = tail.split("\n\n" if tail[:2] in ("$$", "\\[") else "\n", 1)[0].strip()
        return Extraction(_refine(tail, whole), whole=whole)
    return None


def _opens_a_solution(tail: str) -> bool:
    """Returns whether "Answer:" only introduces the work: a sentence with more lines after it."""
    line, _, rest = tail.lstrip().partition("\n")
    return bool(rest.strip()) and len(line.split()) > 4 and not _QUANTITIES.match(tail)


def _refine(tail: str, line: str) -> str | None:
    """Returns the answer in the line that follows "the answer is".

    That is the quantities with which the line begins, else the end of a clause, else its text.
    """
    sentence = _first_sentence(line)
    quantities = _QUANTITIES.match(tail)
    if quantities:
        end = quantities.end()
        rest = _SENTENCE_END.split(tail[end:].split("\n", 1)[0], maxsplit=1)[0]
        # What follows may belong to the answer: the other half of an expression, or units.
        attached = rest and not rest[0].isspace() and rest[0] not in "*,;:)\"'"
        if attached or _EXPRESSION_GOES_ON.match(rest):
            return _trim(sentence)
        units = _UNIT_WORDS.match(rest)
        unit = units.group() if units and not AFTERTHOUGHT.match(" " + rest.strip()) else ""
        return _trim(tail[:end] + unit)
    if _PHRASE.match(sentence):
        clause = _CLAUSE.match(sentence)
        end_of_clause = sentence[clause.end() :] if clause else sentence
        return _last_quantity(end_of_clause) or _last_quantity(sentence) or _trim(end_of_clause)
    return _trim(sentence)


def _first_sentence(line: str) -> str:
    return AFTERTHOUGHT.sub("", _SENTENCE_END.split(line, maxsplit=1)[0])


def _trim(text: str) -> str | None:
    return text.strip().strip("*_").strip().rstrip(".,;:").strip() or None


def _last_quantity(text: str) -> str | None:
    matches = list(_LAST.finditer(text))
    return _trim(matches[-1].group()) if matches else None
