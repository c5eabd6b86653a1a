"""Strategies for hostile values, and the settings with which they are tried."""

import json
import os
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("POWEROPD_FUZZ", "25"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner)
)

# JSON as text, which says more than values do: NaN, 5,000 digits, half of a surrogate pair.

# No number here can be a log-prob, so that no answer can be a right one by chance.
numbers = st.sampled_from(
    [
        *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-1e300", "-9999.5", "007", "1_0"),
        *("0.5", "1", "7", "49", "50", "2.0", "1.0e-2", str(2**63), str(2**64)),
        *("-1" + "0" * 400, "9" * 5000),
    ]
)
strings = st.text(max_size=20).map(json.dumps) | st.sampled_from(
    [
        *('"-0.5"', '"true"', '"9"', '"\\ud800"', '"\\u0000\\u001b[2J"', '"\\u001b]0;a\\u0007"'),
        '"' + "x" * 3000 + '"',
    ]
)
depths = st.sampled_from([30, 200, 900, 960, 990, 50_000])
deep = depths.map(lambda n: "[" * n + "]" * n) | depths.map(lambda n: '{"a":' * n + "1" + "}" * n)
flat = st.sampled_from(["null", "true", "false", "[]", "{}", '""']) | numbers | strings
json_texts = (
    st.recursive(
        flat,
        lambda inner: (
            st.lists(inner, max_size=3).map(lambda found: f"[{','.join(found)}]")
            | st.lists(st.tuples(strings, inner), max_size=3).map(
                lambda found: "{" + ",".join(f"{k}:{v}" for k, v in found) + "}"
            )
        ),
        max_leaves=6,
    )
    | deep
)


@dataclass(frozen=True)
class Change:
    """What is done to one place of a tree, and the JSON text that is put there, if any is."""

    place: int
    way: str
    text: str

    def to(self, tree: Any, mark: str) -> None:
        """Changes the tree, with the mark where the text shall be."""
        places = list(_places(tree))
        if not places:
            return
        container, key = places[self.place % len(places)]
        if self.way == "remove":
            del container[key]
        elif self.way == "replace":
            container[key] = mark
        elif isinstance(container, list):
            container.insert(key, deepcopy(container[key]) if self.way == "again" else mark)
        else:
            container[mark] = container.pop(key) if self.way == "rename" else container[key]


changes = st.lists(
    st.builds(
        Change,
        st.integers(0, 200),
        st.sampled_from(["replace", "replace", "replace", "remove", "again", "rename"]),
        json_texts,
    ),
    min_size=1,
    max_size=3,
)


def _places(tree: Any) -> Any:
    """Every place below a container, as the container and its key or index."""
    found = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    for key, value in found:
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def changed_json(tree: Any, made: list[Change]) -> str:
    """The JSON of a tree after some changes."""
    root = [deepcopy(tree)]
    for number, change in enumerate(made):
        change.to(root, f"MARK{number}")
    text = json.dumps(root)[1:-1]
    for number, change in enumerate(made):
        own = change.text if change.text.startswith('"') else json.dumps(change.text[:40])
        text = text.replace(f'"MARK{number}":', f"{own}:").replace(f'"MARK{number}"', change.text)
    return text
