"""Decodes chunks of padded completions with whatever cache a model has: the path of any model."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from poweropd.data.rollout import Request, Rollout
from poweropd.models.packed import PackedLinears
from poweropd.rollouts.draws import Sampler


class PaddedDecoder:
    """One chunk of completions, decoded together; a completion that has ended is dropped.

    A prompt of several of them is read once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        packed: PackedLinears,
        sampler: Sampler,
        requests: Sequence[Request],
    ) -> None:
        self.model, self.packed, self.sampler = model, packed, sampler
        self.requests, self.device = requests, model.device
        self.cache = DynamicCache(config=model.config)
        prompts = list(dict.fromkeys(tuple(r.prompt_ids) for r in requests))
        self.input_ids, self.mask = self._left_padded(prompts)
        number = {prompt: i for i, prompt in enumerate(prompts)}
        self.prompts = [number[tuple(r.prompt_ids)] for r in requests]
        self.uniforms = sampler.uniforms([r.seed for r in requests])
        self.limits = [sampler.limit(request) for request in requests]
        self.live = list(range(len(requests)))  # the requests that are still being decoded
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.log_probs: list[list[float]] = [[] for _ in requests]

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Returns [B, T] ids and their mask, 0 on padding."""
        width = max(len(ids) for ids in prompts)
        ids = [[0] * (width - len(p)) + [*p] for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def run(self) -> Iterator[Rollout]:
        """Yields each rollout when it ends."""
        logits = self._logits()
        if len(logits) < len(self.requests):
            logits = self._select(self.prompts, logits)
        for position in range(max(self.limits)):
            tokens, ended = self._draw(logits, position)
            alive = []
            for place, (i, has_ended) in enumerate(zip(self.live, ended, strict=True)):
                if has_ended or position + 1 == self.limits[i]:
                    yield self.sampler.rollout(self.requests[i], self.tokens[i], self.log_probs[i])
                else:
                    alive.append(place)
            if not alive:
                return
            self._continue_with(tokens, alive)
            logits = self._logits()

    @torch.inference_mode()
    def _logits(self) -> Tensor:
        """Returns the logits of each live completion's next token."""
        with self.packed.in_use():
            logits: Tensor = self.model(
                input_ids=self.input_ids,
                attention_mask=self.mask,
                position_ids=(self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.input_ids.shape[1] :],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        return logits

    @torch.inference_mode()
    def _draw(self, logits: Tensor, position: int) -> tuple[Tensor, list[bool]]:
        """Returns the next token of each live completion, and whether it ends with it."""
        tokens, log_probs = self.sampler.draw(logits, self.uniforms[:, position])
        for i, token, log_prob in zip(self.live, tokens.tolist(), log_probs.tolist(), strict=True):
            self.tokens[i].append(token)
            self.log_probs[i].append(log_prob)
        return tokens, self.sampler.has_ended(tokens, log_probs).tolist()

    @torch.inference_mode()
    def _select(self, rows: Sequence[int], tensor: Tensor) -> Tensor:
        """Makes these rows of the cache and the mask the batch; returns those of a tensor, too."""
        keep = torch.tensor(rows, device=self.device)
        # Not `batch_select_indices`, which layers with a recurrent state lack or half do.
        self.cache.reorder_cache(keep)
        self.mask = self.mask[keep]
        return tensor[keep]

    @torch.inference_mode()
    def _continue_with(self, tokens: Tensor, alive: list[int]) -> None:
        """Makes `tokens` the next input; drops all completions but those at positions `alive`."""
        if len(alive) < len(self.live):
            tokens = self._select(alive, tokens)
            self.uniforms = self.uniforms[alive]
            self.live = [self.live[i] for i in alive]
        self.input_ids = tokens[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.live), 1)], dim=1)
