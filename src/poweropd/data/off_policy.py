"""Completions from a file, which are trained on beside those that the student samples.

A row says which prompt it completes, by the number of the prompt's row or by the prompt itself, and
how: as text, or as token ids with the log-probs of what sampled them.
"""

import logging
import math
import random
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from poweropd.data.chat import encode_chat
from poweropd.data.messages import Conversation
from poweropd.data.prompts import Prompt, RowReader
from poweropd.data.rollout import Request, Rollout
from poweropd.data.sources import Row, column_names, placed_rows, text_at
from poweropd.errors import UsageError, shown

if TYPE_CHECKING:  # they take a second to import
    from transformers import PreTrainedTokenizerBase

    from poweropd.config import Config
    from poweropd.config.data import DataConfig

logger = logging.getLogger("poweropd")

KEY = "rollout.off_policy"
ROUNDING = 1e-3  # by which a log-prob may be above 0


@dataclass(frozen=True)
class Completion:
    """One completion of a file; the log-probs are [] if nothing is to be weighted by them."""

    ids: list[int]
    log_probs: list[float]
    stopped: bool  # whether the last id is a stop token


@dataclass(frozen=True)
class AllowedTokens:
    """What a completion may hold: the student's tokens, of which stop ids end it."""

    tokenizer: "PreTrainedTokenizerBase"
    size: int  # how many ids there are
    stop_ids: Sequence[int]  # the student's own first
    unshared: Collection[int]  # ids that are not the same token to all models

    def check(self, place: str, ids: Sequence[int]) -> None:
        """Raises UsageError unless the ids make a completion that a model could have sampled."""
        inner = next((i for i in ids[:-1] if i in self.stop_ids), None)
        unknown = next((i for i in ids if not 0 <= i < self.size), None)
        foreign = next((i for i in ids if i in self.unshared), None)
        if not ids:
            raise UsageError(f"{place}: expected a completion of at least one token, got none")
        if unknown is not None:
            raise UsageError(
                f"{place}: completion_ids: expected ids of the student's {self.size} tokens, got "
                f"{unknown}"
            )
        if foreign is not None:
            raise UsageError(
                f"{place}: its completion holds {self._name(foreign)}, which is not the same token "
                "to student and teacher"
            )
        if inner is not None:
            raise UsageError(
                f"{place}: its completion holds the stop token {self._name(inner)} before its end: "
                "cut it there; a text is given one at its end unless stopped is false"
            )

    def _name(self, token: int) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(token)} (id {token})"


class OffPolicy:
    """Completions by the row of their prompt, and which of a step's are among them.

    `share` of all completions are taken from here, as far as a step's prompts have any.
    """

    def __init__(
        self, completions: Mapping[int, Sequence[Completion]], share: float, seed: int
    ) -> None:
        self.completions, self.share, self.seed = completions, share, seed

    def rollouts(
        self, step: int, requests: Sequence[Request], max_new_tokens: int
    ) -> Iterator[Rollout]:
        """Yields the rollouts of a step that are not sampled, cut where a sampled one would be.

        requests: those of the step over all processes. They and the step alone decide.
        """
        done, now = (round(self.share * len(requests) * count) for count in (step, step + 1))
        known = [request for request in requests if request.prompt.index in self.completions]
        drawn = sorted(known, key=lambda request: random.Random(request.seed).random())
        for request in drawn[: now - done]:
            found = self.completions[request.prompt.index]
            # The samples of a prompt are different completions as long as there are as many.
            first = random.Random(f"{self.seed}/{step}/{request.prompt_index}")
            one = found[(first.randrange(len(found)) + request.sample_index) % len(found)]
            whole = len(one.ids) <= max_new_tokens
            yield Rollout(
                request,
                one.ids[:max_new_tokens],
                one.log_probs[:max_new_tokens],
                one.stopped and whole,
                off_policy=True,
            )


def load_off_policy(
    config: "Config", prompts: Sequence[Prompt], tokens: AllowedTokens
) -> OffPolicy:
    """Reads `rollout.off_policy.file`, without the rows of prompts that are not among `prompts`.

    Completions that are weighted need log-probs; others lose theirs. Raises UsageError, naming file
    and line, for a row that cannot be trained on, and if no row is left.
    """
    data, section = config.data, config.rollout.off_policy
    assert section is not None, "the recipe has no rollout.off_policy"
    weighted = config.objective.kind == "sampled" and section.weights == "truncated"
    rows = list(placed_rows(section.file))
    places = _prompt_rows(rows, data, prompts, tokens.tokenizer)
    found = defaultdict[int, list[Completion]](list)
    for (place, row), own in zip(rows, places, strict=True):
        completion = completion_of(place, row, tokens, weighted)
        for index in own:
            found[index].append(completion)
    left_out = sum(not own for own in places)
    if not found:
        raise UsageError(
            f"{KEY}.file: none of the {len(rows)} rows of {section.file} completes a prompt of "
            f"{data.prompts} that is trained on: expected the number of its row under row, counted "
            "from 0, or the same prompt"
        )
    logger.info(
        "%s: %d completions of %d of %d prompts%s",
        *(KEY, len(rows) - left_out, len(found), len(prompts)),
        f"; {left_out} of prompts that are not trained on are left out" if left_out else "",
    )
    return OffPolicy(dict(found), section.share, config.train.seed)


def _prompt_rows(
    rows: Sequence[tuple[str, Row]],
    data: "DataConfig",
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
) -> list[list[int]]:
    """Returns, for each row of the file, the rows of the prompts that it completes."""
    trained = {prompt.index for prompt in prompts}
    reading = defaultdict[tuple[int, ...], list[int]](list)  # the same ids -> rows
    for prompt in prompts:
        reading[(*prompt.prompt_ids,)].append(prompt.index)
    reader = RowReader(data)
    asked: dict[int, Conversation] = {}
    found: list[list[int]] = [[] for _ in rows]
    for number, (place, row) in enumerate(rows):
        if "row" not in row:
            asked[number] = reader.student_prompt(place, row)
            continue
        index = row["row"]
        if type(index) is not int or index < 0:
            raise UsageError(f"{place}: row: expected the number of a row, got {shown(index)}")
        found[number] = [index] if index in trained else []
    encoded = encode_chat(tokenizer, [*asked.values()], data.chat, data.system)
    for number, ids in zip(asked, encoded, strict=True):
        found[number] = reading.get((*ids,), [])
    return found


def completion_of(place: str, row: Row, tokens: AllowedTokens, weighted: bool) -> Completion:
    """Returns the completion of a row; raises UsageError, naming its place, for a bad one."""
    if "completion_ids" in row:
        ids = row["completion_ids"]
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise UsageError(f"{place}: completion_ids: expected a list of ids, got {shown(ids)}")
        stopped = bool(ids) and ids[-1] in tokens.stop_ids
    elif "completion" in row:
        text = text_at(place, row, "completion", allow_empty=True)
        stopped = row.get("stopped", True)
        if not isinstance(stopped, bool):
            raise UsageError(f"{place}: stopped: expected true or false, got {shown(stopped)}")
        ids = [*tokens.tokenizer(text, add_special_tokens=False)["input_ids"]]
        ids += tokens.stop_ids[:1] if stopped else []
    else:
        raise UsageError(
            f"{place}: expected a text under completion, or completion_ids; its columns are "
            f"{column_names(row)}"
        )
    tokens.check(place, ids)
    return Completion(ids, _sampler_log_probs(place, row, len(ids)) if weighted else [], stopped)


def _sampler_log_probs(place: str, row: Row, count: int) -> list[float]:
    """Returns the sampler's log-probs of a row with `count` ids."""
    found = row.get("sampling_log_probs")
    if found is None or "completion_ids" not in row:
        raise UsageError(
            f"{place}: expected completion_ids and sampling_log_probs, by which {KEY}.weights="
            "truncated weights tokens; without them set it to none, which trains with a bias"
        )
    if not isinstance(found, list) or len(found) != count:
        got = f"{len(found)}" if isinstance(found, list) else shown(found)
        raise UsageError(f"{place}: sampling_log_probs: expected {count}, one for an id, got {got}")
    for value in found:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -math.inf < value <= ROUNDING:
            raise UsageError(
                f"{place}: sampling_log_probs: expected log-probs of at most 0, got {shown(value)}"
            )
    return [float(value) for value in found]
