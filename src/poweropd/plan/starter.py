"""Writes the commented recipe for what a survey has found."""

import io
import math
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from ruamel.yaml import YAML

from poweropd.data.chat import encode_chat
from poweropd.errors import UsageError
from poweropd.models import loading
from poweropd.plan.survey import Survey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS, FEWEST_NEW_TOKENS = 512, 32
MEASURED = 256  # prompts whose tokens are counted
LARGEST_HOLDOUT = 200
EPOCHS, STEPS = 3, 500  # three rounds through few prompts, at most so many steps of many
#: Rows of a file from which a step has so many prompts.
PROMPTS_PER_STEP = ((2000, 32), (500, 16), (0, 8))


@dataclass(frozen=True)
class Models:
    """The two models of a recipe; `server` is the URL of a teacher that is served."""

    student: str
    teacher: str
    server: str | None = None


def write_recipe(
    path: Path,
    found: Survey,
    models: Models,
    split: str = "train",
    system: str | None = None,
    test: str | None = None,
) -> None:
    """Writes a recipe; raises UsageError if the models do not fit each other or the prompts.

    test: a file with the same columns, on whose gold answers the student is measured.
    """
    if path.exists():
        raise UsageError(f"{path}: it exists already: name another file with --out, or delete it")
    tokenizer = loading.load_tokenizer(models.student)
    if models.server is None:
        loading.check_vocabularies(tokenizer, loading.load_tokenizer(models.teacher))
    if test is not None and found.answer is None:
        raise UsageError(
            f"--test: {found.source} has no column of gold answers that is known by its name; "
            "write the benchmark into the recipe (docs/evaluation.md)"
        )
    context = loading.context_length(loading.load_config(models.student))
    longest = _longest_prompt(found, tokenizer, system)
    room = max(FEWEST_NEW_TOKENS, min(MAX_NEW_TOKENS, context // 2, context - longest))
    values: dict[str, Any] = {
        "name": path.name,
        "student": models.student,
        "teacher": models.teacher,
        "server": models.server,
        "split": split,
        "system": system,
        "has_template": bool(tokenizer.chat_template),
        "longest": longest,
        "max_new_tokens": room,
        "filter_longer": longest + room > context,
        "test": test,
        "test_name": None if test is None else Path(test).name.partition(".")[0],
    }
    fields = {key: value for key, value in vars(found).items() if key != "prompts"}
    text = _template().render(**fields, **values, **_amounts(found.count))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _template() -> jinja2.Template:
    source = files("poweropd.plan").joinpath("starter.yaml.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    environment.filters["tojson"] = _quoted
    return environment.from_string(source)


def _quoted(value: object) -> str:
    """Returns a text as YAML reads it, in quotes only where it needs them."""
    yaml = YAML()
    yaml.width = 10_000
    out = io.StringIO()
    yaml.dump([value], out)
    return out.getvalue().removeprefix("- ").rstrip("\n")


def _longest_prompt(found: Survey, tokenizer: "PreTrainedTokenizerBase", system: str | None) -> int:
    """Returns the tokens of the longest of the first prompts."""
    chat: dict[str, Any] | None = {} if tokenizer.chat_template else None
    prompts = [replace(prompt, tools=None) for prompt in found.prompts[:MEASURED]]
    return max(map(len, encode_chat(tokenizer, prompts, chat, system)))


def _amounts(count: int) -> dict[str, Any]:
    """Returns how many prompts are held out and trained on, for so many rows."""
    holdout = min(LARGEST_HOLDOUT, max(1, count // 5))
    per_step = next(n for rows, n in PROMPTS_PER_STEP if count >= rows)
    steps = math.ceil(EPOCHS * (count - holdout) / per_step)
    few = steps <= STEPS
    share = STEPS * per_step / max(1, count - holdout)
    about = f"{steps} steps" if few else f"{share:.2g} epochs"
    return {
        "holdout": holdout,
        "prompts_per_step": per_step,
        "epochs": EPOCHS if few else None,
        "steps": STEPS,
        "about": about,
    }
