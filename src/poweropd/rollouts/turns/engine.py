"""Sampling of several turns: the student writes, its partner answers, and it goes on.

The completion is the whole conversation behind the prompt. What the partner says is part of it, in
the form of the chat template, and is masked.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from poweropd.config import Config
from poweropd.config.rollouts import ENVIRONMENT
from poweropd.data.messages import Turn
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Request, Rollout, TurnCounts
from poweropd.rollouts.base import RolloutEngine, Sampling
from poweropd.rollouts.turns.calls import reader_of
from poweropd.rollouts.turns.partners import (
    EnvironmentPartner,
    Partner,
    ToolPartner,
    environment_class,
)
from poweropd.rollouts.turns.template import TurnWriter, tool_turn
from poweropd.rollouts.turns.tools import ERROR, Toolbox, tool_schemas


@dataclass
class Episode:
    """One completion on its way through its turns."""

    request: Request
    partner: Partner
    room: int  # tokens that it may still have
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    knows_log_probs: bool = True
    counts: TurnCounts = TurnCounts(0)
    waiting: Sequence[Callable[[], Turn]] = ()  # for the messages behind the last turn

    def next_request(self) -> Request:
        """Returns the request of the next turn, whose randomness is its own."""
        request, turn = self.request, self.counts.turns
        prompt = replace(request.prompt, prompt_ids=request.prompt_ids + self.ids)
        seed = turn_seed(request.seed, turn) if turn else request.seed
        return replace(request, prompt=prompt, seed=seed, max_new_tokens=self.room)

    def hear(self, turn: Rollout) -> bool:
        """Adds a turn of the student; returns whether it came to its end within the room."""
        length = min(len(turn.completion_ids), self.room)  # an engine may know no limits
        own = turn.completion_mask or [True] * len(turn.completion_ids)
        self.knows_log_probs &= bool(turn.sampling_log_probs)
        log_probs = turn.sampling_log_probs or [0.0] * length
        self._add(turn.completion_ids[:length], log_probs[:length], own[:length])
        self.counts = replace(self.counts, turns=self.counts.turns + 1)
        return turn.stopped and length == len(turn.completion_ids)

    def say(self, messages: Sequence[Turn], ids: list[int]) -> bool:
        """Adds messages, masked; returns whether there is room for another turn behind them."""
        tools = [turn for turn in messages if turn["role"] == "tool"]
        failed = sum(str(turn["content"]).startswith(ERROR) for turn in tools)
        self.counts = replace(
            self.counts,
            tool_calls=self.counts.tool_calls + len(tools),
            tool_errors=self.counts.tool_errors + failed,
        )
        if len(ids) >= self.room:
            return False
        self._add(ids, [0.0] * len(ids), [False] * len(ids))
        return True

    def _add(self, ids: list[int], log_probs: list[float], mask: list[bool]) -> None:
        self.ids += ids
        self.log_probs += log_probs
        self.mask += mask
        self.room -= len(ids)

    def rollout(self, stopped: bool) -> Rollout:
        """Returns the whole completion; `stopped` says that nothing cut it off."""
        return Rollout(
            self.request,
            self.ids,
            self.log_probs if self.knows_log_probs else [],
            stopped,
            self.mask,
            turns=replace(self.counts, reward=self.partner.reward()),
        )


class TurnsEngine:
    """Samples conversations by an engine that samples single turns.

    `partner(prompt)` makes the other side of a conversation. Results do not depend on which
    completions are sampled together, nor on who ends first, if the partner's do not.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        writer: TurnWriter,
        partner: Callable[[Prompt], Partner],
        max_turns: int,
    ) -> None:
        self.engine, self.concurrent = engine, engine.concurrent
        self.writer, self.partner, self.max_turns = writer, partner, max_turns

    def sync(self) -> None:
        self.engine.sync()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        """Yields completions as their conversations end.

        One that its partner would go on with, but for `max_turns` or for room, counts as cut off.
        """
        going_on = [
            Episode(request, self.partner(request.prompt), sampling.of(request).max_new_tokens)
            for request in requests
        ]
        for turn in range(1, self.max_turns + 1):
            answered = []
            for episode, text in self._turns(going_on, sampling):
                episode.waiting = () if text is None else episode.partner.submit(text)
                if episode.waiting and turn < self.max_turns:
                    answered.append(episode)
                else:
                    yield episode.rollout(text is not None and not episode.waiting)
            going_on = []
            for episode in answered:
                messages = [wait() for wait in episode.waiting]
                if episode.say(messages, self.writer.ids(messages)):
                    going_on.append(episode)
                else:
                    yield episode.rollout(stopped=False)
            if not going_on:
                return

    def _turns(
        self, episodes: Sequence[Episode], sampling: Sampling
    ) -> Iterator[tuple[Episode, str | None]]:
        """Samples a turn of each episode; yields it with the text, None of one that was cut off."""
        asked = {episode.request.key: episode for episode in episodes}
        longest = replace(sampling, max_new_tokens=max(e.room for e in episodes))
        for turn in self.engine.generate([e.next_request() for e in episodes], longest):
            episode = asked[turn.key]
            ended = episode.hear(turn)
            yield episode, self.writer.tokenizer.decode(turn.completion_ids[:-1]) if ended else None


@dataclass(frozen=True)
class Turns:
    """How a recipe's conversations go on behind a turn of the student."""

    writer: TurnWriter
    partner: Callable[[Prompt], Partner]
    max_turns: int
    check: Callable[[], None]  # raises UsageError if the partners are not ready

    @classmethod
    def of(
        cls,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        left_out: Collection[int] = (),
    ) -> "Turns | None":
        """Returns the turns of a recipe for a model; None if it has single turns.

        left_out: ids that its models do not share. Raises UsageError for tools or an environment
        that cannot be used, or a chat template that takes no messages of theirs.
        """
        section, data = config.rollout, config.data
        if not section.has_turns or data.chat is None:
            return None
        writer = TurnWriter(tokenizer, data.chat, stop_ids, system=data.system, left_out=left_out)
        named = section.environment
        if named is None:
            writer.check("rollout.tools", tool_turn("tool", ""))
            reader, toolbox = reader_of(writer, section.tool_format), Toolbox.of(section)
            tools = ToolPartner(toolbox, reader, tool_schemas(section.tool_names) or [])
            return cls(writer, lambda prompt: tools, section.max_turns, toolbox.check)
        writer.check("rollout.environment", {"role": "user"})
        rewarded = section.task_reward is not None and section.task_reward.name == ENVIRONMENT
        kind = environment_class(named, rewarded)
        partner = partial(EnvironmentPartner, named, kind)
        return cls(writer, partner, section.max_turns, lambda: None)

    def around(self, engine: RolloutEngine) -> TurnsEngine:
        """Returns an engine of conversations around one of single turns."""
        self.check()
        return TurnsEngine(engine, self.writer, self.partner, self.max_turns)


def turn_seed(seed: int, turn: int) -> int:
    """Returns a 63-bit seed for turn `turn`, from 1 on, of the completion with a seed."""
    digest = hashlib.blake2b(f"{seed}/turn {turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
