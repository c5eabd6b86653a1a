"""Tools and environments as a user might write them, the bad ones among them."""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def calculate(expression: str) -> str:
    """
    Calculates sums and products.

    Args:
        expression: Numbers with + and * between them, such as 12+30.
    """
    total = 0
    for product in expression.split("+"):
        value = 1
        for number in product.split("*"):
            value *= int(number)
        total += value
    return str(total)


def misbehave(how: str) -> object:
    """
    Does what no tool should do.

    Args:
        how: What it does.
    """
    return DEEDS[how]()


def meet(folder: str, count: int) -> str:
    """
    Waits until so many calls of it are running.

    Args:
        folder: Where they meet.
        count: How many.
    """
    (Path(folder) / str(os.getpid())).touch()
    while len(os.listdir(folder)) < count:
        time.sleep(0.01)
    return "met"


def _hang() -> object:
    while True:
        time.sleep(0.01)


def _raise() -> object:
    raise LookupError("no such\nthing")


def _print() -> object:
    for _ in range(10):
        sys.stdout.write("x" * 2**20)
        sys.stderr.write("x" * 2**20)
    os.write(1, b"y" * 2**20)
    return "printed"


class Unprintable(Exception):
    """An exception that no other process can be given."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")


def _raise_unprintable() -> object:
    raise Unprintable(1, 2)


DEEDS = {
    "hang": _hang,
    "raise": _raise,
    "raise unprintable": _raise_unprintable,
    "print": _print,
    "return 10 MB": lambda: "z" * 10 * 2**20,
    "end": lambda: os._exit(3),
    "exit": lambda: sys.exit(4),
    "recurse": lambda: misbehave("recurse"),
    "take memory": lambda: str(len(bytearray(64 * 2**30))),
    "return a mapping": lambda: {"sum": 3, "é": [1.5, None]},
    "return nothing": lambda: None,
    "return an object": object,
    "return half a character": lambda: "a\ud800b",
}


def undocumented(number):
    return number


class Doubting:
    """An environment that asks twice whether the student is sure, and rewards what it says last."""

    def reset(self, row: Mapping[str, object]) -> None:
        self.row, self.heard = row, list[str]()

    def step(self, text: str) -> list[dict[str, str]] | None:
        self.heard.append(text)
        if len(self.heard) > 2:
            return None
        return [{"role": "user", "content": f"{len(text)}+{len(self.heard)}=?"}]

    def reward(self) -> float:
        return sum(map(len, self.heard)) / 8


class Raising(Doubting):
    """An environment that fails in its second step."""

    def step(self, text: str) -> list[dict[str, str]] | None:
        if self.heard:
            raise KeyError("no\nsuch")
        return super().step(text)


class Silent(Doubting):
    """An environment whose messages are none."""

    def step(self, text: str) -> Any:
        return [{"role": "user"}]


class Stepless:
    """No environment, since it has no step."""

    def reset(self, row: Mapping[str, object]) -> None:
        pass
