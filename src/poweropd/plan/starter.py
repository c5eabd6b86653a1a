"""Writes the commented recipe for what a survey has found."""

import io
import math
import re
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jinja2
from ruamel.yaml import YAML

from poweropd.config import Config
from poweropd.config.recipe_file import parse_yaml
from poweropd.data.chat import encode_chat
from poweropd.errors import UsageError
from poweropd.models import loading
from poweropd.models.vocabulary import unshared_ids
from poweropd.plan.survey import Survey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS, FEWEST_NEW_TOKENS = 512, 32
MEASURED = 256  # prompts whose tokens are counted
LARGEST_HOLDOUT, HOLDOUT_SHARE = 200, 5  # prompts, and at most one of so many
EPOCHS, STEPS = 3, 500  # three rounds through few prompts, at most so many steps of many
#: Rows of a file from which a step has so many prompts.
PROMPTS_PER_STEP = ((2000, 32), (500, 16), (0, 8))
NOTES_FROM = 28  # the column in which comments begin


@dataclass(frozen=True)
class Models:
    """The two models of a recipe; `server` is the URL of a teacher that is served."""

    student: str
    teacher: str
    server: str | None = None


def write_recipe(
    path: Path,
    found: Survey,
    tested: Survey | None,
    models: Models,
    split: str = "train",
    system: str | None = None,
) -> None:
    """Writes a recipe; raises UsageError if the models do not fit each other or the prompts.

    tested: problems with gold answers, on which the student is measured.
    """
    if found.count < 2:
        raise UsageError(
            f"{found.source}: expected at least 2 prompts, one to train on and one to measure by, "
            f"got {found.count}"
        )
    tokenizer = loading.load_tokenizer(models.student)
    if models.server is None:
        unshared_ids(tokenizer, loading.load_tokenizer(models.teacher))
    context = loading.context_length(loading.load_config(models.student))
    longest = _longest_prompt(found, tokenizer, system)
    room = max(FEWEST_NEW_TOKENS, min(MAX_NEW_TOKENS, context // 2, context - longest))
    text = _template().render(
        name=path.name,
        found=found,
        tested=tested,
        test_name=None if tested is None else _benchmark_name(tested.source),
        models=models,
        split=split,
        system=system,
        has_template=bool(tokenizer.chat_template),
        longest=longest,
        room=room,
        filter_longer=longest + room > context,
        **_amounts(found.count),
    )
    Config.from_dict(cast(dict[str, object], parse_yaml(text, str(path))), path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _template() -> jinja2.Template:
    source = files("poweropd.plan").joinpath("starter.yaml.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    environment.filters |= {"quoted": _quoted, "noted": _noted}
    return environment.from_string(source)


def _quoted(value: object) -> str:
    """Returns a text as YAML reads it, in quotes only where it needs them."""
    yaml = YAML()
    yaml.width = 10_000
    out = io.StringIO()
    yaml.dump([value], out)
    return out.getvalue().removeprefix("- ").rstrip("\n")


def _noted(text: str, note: str, indented: int = 2) -> str:
    """Returns a line's text, which is indented by so much, with a comment at its right."""
    return f"{text:<{NOTES_FROM - indented - 1}} # {note}"


def _benchmark_name(path: str) -> str:
    """Returns the name of a file of problems as that of a benchmark."""
    return re.sub(r"\W+", "-", Path(path).name.partition(".")[0]).strip("-") or "test"


def _longest_prompt(found: Survey, tokenizer: "PreTrainedTokenizerBase", system: str | None) -> int:
    """Returns the tokens of the longest of the first prompts."""
    chat: dict[str, Any] | None = {} if tokenizer.chat_template else None
    prompts = [replace(prompt, tools=None) for prompt in found.prompts[:MEASURED]]
    return max(map(len, encode_chat(tokenizer, prompts, chat, system)))


def _amounts(count: int) -> dict[str, Any]:
    """Returns how many prompts are held out and trained on, for so many rows."""
    holdout = min(LARGEST_HOLDOUT, max(1, count // HOLDOUT_SHARE))
    per_step = next(n for rows, n in PROMPTS_PER_STEP if count >= rows)
    steps = math.ceil(EPOCHS * (count - holdout) / per_step)
    few = steps <= STEPS
    epochs = STEPS * per_step / (count - holdout)
    return {
        "holdout": holdout,
        "prompts_per_step": per_step,
        "length": f"epochs: {EPOCHS}" if few else f"steps: {STEPS}",
        "about": f"{steps} steps" if few else f"{epochs:.2g} epochs",
    }
