"""How each kind of server is asked for log-probs of given tokens, and how its answers are read.

All of them give log-probs of the full softmax at temperature 1. An answer is used only if it holds
one log-prob for each token that was sent, and of that token.
"""

import math
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar

from poweropd.net import NO_LOG_PROB, Json, JsonClient, read_log_prob, reading

LARGEST_ID = 2**31
#: What a server tells of one context: ids -> log-probs, that of the scored token among them.
Told = dict[int, float]
ROUNDING = 0.01  # by which the probabilities of a context may sum to more than 1
LOWEST_FLOAT = -3.4e38  # llama.cpp writes the lowest float for minus infinity
BIAS = 1e4  # added to a token's logit, which makes it the next token
EVERY_ID = 2**24  # more than any vocabulary has


@dataclass(frozen=True)
class Query:
    """The tokens ids[first:] to score, each in the context of all ids before it."""

    ids: list[int]
    first: int = 1
    top: int = 0  # how many of each context's most probable ids are wanted beside its token
    fresh: bool = False  # whether nothing may come from a prefix cache

    @property
    def targets(self) -> list[int]:
        """Returns the tokens to score."""
        return self.ids[self.first :]

    def last(self, count: int, fresh: bool = False) -> "Query":
        """Returns a query for the last `count` tokens alone."""
        return replace(self, first=max(1, len(self.ids) - count), fresh=fresh)


class Protocol(ABC):
    """What a kind of server is asked through a `JsonClient`."""

    name: ClassVar[str]  # value of `teacher.server_type`
    #: What a user can do whose server gives fewer of the most probable ids than {k}.
    remedy: ClassVar[str] = "lower objective.teacher_top_k"
    #: How many last tokens of a sequence are scored to see whether a server is what it was.
    most_checked: ClassVar[int] = LARGEST_ID

    async def contexts(self, client: JsonClient) -> dict[str, int | None]:
        """Returns the context in tokens of each model served, None where it is not told."""
        return await client.models()

    @abstractmethod
    async def told(self, client: JsonClient, model: str, query: Query, what: str) -> list[Told]:
        """Returns what the server tells of each target; `what` names the query in errors.

        Raises Transient for an answer that is not one, and Refused.
        """

    def reading(self, query: Query) -> AbstractContextManager[None]:
        """Raises Transient if reading an answer to the query goes wrong in the block."""
        return reading(
            f"an answer without one log-prob (teacher.server_type={self.name}) for each of "
            f"{len(query.ids)} tokens"
        )


class Vllm(Protocol):
    """vLLM's /v1/completions, which gives log-probs of the prompt."""

    name = "vllm"
    remedy = "start it with --max-logprobs {k} (vLLM's default is 20), or lower it"

    async def told(self, client: JsonClient, model: str, query: Query, what: str) -> list[Told]:
        body = {
            "model": model,
            "prompt": query.ids,
            "max_tokens": 1,  # vLLM refuses 0
            "temperature": 0,
            "prompt_logprobs": query.top,  # beside the prompt's own tokens
            "return_token_ids": True,
        }
        if query.fresh:
            body["cache_salt"] = uuid.uuid4().hex  # of which nothing is cached
        answer = await client.request("POST", "/v1/completions", body, what)
        with self.reading(query):
            (choice,) = answer["choices"]
            first, *entries = choice["prompt_logprobs"]
            if first is not None or choice["prompt_token_ids"] != query.ids:
                raise ValueError
            if len(entries) != len(query.ids) - 1:
                raise ValueError
            told = entries[query.first - 1 :]
            found = [each[str(i)]["logprob"] for i, each in zip(query.targets, told, strict=True)]
            others = [
                [(int(i), entry["logprob"]) for i, entry in each.items()] if query.top else []
                for each in told
            ]
        return _read_told(query.targets, found, others)


class SGLang(Protocol):
    """SGLang's /generate, which gives log-probs of the prompt from a place on."""

    name = "sglang"

    async def told(self, client: JsonClient, model: str, query: Query, what: str) -> list[Told]:
        body = {
            "input_ids": query.ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": query.first - 1,  # that token's own log-prob is left out
            "top_logprobs_num": query.top,
        }
        if query.fresh:
            body["extra_key"] = uuid.uuid4().hex  # of which nothing is cached
        answer = await client.request("POST", "/generate", body, what)
        with self.reading(query):
            about = answer["meta_info"]
            first, *entries = about["input_token_logprobs"]
            if first[0] is not None or about["prompt_tokens"] != len(query.ids):
                raise ValueError
            if [entry[1] for entry in (first, *entries)] != query.ids[query.first - 1 :]:
                raise ValueError
            found = [entry[0] for entry in entries]
            tops = about["input_top_logprobs"][1:] if query.top else [[]] * len(found)
            others = [[(entry[1], entry[0]) for entry in each] for each in tops]
        return _read_told(query.targets, found, others)


class LlamaCpp(Protocol):
    """llama.cpp's /completion, which gives log-probs of what it generates and not of a prompt.

    So each token is generated on its own, by a bias that the log-probs do not have, after all
    before it, which the server has in its cache.
    """

    name = "llama_cpp"
    most_checked = 16

    async def contexts(self, client: JsonClient) -> dict[str, int | None]:
        """Returns the context of a slot for each model."""
        models = await client.models()
        answer = await client.request("GET", "/props", what="to tell its properties")
        with reading("properties without a context"):
            context = answer["default_generation_settings"]["n_ctx"]
            if type(context) is not int or context < 2:
                raise ValueError
        return dict.fromkeys(models, context)

    async def told(self, client: JsonClient, model: str, query: Query, what: str) -> list[Told]:
        places = range(query.first, len(query.ids))
        return [await self._told(client, query, place, what) for place in places]

    async def _told(self, client: JsonClient, query: Query, place: int, what: str) -> Told:
        """Returns what the server tells of the token at one place.

        It tells nothing of a token that ends within a character. Then the sequence's first token is
        generated there instead, and the server tells of all ids beside it.
        """
        token = query.ids[place]
        found = await self._generated(client, query, place, token, max(1, query.top), what)
        if found is None:
            found = await self._generated(client, query, place, query.ids[0], EVERY_ID, what)
        with self.reading(query):
            if found is None:
                raise ValueError
            own = found[token]
        return _read_told([token], [own], [list(found.items())])[0]

    async def _generated(
        self, client: JsonClient, query: Query, place: int, token: int, top: int, what: str
    ) -> dict[int, Json] | None:
        """Returns ids with their log-probs at a place where `token` is generated, if they are told.

        These are the token and the `top` most probable ids.
        """
        body = {
            "prompt": query.ids[:place],
            "n_predict": 1,
            "n_probs": top,
            "post_sampling_probs": False,
            "logit_bias": [[token, BIAS]],
            "temperature": 0,
            "cache_prompt": not query.fresh,
        }
        answer = await client.request("POST", "/completion", body, what)
        with self.reading(query):
            if answer["tokens_evaluated"] != place or answer["truncated"]:
                raise ValueError
            if "completion_probabilities" not in answer:
                return None
            (made,) = answer["completion_probabilities"]
            if made["id"] != token:
                raise ValueError
            entries = [*made["top_logprobs"], made]
            return {entry["id"]: _with_infinity(entry["logprob"]) for entry in entries}


def _with_infinity(value: Json) -> Json:
    """Returns a log-prob of llama.cpp, with vLLM's sign of minus infinity for its own."""
    return NO_LOG_PROB if isinstance(value, float) and value < LOWEST_FLOAT else value


def _read_told(
    targets: Sequence[int], found: Sequence[Json], others: Sequence[Sequence[tuple[Json, Json]]]
) -> list[Told]:
    """Returns what is told of each target, from its log-prob and pairs of ids and log-probs."""
    with reading("an answer with something that is not a log-prob"):
        told = [
            {i: read_log_prob(value) for i, value in pairs} | {token: read_log_prob(own)}
            for token, own, pairs in zip(targets, found, others, strict=True)
        ]
        for each in told:
            known = all(type(i) is int and 0 <= i < LARGEST_ID for i in each)
            if not known or sum(map(math.exp, each.values())) > 1 + ROUNDING:
                raise ValueError
    return told


def most_probable(told: Told, k: int) -> list[tuple[int, float]]:
    """Returns the k most probable ids of a context with their log-probs, the first one first."""
    return sorted(told.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
