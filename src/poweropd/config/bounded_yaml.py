"""Reads YAML that anybody may have written: bounded, and every mistake is a `UsageError`.

Aliases can make a short text stand for a tree of any size, so a text is measured before anything is
made of it.
"""

import warnings

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    ScalarEvent,
)
from ruamel.yaml.nodes import Node, ScalarNode

from poweropd.errors import UsageError, one_line, shown

MAX_BYTES = 2**18  # of a text
MAX_NODES = 10_000  # keys and values of a tree, those of aliases included
MAX_DEPTH = 50  # collections around a value
CHARACTERS_OF_A_NODE = 1000  # a longer scalar counts as several nodes
LARGEST_INTEGER = 2**63
TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ["str", "int", "float", "bool", "null", "seq", "map"]
}


class _Constructor(RoundTripConstructor):
    """Makes values, and says on which line one is that cannot be made."""

    def construct_object(self, node: Node, deep: bool = False) -> object:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError):
            wanted = str(node.tag).rpartition(":")[2]
            got = shown(node.value) if isinstance(node, ScalarNode) else "something else"
            problem = f"expected a value of type {wanted}, got {got}"
            raise ConstructorError(None, None, problem, node.start_mark) from None
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            problem = f"expected an integer of at most 64 bits, got {shown(node.value)}"
            raise ConstructorError(None, None, problem, node.start_mark)
        return value


def parse_yaml(text: str, where: str, what: str = "not valid YAML") -> object:
    """Returns the value of a YAML text, with line numbers.

    `where` and `what` begin the message of the UsageError that any mistake raises.
    """
    try:
        with warnings.catch_warnings():  # of anchors that are used twice, say
            warnings.simplefilter("ignore")
            _measure(text)
            yaml = YAML(typ="rt")
            yaml.Constructor = _Constructor
            return yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and "\n" in text.rstrip() else ""
        problem = one_line(str(error.problem or error.context))
    except YAMLError as error:  # a character that YAML does not allow
        line, problem = "", one_line(str(error).partition("\n")[0])
    except RecursionError:
        line, problem = "", "nested too deep"
    raise UsageError(f"{where}{line}: {what}: {problem}")


def _measure(text: str) -> None:
    """Raises ConstructorError for a text that stands for too large or too deep a tree."""
    if len(text) > MAX_BYTES:
        raise ConstructorError(problem=f"expected at most {MAX_BYTES} characters")
    sizes: dict[str, int] = {}  # anchor -> nodes below it
    nodes, opened = 0, list[tuple[str | None, int]]()  # the anchor and the nodes before it
    for event in YAML(typ="rt").parse(text):
        problem = None
        if isinstance(event, CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        elif isinstance(event, AliasEvent):
            if event.anchor in (anchor for anchor, _ in opened):
                problem = f"alias {shown(event.anchor)} stands inside of what it names"
            nodes += sizes.get(event.anchor, 1)
        elif isinstance(event, ScalarEvent | CollectionStartEvent):
            opened += [(event.anchor, nodes)] if isinstance(event, CollectionStartEvent) else []
            size = 1
            if isinstance(event, ScalarEvent):
                size += len(event.value) // CHARACTERS_OF_A_NODE
                sizes |= {} if event.anchor is None else {event.anchor: size}
            nodes += size
            if event.tag is not None and str(event.tag) not in TAGS:
                problem = f"unknown type {shown(str(event.tag))}"
        if nodes > MAX_NODES:
            problem = f"expected at most {MAX_NODES} keys and values, with those of aliases"
        if len(opened) > MAX_DEPTH:
            problem = f"nested too deep: expected at most {MAX_DEPTH} levels"
        if problem is not None:
            raise ConstructorError(problem=problem, problem_mark=event.start_mark)
