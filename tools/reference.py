"""Writes docs/configuration.md and docs/recipe.schema.json from the classes of a recipe.

make reference
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from poweropd import rewards
from poweropd.config import Config
from poweropd.config.fields import CUSTOM, MayChange, Section
from poweropd.config.teachers import SelfTeacherConfig, TeachersConfig

DOCS = Path(__file__).parent.parent / "docs"
# Ends the titles of a section's further kinds.
KINDS: dict[type[Section], str] = {
    TeachersConfig: ", several",
    SelfTeacherConfig: ", the student itself",
}

INTRO = """\
# Configuration

Every key of a recipe, with its type, its default and what it means.

This page and [`recipe.schema.json`](recipe.schema.json) are made from the code by `make reference`.
A recipe states only the keys that differ from their defaults. On the command line `key=value`, such
as `train.steps=100` or `data.chat=null`, comes before the recipe's value; the value is YAML.

A key with "yes" under *may change* can have another value when the same command takes up a run that
was stopped. With another value of any other key the run directory is refused.

Editors complete and check recipes by the schema if the first line of a recipe names it, by a path
relative to the recipe or an address:

    # yaml-language-server: $schema=../docs/recipe.schema.json
"""

REWARDS = """\
## Rewards

`reward.name` is one of these, or a function of yours; the parameters stand beside it. t and p are
the probabilities that teacher and student give the sampled token; [objectives.md](objectives.md)
says what each reward does to the gradient. A number may follow a schedule over the optimizer steps,
such as `alpha: {schedule: linear, start: 1.0, end: 5.0, steps: 1000}`. Schedules are
NAMES.
"""

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPES = {"string": "text", "boolean": "`true`, `false`", "null": "`null`", "object": "mapping"}


class WithoutTitles(GenerateJsonSchema):
    """Leaves out the titles of fields, which only repeat their names."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON schema of a recipe."""
    schema = Config.model_json_schema(schema_generator=WithoutTitles)
    return {"$schema": WithoutTitles.schema_dialect, **schema}


def configuration() -> str:
    """Returns the page that describes every key."""
    return "\n".join([INTRO, *sections(Config, "", may_change=False), *reward_table()])


def sections(section: type[Section], prefix: str, may_change: bool) -> Iterator[str]:
    """Yields a table of a section's keys, then those of the sections inside."""
    if prefix:
        title = prefix.removesuffix(".") + KINDS.get(section, "")
        yield f"{'##' if prefix.count('.') == 1 else '###'} {title}\n"
        yield f"{section.__doc__}\n"
        yield "| key | type | default | may change | meaning |\n|---|---|---|---|---|"
        known = recipe_schema()["$defs"][section.__name__]["properties"]
        for name, field in section.model_fields.items():
            changes = "yes" if may_change or MayChange in field.metadata else ""
            yield table_line(
                f"`{name}`", kind(known[name]), default(field), changes, str(field.description)
            )
        yield ""
    for name, field in section.model_fields.items():
        for inner in inner_sections(field.annotation):
            yield from sections(
                inner, f"{prefix}{name}.", may_change or MayChange in field.metadata
            )


def table_line(*cells: str) -> str:
    """Returns one line of a table of Markdown."""
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def inner_sections(annotation: Any) -> Iterator[type[Section]]:
    """Yields the classes of sections in an annotation, such as both of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from inner_sections(argument)


def kind(schema: dict[str, Any]) -> str:
    """Returns in words which values a field's schema allows."""
    if "$ref" in schema:
        return "section"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(kind(one) for one in schema[several])
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "pattern" in schema:
        return f"`{CUSTOM}`"
    if schema["type"] == "array":
        return f"list of {kind(schema['items'])}"
    bounds = [f"{sign} {schema[name]}" for name, sign in BOUNDS.items() if name in schema]
    return " ".join([TYPES.get(schema["type"], schema["type"]), ", ".join(bounds)]).strip()


def default(field: FieldInfo) -> str:
    """Returns a field's default as YAML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def reward_table() -> Iterator[str]:
    """Yields the table of rewards with their parameters."""
    names = ", ".join(f"`{name}`" for name in rewards.SCHEDULES)
    yield REWARDS.replace("NAMES", names)
    yield "| name | reward | parameters |\n|---|---|---|"
    for name, reward in rewards.REWARDS.items():
        kinds = get_type_hints(reward)
        fields = dataclasses.fields(reward)
        parameters = "<br>".join(parameter(field, kinds[field.name]) for field in fields)
        yield table_line(f"`{name}`", str(reward.__doc__).partition("\n")[0], parameters)


def parameter(field: dataclasses.Field[Any], kind: object) -> str:
    """Returns a reward's parameter, of a type, with its default and what it may be."""
    if field.default is dataclasses.MISSING:
        return f"`{field.name}`: a reward, default `{{name: log_ratio}}`"
    values = " or ".join(f"`{value}`" for value in get_args(kind))
    expected = field.metadata.get("expected", values)
    return f"`{field.name}`: {expected}, default `{field.default}`"


def pages() -> dict[Path, str]:
    """Returns what each generated file must hold."""
    return {
        DOCS / "configuration.md": configuration() + "\n",
        DOCS / "recipe.schema.json": json.dumps(recipe_schema(), indent=2) + "\n",
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
