"""Decodes with slots that are filled again as completions end, so that the batch stays full.

Every slot has a row of one preallocated cache. Column i of a row holds the key and value of the
sequence's token i, whatever the other rows are, and rows end where they end: what is beyond is
masked. A decoding step feeds each row the token that follows its cache.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from poweropd.data.rollout import Request, Rollout
from poweropd.models import loading
from poweropd.models.packed import PackedLinears
from poweropd.rollouts.draws import Sampler

# Widths of attention are multiples of this. The CPU's attention then rounds a row in the same way
# however many masked columns follow it.
WIDTH = 16
# Free slots are filled again once they are this share of all: prompts are then read together.
FREE_SHARE = 1 / 8
# Decoding steps from one look at what has ended to the next, by device. A look makes the host wait
# for a GPU; a step that it comes too late computes rows that have ended.
LOOKS = {"cpu": 1}
LOOKS_OF_OTHERS = 4


def holds_all_tokens(model: PreTrainedModel) -> bool:
    """Tells whether the model's cache is keys and values of all tokens in every layer."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


@dataclass
class View:
    """What a decoding step sees of the cache: the first rows, the first columns."""

    position: Tensor  # [slots], the column of the token that each row is fed next
    rows: Tensor = field(init=False)  # [live]
    width: int = 0

    def show(self, live: int, width: int) -> None:
        """Makes the view one of so many rows and columns."""
        self.rows = torch.arange(live, device=self.position.device)
        self.width = width


class SlotLayer(DynamicLayer):
    """One layer's keys and values of all slots, [slots, heads, columns, head_dim] each."""

    keys: Tensor
    values: Tensor
    is_initialized: bool

    def __init__(self, view: View, columns: int) -> None:
        super().__init__()
        self.view, self.columns = view, columns

    def get_seq_length(self) -> int:
        return self.view.width - 1  # the columns before the token that is fed

    def reserve(self, keys: Tensor, values: Tensor, width: int) -> None:
        """Makes room for `width` columns, of the kind of `keys` and `values`.

        The room at least doubles as it grows, up to the most columns that are needed.
        """
        held = self.keys.shape[2] if self.is_initialized else 0
        if width <= held:
            return
        columns = min(max(width, 2 * held), max(width, self.columns))
        slots = len(self.view.position)

        def grown(old: Tensor | None, like: Tensor) -> Tensor:
            # Zeros: masked columns count nothing, but would count NaN.
            new = like.new_zeros(slots, like.shape[1], columns, like.shape[3])
            if old is not None:
                new[:, :, :held] = old
            return new

        self.keys, self.values = grown(self.keys, keys), grown(self.values, values)
        self.is_initialized = True

    def fill(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes [n, heads, width, head_dim] of prompts into the first columns of `slots`."""
        width = keys.shape[2]
        self.reserve(keys, values, width)
        self.keys[slots, :, :width], self.values[slots, :, :width] = keys, values

    def copy(self, to: Tensor, source: Tensor, width: int) -> None:
        """Copies the first columns of slots to others; a slot may be in both."""
        for buffer in (self.keys, self.values):
            buffer[to, :, :width] = buffer[source, :, :width]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes a token of each row in view and returns all that they may attend to."""
        self.reserve(key_states, value_states, self.view.width)
        rows, width = self.view.rows, self.view.width
        columns = self.view.position[: len(rows)]
        self.keys[rows, :, columns] = key_states.squeeze(2)
        self.values[rows, :, columns] = value_states.squeeze(2)
        return self.keys[: len(rows), :, :width], self.values[: len(rows), :, :width]


@dataclass
class Slot:
    """A slot in use: the completion that is being sampled in its row of the cache."""

    request: Request
    limit: int  # tokens that it may have
    count: int = 0  # its tokens so far

    @property
    def position(self) -> int:
        """Returns the column of the token that it is fed next."""
        return len(self.request.prompt_ids) - 1 + self.count


class ContinuousDecoder:
    """Samples the completions of `requests` in `slots` rows of one cache.

    Rows in use come first. Prompts of equal width are read together, each prompt once: its other
    completions copy its columns. At least `least_width` columns are attended to. The model makes
    its attention's mask from the columns that count, or is given it if `makes_mask`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        packed: PackedLinears,
        sampler: Sampler,
        requests: Sequence[Request],
        slots: int,
        least_width: int = 0,
        makes_mask: bool = False,
    ) -> None:
        self.makes_mask = makes_mask
        self.model, self.packed, self.sampler = model, packed, sampler
        self.device, self.least_width = model.device, least_width
        self.max_tokens = sampler.sampling.max_new_tokens
        self.context = loading.context_length(model.config)
        self.waiting, self.slots = deque(requests), min(slots, len(requests))
        self.rows: list[Slot] = []
        self.held: list[list[int]] = [[] for _ in range(self.slots)]  # the prompt in each slot
        self.steps_per_look = LOOKS.get(self.device.type, LOOKS_OF_OTHERS)
        self._allocate(max(len(r.prompt_ids) + sampler.limit(r) for r in requests))

    @torch.inference_mode()
    def _allocate(self, longest: int) -> None:
        """Makes the buffers of the slots; those of the cache's layers grow as they are used."""
        tokens, zeros = self.max_tokens, partial(torch.zeros, device=self.device)
        self.fed = zeros(self.slots, dtype=torch.int64)  # the token that each row is fed next
        self.count = torch.zeros_like(self.fed)
        self.uniforms = zeros(self.slots, tokens, dtype=torch.float64)
        self.tokens = zeros(self.slots, tokens, dtype=torch.int64)
        self.log_probs = zeros(self.slots, tokens, dtype=torch.float32)
        self.view = View(torch.zeros_like(self.fed))
        self.cache = DynamicCache(config=self.model.config)
        columns = self._width(longest)
        self.layers = [SlotLayer(self.view, columns) for _ in self.cache.layers]
        self.cache.layers = list(self.layers)

    def _width(self, columns: int) -> int:
        """Rounds a number of columns up, within the context."""
        return max(columns, min(-(-columns // WIDTH) * WIDTH, self.context))

    def run(self) -> Iterator[Rollout]:
        """Yields each rollout when it ends."""
        while self.waiting or self.rows:
            free, waiting = self.slots - len(self.rows), len(self.waiting)
            if free and waiting and free >= min(waiting, FREE_SHARE * self.slots):
                self._admit([self.waiting.popleft() for _ in range(min(free, waiting))])
            steps = min(row.limit - row.count for row in self.rows)
            steps = min(steps, self.steps_per_look)
            ended = torch.stack([self._step() for _ in range(steps)]).tolist()
            yield from self._take_ended(ended)

    @torch.inference_mode()
    def _admit(self, requests: Sequence[Request]) -> None:
        """Puts requests into the slots after those in use, their prompts into the cache."""
        first = len(self.rows)
        slots = range(first, first + len(requests))
        holder = {tuple(ids): slot for slot, ids in enumerate(self.held)}
        copies: dict[int, int] = {}
        reads: dict[int, dict[tuple[int, ...], list[int]]] = {}  # width -> prompt -> its slots
        for slot, request in zip(slots, requests, strict=True):
            prompt = tuple(request.prompt_ids)
            if prompt in holder:
                copies[slot] = holder[prompt]
            elif len(prompt) > 1:  # its last token is fed by the first decoding step
                of_width = reads.setdefault(self._width(len(prompt) - 1), {})
                of_width.setdefault(prompt, []).append(slot)
        self._copy(copies, max(len(r.prompt_ids) for r in requests))
        for width, prompts in reads.items():
            self._read(width, prompts)
        self.rows += [Slot(request, self.sampler.limit(request)) for request in requests]
        self.held[first : slots.stop] = [request.prompt_ids for request in requests]
        own = slice(first, slots.stop)
        self.fed[own] = torch.tensor([r.prompt_ids[-1] for r in requests])
        self.view.position[own] = torch.tensor([len(r.prompt_ids) - 1 for r in requests])
        self.count[own] = 0
        self.uniforms[own] = self.sampler.uniforms([r.seed for r in requests])

    def _copy(self, copies: Mapping[int, int], width: int) -> None:
        """Copies columns of the cache, slot -> the slot that they come from."""
        if copies:
            to, source = (torch.tensor([*x], device=self.device) for x in (copies, copies.values()))
            for layer in self.layers:
                if layer.is_initialized:
                    layer.copy(to, source, width)

    def _read(self, width: int, prompts: Mapping[tuple[int, ...], list[int]]) -> None:
        """Computes the keys and values of prompts, less their last token, for all their slots."""
        ids = [[*prompt[:-1], *[0] * (width + 1 - len(prompt))] for prompt in prompts]
        read = DynamicCache(config=self.model.config)
        with self.packed.in_use():
            self.model(
                input_ids=torch.tensor(ids, device=self.device),
                past_key_values=read,
                use_cache=True,
                logits_to_keep=1,
            )
        places = [(i, slot) for i, slots in enumerate(prompts.values()) for slot in slots]
        which, slots = torch.tensor(places, device=self.device).unbind(1)
        for layer, own in zip(self.layers, read.layers, strict=True):
            if own.is_initialized:  # some share the keys and values of another
                layer.fill(slots, own.keys[which], own.values[which])

    @torch.inference_mode()
    def _step(self) -> Tensor:
        """Adds a token to each row; returns which have ended by it, or are damaged, [live] bool."""
        live = len(self.rows)
        width = self._width(max(row.position for row in self.rows) + 2)  # one is masked at least
        width = max(width, min(self.least_width, self.context))
        self.view.show(live, width)
        position, count = self.view.position[:live, None], self.count[:live, None]
        with self.packed.in_use():
            logits = self.model(
                input_ids=self.fed[:live, None],
                attention_mask=self._mask(position, width),
                position_ids=position.clone(),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        numbers = self.uniforms[:live].gather(1, count).squeeze(1)
        tokens, log_probs = self.sampler.draw(logits, numbers)
        self.tokens[:live].scatter_(1, count, tokens[:, None])
        self.log_probs[:live].scatter_(1, count, log_probs[:, None])
        self.fed[:live] = tokens
        position += 1
        count += 1
        for row in self.rows:
            row.count += 1
        return self.sampler.has_ended(tokens, log_probs)

    def _mask(self, position: Tensor, width: int) -> Tensor:
        """Returns which columns each row attends to, or the mask of its attention."""
        attended = torch.arange(width, device=self.device) <= position
        if not self.makes_mask:
            return attended.long()
        # In this form transformers takes a mask as it is, whatever attention it is for.
        mask = torch.zeros(attended.shape, dtype=self.model.dtype, device=self.device)
        mask.masked_fill_(~attended, torch.finfo(mask.dtype).min)
        return mask[:, None, None]

    def _take_ended(self, ended: Sequence[Sequence[bool]]) -> Iterator[Rollout]:
        """Yields the completions that `ended` in the last steps, [steps, live], and frees slots."""
        slots = []
        for slot, (row, flags) in enumerate(zip(self.rows, zip(*ended, strict=True), strict=True)):
            if any(flags) or row.count == row.limit:
                after = flags.index(True) + 1 if any(flags) else len(flags)
                own = slot, slice(row.count - len(flags) + after)
                ids, log_probs = self.tokens[own].tolist(), self.log_probs[own].tolist()
                yield self.sampler.rollout(row.request, ids, log_probs)
                slots.append(slot)
        self._free(slots)

    def _free(self, slots: Sequence[int]) -> None:
        """Frees slots; rows at the end of those in use change places with those before them."""
        live = len(self.rows) - len(slots)
        holes = [slot for slot in slots if slot < live]
        last = [slot for slot in range(live, len(self.rows)) if slot not in slots]
        self._swap([*holes, *last], [*last, *holes])
        for hole, slot in zip(holes, last, strict=True):
            self.rows[hole] = self.rows[slot]
            self.held[hole], self.held[slot] = self.held[slot], self.held[hole]
        del self.rows[live:]

    @torch.inference_mode()
    def _swap(self, to: Sequence[int], source: Sequence[int]) -> None:
        """Moves all that slots hold to other slots."""
        if to:
            width = self.view.width
            self._copy(dict(zip(to, source, strict=True)), width)
            rows = (self.fed, self.view.position, self.count)
            for buffer in (*rows, self.uniforms, self.tokens, self.log_probs):
                buffer[to] = buffer[source]
