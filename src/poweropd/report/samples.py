"""Completions of a report, each token with the colour of its reward."""

from dataclasses import dataclass

from poweropd.report.distributions import counts
from poweropd.report.runs import RecordedRun
from poweropd.runs.bins import NUM_VALUES, ZERO_BIN, quantile
from poweropd.runs.files import JsonObject

LEVELS = 4  # shades on either side of zero
WORST = 3  # tokens with the lowest rewards, which are named below a completion

_QUANTILE = 0.95


@dataclass(frozen=True)
class Token:
    """A token as text; `level` is from -LEVELS to LEVELS, or None if it was not trained."""

    text: str
    level: int | None
    hint: str


@dataclass(frozen=True)
class Sample:
    run: str
    step: int
    number: int  # the prompt's number in its step, from 1
    prompt: str
    tokens: list[Token]
    ending: str
    lowest: list[Token]


def scale(run: RecordedRun) -> float:
    """Returns the |reward| of the strongest colour: the 95% quantile of those not near 0."""
    cells = counts(run, "reward").sum(0)
    magnitudes = [0] * NUM_VALUES
    for place, count in enumerate(cells.tolist()):
        if place != ZERO_BIN:
            magnitudes[max(place, NUM_VALUES - 1 - place)] += count
    found = quantile(magnitudes, _QUANTILE)
    return found if found > 0 else 1.0


def samples(run: RecordedRun) -> list[Sample]:
    """Returns the completions that were kept at the first and at the last step with any."""
    kept = run.rewards.completions.to_pylist()
    shown = {kept[0]["step"], kept[-1]["step"]} if kept else set()
    strongest = scale(run)
    return [_marked_sample(run.name, row, strongest) for row in kept if row["step"] in shown]


def _marked_sample(name: str, row: JsonObject, strongest: float) -> Sample:
    columns = (row["pieces"], row["rewards"], row["teacher_log_probs"], row["student_log_probs"])
    tokens = [_token(*values, strongest) for values in zip(*columns, strict=True)]
    trained = [(r, t) for r, t in zip(row["rewards"], tokens, strict=True) if r is not None]
    lowest = [token for _, token in sorted(trained, key=lambda pair: pair[0])[:WORST]]
    left = row["length"] - len(tokens)
    ending = "stopped by itself" if row["stopped"] else "cut off at the length limit"
    ending += f"; {left} more tokens are not kept" if left else ""
    said = f"{row['length']} tokens, {ending}"
    number = row["prompt_index"] + 1
    return Sample(name, row["step"], number, row["prompt"], tokens, said, lowest)


def _token(
    text: str, reward: float | None, teacher: float | None, student: float | None, strongest: float
) -> Token:
    if reward is None:
        return Token(text, None, "not trained")
    share = max(-1.0, min(1.0, reward / strongest))
    hint = f"reward {reward:+.4g}, ln t {teacher:.3g}, ln p {student:.3g}"
    return Token(text, round(LEVELS * share), hint)
