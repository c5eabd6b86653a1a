"""A template with tools, and a student whose turns are written down."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tiny_models import TURN_END, make_byte_tokenizer

from poweropd.data.rollout import Request, Rollout
from poweropd.rollouts.base import Sampling
from poweropd.rollouts.turns.template import TurnWriter

#: ChatML with tools in the form of Hermes and Qwen.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER = make_byte_tokenizer(TOOLS)
STOPS = (TURN_END,)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


class Scripted:
    """An engine that writes what `turns(text so far)` says, and has a log-prob for each token."""

    concurrent = False

    def __init__(self, turns: Callable[[str], str]) -> None:
        self.turns, self.asked = turns, list[list[Request]]()

    def sync(self) -> None:
        pass

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        self.asked.append(list(requests))
        for request in sorted(requests, key=lambda r: r.seed):  # in no order of theirs
            ids = [*ids_of(self.turns(TOKENIZER.decode(request.prompt_ids))), TURN_END]
            cut = ids[: sampling.of(request).max_new_tokens]
            log_probs = [log_prob_of(request.seed, place) for place in range(len(cut))]
            yield request.rollout(cut, log_probs, len(cut) == len(ids))


def log_prob_of(seed: int, place: int) -> float:
    """A number that says of which turn and place a token is."""
    digest = hashlib.blake2b(f"{seed} {place}".encode(), digest_size=4).digest()
    return -int.from_bytes(digest, "big") / 2**32


def make_writer(**options: Any) -> TurnWriter:
    return TurnWriter(TOKENIZER, {}, STOPS, **options)
