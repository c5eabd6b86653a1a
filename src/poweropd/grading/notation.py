r"""Brings an answer's notation into one form, and reads words, choices and numerals with a base.

This is not a LaTeX parser: formulas stay text here. It settles only what math-verify would misread
(currency, units, thousands commas, degrees, brackets, and plain notation such as `sqrt(3)/2`), so
that `(2, 3)` never equals `[2, 3]` and `10` never equals `1,0`.
"""

import re
from collections.abc import Callable
from functools import lru_cache

from poweropd.grading.brackets import closing, top_level

_GREEK = tuple(
    """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi
    pi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi
    Omega""".split()  # noqa: SIM905
)
_GREEK_LETTERS = "αβγδεϵζηθϑικλμνξπρστυφϕχψωΓΔΘΛΞΠΣΦΨΩ"
_CHARACTERS = str.maketrans(
    {letter: f"\\{name} " for letter, name in zip(_GREEK_LETTERS, _GREEK, strict=True)}
    | {
        "−": "-", "–": "-", "—": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ", "⋅": r"\cdot ",
        "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
        "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "°": r"^\circ ", "√": r"\sqrt ",
        "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "∗": "*",
        "⌈": r"\lceil ", "⌉": r"\rceil ",
        "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
        "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u2009": " ", "\u202f": " ",
        "\t": " ", "\n": " ", "\x0c": r"\f",
    }
)  # fmt: skip

_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣⁱ", "0123456789+-()nxi")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙₓ", "0123456789+-nx")
_SCRIPTS = re.compile(
    f"(?P<raised>[{''.join(map(chr, _RAISED))}]+)|[{''.join(map(chr, _LOWERED))}]+"
)

#: (pattern, replacement), applied in this order.
_WRITTEN: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\s*\.?", ""),
    (r"\\[lr]brace(?![A-Za-z])", lambda m: r"\{" if "l" in m.group() else r"\}"),
    (r"\\(?:display|text|script)style|\\limits|\\phantom\{[^{}]*\}|\\boldsymbol", ""),
    (r",?(?<!\\)\\!\s*(?=\d{3})", ","),
    (r"(?<!\\)\\!", ""),
    (r"(?<=\d)(?:\{?(?<!\\)\\[,;: ]\}?|~|\{[, ]\})+(?=\d{3}(?!\d))", ","),
    (r"\{,\}", ","),
    (r"(?<!\\)\\(?:[,;: ]|q?quad(?![A-Za-z]))|~", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)(?!\d*\})", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d|\\[a-z]+)\s*\{", r"\\frac{\1}{"),
    (r"\\frac\s*(\\[a-z]+)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"\\frac\s+", r"\\frac"),
    (r"(?<![\\A-Za-z])(?=(?:sqrt\s*(?:[\[\d]|[A-Za-z](?![A-Za-z]))|[dt]?frac\s*[{\d]))", r"\\"),
    (
        r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\d+(?:\.\d+)?|[a-zA-Z](?![a-zA-Z])|"
        rf"\\(?:{'|'.join(_GREEK)})(?![A-Za-z]))",
        lambda m: f"\\sqrt{m.group(1) or ''}{{{m.group(2)}}}",
    ),
    (r"(?<![\\A-Za-z])sqrt\s*(?=\{)", r"\\sqrt"),
    (r"\bnp\.(?:arc)?(?=[a-z])", lambda m: "\\" + m.group()[3:]),
    (r"(?<=[\w)}\]])\s*\*\*\s*(?=[\w({\\-])", "^"),
    (r"\*\*|__|`", ""),
    (r"\\(?:geqslant|geq|gte)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\(?:leqslant|leq|lte)(?![A-Za-z])|<=", r"\\le "),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\neq?(?![A-Za-z])|!=", r"\\ne "),
    (r"\\(?:simeq|sim|cong|doteq)(?![A-Za-z])", r"\\approx "),
    (r"==", "="),
    (r"\\union(?![A-Za-z])", r"\\cup "),
    (r"\\langle(?![A-Za-z])|\\lparen(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])|\\rparen(?![A-Za-z])", ")"),
    (r"\\lbrack(?![A-Za-z])", "["),
    (r"\\rbrack(?![A-Za-z])", "]"),
    (r"\\(?:infin|infty)(?![A-Za-z])|\binfinity\b|(?<![A-Za-z])inf(?![A-Za-z])", r"\\infty "),
    (r"\\pi(?=\d)", r"\\pi "),
    (r"\\%\s*|(?<=[\d$}])\s*(?:percent(?:age)?|pct)\b", "%"),
    (r"\\(?:text|mbox)\s*\{\s*(?:percent(?:age)?|pct|\\?%)\s*\}", "%"),
]
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in _WRITTEN]
_DEGREE = r"(?:\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\(?:degree|deg)(?![A-Za-z]))"
#: Commands whose backslash a JSON round trip has doubled; in a matrix, two of them end a row.
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z(])")
_ANGLE = re.compile(rf"(\d+(?:\.\d+)?)\s*{_DEGREE}")
_DEGREES = re.compile(_DEGREE)
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_CURRENCY = re.compile(r"\\?\$|[€£¥₹¢]|\bUSD\b|\bRs\.?(?=\s*\d)")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal|sf|tt|up)?|mbox|hbox|math(?:rm|bf|it|sf|bb)|bf|rm)"
                   r"\s*\{([^{}]*)\}(\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?")  # fmt: skip
_SPACES = re.compile(r"\s+")
LOOSE_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_EDGE = re.compile(r"^[ ,;:!\"']+|^\.(?!\d)|[ .,;:\"']+$|(?<=[A-Za-z]{2})!$")
_INNERMOST_TRIES = 8


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """Brings texts that mean the same, as far as no algebra is needed, to the same text."""
    text = _SCRIPTS.sub(_script, text).translate(_CHARACTERS)
    text = re.sub(r"^\s*\\[(\[](.*)\\[)\]]\s*$", r"\1", text)
    if "\\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _CURRENCY.sub(" ", text)
    text = _from_plain(_without_texts(text))
    if _TRIGONOMETRY.search(text):
        text = _ANGLE.sub(r"(\1\\pi/180)", text)
    text = _DEGREES.sub("", text)
    text = _SPACES.sub(" ", text).strip()
    text = _EDGE.sub("", text)
    for _ in range(_INNERMOST_TRIES):
        if not (text.startswith("{") and closing(text, 0) == len(text) - 1):
            break
        if len(list(top_level(text[1:-1], (",",)))) > 1:
            break  # {1, 2} is a set written without backslashes
        text = _EDGE.sub("", text[1:-1])
    return re.sub(r"^\+(?=[\d.\\])", "", text)


def _script(match: re.Match[str]) -> str:
    """Writes a run of raised or lowered characters as an exponent or an index."""
    raised = match.group("raised")
    inside = raised.translate(_RAISED) if raised else match.group().translate(_LOWERED)
    return ("^" if raised else "_") + (inside if len(inside) == 1 else f"{{{inside}}}")


def key(text: str) -> str:
    """Returns a normalised text without meaningless spaces; equal keys count as equal answers."""
    return LOOSE_SPACE.sub("", normalise(text))


def _without_texts(text: str) -> str:
    r"""Resolves \text{...}: keeps connectors and values, and removes units beside a value."""
    text = re.sub(
        r",?\s*\\(?:text|mbox|textrm|mathrm)\s*\{\s*(and|or)\s*\}", r" \1 ", text, flags=re.I
    )
    outside = _TEXT.sub("", text)
    has_value = re.search(r"[0-9A-Za-z]", re.sub(r"[_^]\s*\{?\s*\}?", "", outside)) is not None

    def resolve(match: re.Match[str]) -> str:
        inside, power = match.group(1).strip(), match.group(2) or ""
        before = text[: match.start()].rstrip(" {")
        subscript = before.endswith(("_", "^"))
        if re.fullmatch(r"\(?[A-Z]\)?|[a-z]|[\W\d]*", inside) or subscript or not has_value:
            return match.group(1) + power
        if re.fullmatch(r"[a-z]{2,6}", inside) and re.match(r"\s*[\\(]", text[match.end() :]):
            return f"\\{inside} {power}"  # \mathrm{arcsin}(x)
        if re.match(r"\s*(?:=|:|\()", text[match.end() :]) or re.search(r"\d", inside):
            return match.group(1)
        return " "

    return _TEXT.sub(resolve, text)


# Plain notation: what people and programs write without LaTeX

#: Name in plain notation -> name in LaTeX, for functions that are written before their argument.
_FUNCTIONS = {name: name for name in (
    "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc",
    "ln", "log", "max", "min",
)} | {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "tg": "tan", "ctg": "cot"} | {
    name: f"operatorname{{{name}}}" for name in ("arcsinh", "arccosh", "arctanh")
}  # fmt: skip
#: Name in plain notation -> what LaTeX writes in the place of its brackets.
_BRACKETED = {
    "sqrt": ("\\sqrt{", "}"), "cbrt": ("\\sqrt[3]{", "}"), "exp": ("e^{", "}"),
    "abs": ("\\lvert ", "\\rvert "), "Abs": ("\\lvert ", "\\rvert "),
    "floor": ("\\lfloor ", "\\rfloor "), "ceil": ("\\lceil ", "\\rceil "),
    "ceiling": ("\\lceil ", "\\rceil "),
}  # fmt: skip
_LETTER_NAMES = "|".join(_GREEK)
_CAPITALS = "|".join(
    name.capitalize() for name in _GREEK if name.islower() and name.capitalize() not in _GREEK
)
_NAMES_LONGEST_FIRST = "|".join(sorted(_FUNCTIONS, key=len, reverse=True))
#: What follows a function's name, unless the name is a word of a sentence.
_ARGUMENT = (
    rf"(?=\s?[(^_{{\\|\d]|\s?(?:{_LETTER_NAMES})(?![A-Za-z])|\s[A-Za-z](?![A-Za-z'])"
    rf"|[xy](?![A-Za-z])|\s(?:{_NAMES_LONGEST_FIRST})(?![A-Za-z]))"
)
#: A word of three letters or more makes the Greek name beside it a word: "beta decay".
_NO_WORD_BEFORE = r"(?<!(?<!\\)[A-Za-z]{3} )"
_NO_WORD_AFTER = rf"(?! (?!(?:{_NAMES_LONGEST_FIRST}|{_LETTER_NAMES}|and|or)\b)[A-Za-z]{{3}})"
_PLAIN: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\\operatorname\*?\s*\{\s*([A-Za-z]+)\s*\}", r" \1 "),
    (r"\+/-|^\+-(?=\s?[\d\\(a-z])", r"\\pm "),
    (r"(?<![A-Za-z\\])(ln|log)\s?(\d+)(?=\s?/\s?(?:ln|log))", r"\1(\2)"),
    (r"(?<![A-Za-z\\])oo(?![A-Za-z])", r"\\infty "),
    (r"(?<=[)\]}])\s*(?:[Uu]|union)\s*(?=[(\[{\\])", r"\\cup "),
    (r"(?<=\d)\s?deg(?:rees?)?(?![A-Za-z])", r"^\\circ "),
    (r"(?<![A-Za-z\\])log_?(\d+)\s?(?=\()", r"\\log_{\1}"),
    # Of these names, min and sec are units, too.
    (r"(?<![A-Za-z\\])(max|min)(?=\()", r"\\\1"),
    (
        rf"(?<![A-Za-z\\])(?!max|min)(?!sec(?!(?:\^\{{?-?\d\}}?)?\s?(?:\(|\\|{_LETTER_NAMES})))"
        rf"({_NAMES_LONGEST_FIRST}){_ARGUMENT}",
        lambda m: f"\\{_FUNCTIONS[m.group(1)]} ",
    ),
    (
        rf"(?<![A-Za-z\\])([a-z])({_NAMES_LONGEST_FIRST})(?=\()",
        lambda m: f"{m.group(1)} \\{_FUNCTIONS[m.group(2)]} ",
    ),
    (r"(?<![A-Za-z\\])pi(?=[rhdnxR](?![A-Za-z])|\d|(?![A-Za-z]))", r"\\pi "),
    (
        rf"(?<![A-Za-z\\])(?<!\d )(psi)(?![A-Za-z])|{_NO_WORD_BEFORE}(?<![A-Za-z\\])(?!psi)"
        rf"({_LETTER_NAMES}|{_CAPITALS})(?![A-Za-z]){_NO_WORD_AFTER}(?=(\d?))",
        lambda m: "\\" + (m.group(1) or _greek(m.group(2))) + (" " if m.group(3) else ""),
    ),
    (r"\^\s?(-?\d{2,}(?:\.\d+)?|-?\d\.\d+|-\s?(?:\d|[a-zA-Z](?![a-zA-Z])))", r"^{\1}"),
    (r"_\s?(\d{2,})", r"_{\1}"),
    # The parser would put the factor after a fraction into its denominator.
    (
        rf"(?<![\w.}})/^])(\d{{1,9}})/(\d{{1,9}}) (?=[a-z](?![A-Za-z])"
        rf"|\\(?:sqrt|{_NAMES_LONGEST_FIRST}|{_LETTER_NAMES})(?![A-Za-z])|sqrt)",
        r"\\frac{\1}{\2} ",
    ),
    (r"(?<![A-Za-z\\])([a-zA-Z]|\d+) choose ([a-zA-Z]|\d+)(?![A-Za-z\d])", r"\\binom{\1}{\2}"),
]
_PLAIN_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in _PLAIN]
_CALL = re.compile(
    rf"(\^?)(?:\\|(?<![A-Za-z\\])([a-z]??))({'|'.join(sorted(_BRACKETED, key=len, reverse=True))}"
    r"|binom(?:ial)?)(\[[^\[\]]*\])?\s?\(|\^\s?\("
)
_FINAL_UNIT = re.compile(
    r"(?<=[\d)}\]A-Za-z]) (?:(?:sq(?:uare)?|cu(?:bic)?)\.? [a-z]+|units?|rad(?:ian)?s?|[cmk]m"
    r"|kg|ft|inch(?:es)?|feet|(?:centi|kilo|milli)?met(?:er|re)s?|seconds?|minutes?|hours?|dollars?)\.?$"
)


def _from_plain(text: str) -> str:
    """Writes plain notation as LaTeX: `sqrt(3)/2`, `2*pi*r`, `sin(2x)`, `e^(2x)`, `theta`."""
    if _is_sentence(text):
        return text
    for pattern, replacement in _PLAIN_REWRITES:
        text = pattern.sub(replacement, text)
    if "\\" in text or "(" in text:
        text = _FINAL_UNIT.sub("", text)
    return _with_braces(text)


def _is_sentence(text: str) -> bool:
    """Returns whether a text is words alone, of which one is no name of plain notation."""
    if words(text) is None:
        return False
    return any(len(w) > 2 and w not in _FUNCTIONS and not _is_greek(w) for w in text.split())


def _is_greek(word: str) -> bool:
    return word in _GREEK or word.lower() in _GREEK


def _greek(name: str) -> str:
    """Returns the command of a Greek letter; Alpha looks like A and has no command of its own."""
    return name if name in _GREEK else name.lower()


def _with_braces(text: str) -> str:
    """Replaces the round brackets of exponents and of functions such as sqrt and floor."""
    start = 0
    while match := _CALL.search(text, start):
        start = match.end()
        end = closing(text, start - 1)
        if end < 0:
            continue
        power, letter, name, index = match.groups()
        if name is None:
            opened, closed = "^{", "}"
        elif name.startswith("binom"):
            parts = list(top_level(text[start:end], (",",)))
            if len(parts) != 2:
                continue
            opened, closed = f"\\binom{{{parts[0]}}}{{", "}"
            start = end - len(parts[1])
        else:
            opened, closed = _BRACKETED[name]
            opened = opened.replace("{", f"{index or ''}{{") if name == "sqrt" else opened
        opened = f"{letter} {opened}" if letter else opened
        if power:
            opened, closed = f"^{{{opened}", closed + "}"
        text = text[: match.start()] + opened + text[start:end] + closed + text[end + 1 :]
        start = match.start() + len(opened)
    return text


# Words, choices, bases

_WORDS = re.compile(r"[A-Za-z][A-Za-z'-]*(?: [A-Za-z'-]+)*")
_ARTICLE = re.compile(r"^(?:the|an?) ", re.IGNORECASE)
_CHOICE = re.compile(r"\(([A-Z])\)(?![A-Za-z0-9(]).*|([A-Z])(?:[.):](?: .*)?)?|([A-Z])\) ?.*")
_BASED = re.compile(r"([0-9A-Fa-f]+)_ ?(?:\{ ?\(?([A-Za-z0-9]+)\)? ?\}|(\d))")
_BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16,
}  # fmt: skip


def words(text: str) -> str | None:
    """Returns a normalised text that is words, one of at least three letters, to be compared."""
    if not _WORDS.fullmatch(text) or max(map(len, text.split())) < 3:
        return None
    return _ARTICLE.sub("", text).casefold()


def choice(text: str) -> str | None:
    """Returns the letter of a multiple-choice answer: C, (C), (C) 12, C. twelve."""
    match = _CHOICE.fullmatch(text)
    return next(letter for letter in match.groups() if letter) if match else None


def based(text: str) -> tuple[str, int] | None:
    """Returns the digits and base of a numeral such as 2516_8; None for any other text."""
    match = _BASED.fullmatch(text)
    if not match:
        return None
    base = match.group(2) or match.group(3)
    number = int(base) if base.isdigit() else _BASES.get(base.casefold())
    return (match.group(1).upper(), number) if number else None
