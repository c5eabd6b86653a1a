"""Finds the answer a completion gives: the last box, else a stated answer, else the last number.

Plain text work in time linear in the completion, since it runs in the caller's own process, before
any worker that could be killed.
"""

import re
from dataclasses import dataclass

#: The last-number search looks at this many characters from the end, which bounds its cost.
_TAIL = 4_000
_MOST_BOXES = 32

_SPECIAL_TOKEN = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|end_of_text)\|>|</s>")
_CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")  # GSM8K's annotations, 9*2=<<9*2=18>>18
_BLANKS = re.compile(r"[^\S\n]{3,}")
_BLANK_LINES = re.compile(r"\n{3,}")
_BLANKS = re.compile(r"[^\S\n]{3,}")
_BLANK_LINES = re.compile(r"\n{3,}")
_BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])\s*")
_BARE_BOX = re.compile(r"[^\s$\\{},;]+|\\[A-Za-z]+(?:\{[^{}]*\})*")

_STATED = re.compile(
    # GSM8K's marks, but neither headings (#### Step 2) nor the A: that opens a worked solution.
    r"\#{4,}[ \t]*(?=[^A-Za-z\s\#])(?!\d+[.)][ \t]+\S)"
    r"|^[ \t*]*A[ \t]*:[ \t*]*(?=[-$\\(.\d][^\n]{0,40}$)"
    r"|\bfinal[ ](?:result|solution|value)[^.\n:=]{0,40}?(?:\bis\b|:|=)"
    r"|\banswers?\b[^.\n:=$\\]{0,60}?(?:\bis\b|\bare\b|\bwas\b|\bbe\b|\bequals\b|:|=)"
    r"|\banswer\b[ \t*#]*$"
    r"|答案\s*[是为为:：]+",
    re.IGNORECASE | re.MULTILINE,
)
_STATED_FILLER = re.compile(
    r"[\s*_:>\"']*(?:(?:thus|therefore|simply|just|approximately|about|around|roughly|exactly|indeed"
    r"|equal to|given by|option|choice|that|then|hence|now|also|clearly|only)\b[\s*_:,]*)*",
    re.IGNORECASE,
)
_HOPE = re.compile(r"I hope (?:it|this) is correct.*", re.IGNORECASE | re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?](?=[\s*\"')\]]|$)(?<!\bno\.)(?<!\bRs\.)", re.IGNORECASE)
_AFTERTHOUGHT = re.compile(
    r",?\s+(?:because|since|as|so|which|where|when|if|for|after|not|but|rather)\b.*", re.DOTALL
)
_CLAUSE = re.compile(r".*(?:\b(?:is|are|be|equals|was|were)\b|:)\s*", re.IGNORECASE | re.DOTALL)

# A dollar opens mathematics only where no space follows it, and closes it only where no space
# stands before it and no digit after: so prices in running text are not taken for formulas.
_SPAN = (
    r"\$\$.{1,1500}?\$\$|\\\[.{1,1500}?\\\]|\\\(.{1,1500}?\\\)"
    r"|(?<![\\\d])\$(?![\s$])(?:\\\$|[^$\n]){1,1500}?(?<![\s\\])\$(?!\d)"
    r"|(?<![\\\d])\$ (?![\d.,]+ [a-z])(?:\\\$|[^$\n]){1,1500}? \$(?!\d)"
    r"|(?<![\\\d])\$(?=\\[a-z])(?:\\\$|[^$\n]){1,1500}?\$(?!\d)"
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


@dataclass(frozen=True)
class Extraction:
    """What a completion answers.

    answer: the answer as written, or None where there is none.
    joined: neighbouring boxes (`\\boxed{1}` and `\\boxed{2}`) as a list, for golds that are lists.
    whole: the untrimmed text the answer was taken from, for golds that are sentences.
    """

    answer: str | None
    joined: str | None = None
    whole: str | None = None


def extract(completion: str) -> Extraction:
    """The answer of a completion. An empty last box is no answer, whatever stood before it."""
    text = _final_part(completion)
    boxes = _boxes(text)
    if boxes:
        content = boxes[-1][2]
        return Extraction(content or None, joined=_joined(text, boxes))
    if _BOX.search(text):
        return Extraction(None)  # its only box is cut short: what stands in it may be half a number
    stated = _stated(text)
    if stated is not None:
        return stated
    return Extraction(_last_quantity(text[-_TAIL:]), whole=text.strip())


def boxed(text: str) -> str | None:
    """The content of the last boxes of a text, or None: for golds given as worked solutions."""
    boxes = _boxes(text)
    return (_joined(text, boxes) or boxes[-1][2]) if boxes else None


def _final_part(completion: str) -> str:
    """Without reasoning in think tags, what follows an end token, or calculator annotations."""
    _, tag, answer = completion.rpartition("</think>")
    text = answer if tag and answer.strip() else completion
    pieces = _SPECIAL_TOKEN.split(text)
    text = next((piece for piece in pieces if piece.strip()), "")
    text = _CALCULATOR.sub("", text)
    # Long runs of blanks would make the searches below quadratic.
    return _BLANK_LINES.sub("\n\n", _BLANKS.sub(" ", text))


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """The last boxes as (start, end, content), in order; those never closed are left out."""
    found = []
    for match in list(_BOX.finditer(text))[-_MOST_BOXES:]:
        content = _box_content(text, match.end())
        if content is not None:
            end, inside = content
            found.append((match.start(), end, inside.strip()))
    # A box within a box: the outer one has the inner's command in its content.
    return [box for box in found if not _BOX.search(box[2]) or box is found[-1]]


def _box_content(text: str, start: int) -> tuple[int, str] | None:
    if text[start : start + 1] != "{":
        bare = _BARE_BOX.match(text, start)
        return (bare.end(), bare.group().rstrip(".")) if bare else None
    depth = 0
    for place in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(place.group(), 0)
        if depth == 0:
            return start + place.end(), text[start + 1 : start + place.start()]
    # Never closed: a forgotten brace where the formula or line ends, else a completion cut short.
    ended = re.compile(r"[^$\n]*?(?=\$|\\\]|\\\)|\n)").match(text, start + 1)
    return (ended.end(), ended.group()) if ended else None


def _joined(text: str, boxes: list[tuple[int, int, str]]) -> str | None:
    """The last box and the different ones listed just before it, or None if it stands alone."""
    group = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box[1] : group[0][0]]
        listed = len(between) < 10 or (len(between) < 70 and _SEPARATOR.search(between))
        if not listed or box[2] in [other[2] for other in group]:
            break
        group.insert(0, box)
    return ", ".join(box[2] for box in group) if len(group) > 1 else None


def _stated(text: str) -> Extraction | None:
    """The last statement of an answer that is followed by one."""
    text = _HOPE.sub("", text)
    for match in reversed(list(_STATED.finditer(text))):
        filler = _STATED_FILLER.match(text, match.end())
        tail = text[filler.end() if filler else match.end() :][:_TAIL]
        if not tail.strip() or _opens_a_solution(tail):
            continue
        whole = tail.split("\n\n")[0].strip() if tail[:2] in ("$$", "\\[") else _line(tail)
        return Extraction(_refine(tail, whole), whole=whole)
    return None


def _opens_a_solution(tail: str) -> bool:
    """Whether "Answer:" only introduces the work: a sentence, with more lines after it."""
    line, _, rest = tail.lstrip().partition("\n")
    return bool(rest.strip()) and len(line.split()) > 4 and not _QUANTITIES.match(tail)


def _line(text: str) -> str:
    return text.split("\n", 1)[0].strip()


def _refine(tail: str, line: str) -> str | None:
    """The answer in the line after "the answer is": quantities, else a clause's end, else text."""
    quantities = _QUANTITIES.match(tail)
    if quantities:
        end = quantities.end()
        rest = _SENTENCE_END.split(tail[end:].split("\n", 1)[0], maxsplit=1)[0]
        # What follows may belong to it: an expression's other half, or units.
        if rest and not rest[0].isspace() and rest[0] not in "*,;:)\"'":
            return _trim(_sentence(line))
        if re.match(r"\s*(?:[-+*/^=(<>]|\\[a-z])", rest):
            return _trim(_sentence(line))
        units = _UNIT_WORDS.match(rest)
        unit = units.group() if units and not _AFTERTHOUGHT.match(" " + rest.strip()) else ""
        return _trim(tail[:end] + unit)
    sentence = _sentence(line)
    if _PHRASE.match(sentence):
        clause = _CLAUSE.match(sentence)
        end_of_clause = sentence[clause.end() :] if clause else sentence
        return _last_quantity(end_of_clause) or _last_quantity(sentence) or _trim(end_of_clause)
    return _trim(sentence)


#: Words before a number: a sentence about the answer rather than the answer.
_PHRASE = re.compile(
    r"(?=.*[\d$])\W*(?:\$[^$]*\$|[A-Za-z']+)(?:\s+(?:\$[^$]*\$|[A-Za-z']{2,})){1,}"
)


def _sentence(line: str) -> str:
    return _AFTERTHOUGHT.sub("", _SENTENCE_END.split(line, maxsplit=1)[0])


def _trim(text: str) -> str | None:
    return text.strip().strip("*_").strip().rstrip(".,;:").strip() or None


def _last_quantity(text: str) -> str | None:
    last = None
    for match in _LAST.finditer(text):
        last = match
    return _trim(last.group()) if last else None
