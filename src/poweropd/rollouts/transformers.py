"""Sampling with a `transformers` model in this process: KV cache, no logits kept.

Each completion draws one uniform number per token from its own generator and takes the token
where the cumulative probability passes it, so a completion does not depend on its neighbours.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from poweropd.data.rollout import Request, Rollout
from poweropd.rollouts.base import Sampling


class TransformersEngine:
    """Samples from `model`, in chunks of at most `batch_size` completions.

    `sync` brings the model up to date with the student; it is a no-op where they are the same
    object. Ids from `vocab_size` on (padded embeddings) are never sampled.
    """

    concurrent = False

    def __init__(
        self,
        model: Any,
        *,
        vocab_size: int,
        batch_size: int = 128,
        sync: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.vocab_size, self.batch_size = model, vocab_size, batch_size
        self._sync = sync

    def sync(self) -> None:
        self._sync()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        # Neighbours of like length need little padding.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), self.batch_size):
                chunk = [requests[i] for i in order[start : start + self.batch_size]]
                yield from _Decoder(self.model, self.vocab_size, chunk, sampling).run()
        finally:
            self.model.train(was_training)


class _Decoder:
    """One chunk of completions, decoded together; rows that have ended are dropped."""

    def __init__(
        self, model: Any, vocab_size: int, requests: Sequence[Request], sampling: Sampling
    ) -> None:
        self.model, self.requests, self.sampling = model, requests, sampling
        self.device, self.vocab_size = model.device, vocab_size
        self.stop_ids = torch.tensor(sampling.stop_ids, device=self.device)
        self.cache = DynamicCache(config=model.config)
        self.input_ids, self.mask = self._left_padded([r.prompt_ids for r in requests])
        self.uniforms = torch.stack([self._uniforms(r.seed) for r in requests]).to(self.device)
        self.rows = list(range(len(requests)))  # which request each live row belongs to
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.log_probs: list[list[float]] = [[] for _ in requests]

    def _left_padded(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(ids) for ids in prompts)
        ids = [[0] * (width - len(p)) + p for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _uniforms(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.sampling.max_new_tokens, generator=generator, dtype=torch.float64)

    def run(self) -> Iterator[Rollout]:
        for position in range(self.sampling.max_new_tokens):
            tokens, log_probs = self._next(position)
            last = position + 1 == self.sampling.max_new_tokens
            stopped = torch.isin(tokens, self.stop_ids).tolist()
            for row, token, log_prob in zip(
                self.rows, tokens.tolist(), log_probs.tolist(), strict=True
            ):
                self.tokens[row].append(token)
                self.log_probs[row].append(log_prob)
            for row, has_stopped in zip(self.rows, stopped, strict=True):
                if has_stopped or last:
                    yield self._rollout(row, has_stopped)
            if last or all(stopped):
                return
            self._continue_with(tokens, [i for i, ended in enumerate(stopped) if not ended])

    @torch.inference_mode()
    def _next(self, position: int) -> tuple[Tensor, Tensor]:
        """The next token of each live row and its log-probability, [rows] each."""
        logits = self.model(
            input_ids=self.input_ids,
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.input_ids.shape[1] :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1, : self.vocab_size]
        logits = logits.float()
        tokens = draw(logits, self.uniforms[:, position], self.sampling)
        chosen = logits.gather(1, tokens[:, None]).squeeze(1)
        return tokens, chosen - logits.logsumexp(1)

    def _continue_with(self, tokens: Tensor, alive: list[int]) -> None:
        with torch.inference_mode():
            if len(alive) < len(self.rows):
                keep = torch.tensor(alive, device=self.device)
                self.cache.batch_select_indices(keep)
                tokens, self.mask, self.uniforms = (
                    tokens[keep],
                    self.mask[keep],
                    self.uniforms[keep],
                )
                self.rows = [self.rows[i] for i in alive]
            self.input_ids = tokens[:, None]
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)

    def _rollout(self, row: int, stopped: bool) -> Rollout:
        request = self.requests[row]
        return request.rollout(self.tokens[row], self.log_probs[row], stopped)


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Inverse-CDF sampling: [B, V] logits and [B] uniforms in [0, 1) -> [B] ids.

    Temperature 0 is greedy. Truncation follows transformers: top-k, then top-p.
    """
    if sampling.temperature == 0:
        return logits.argmax(1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    cumulative = logits.softmax(1, dtype=torch.float64).cumsum(1)
    # right=True: the first id whose cumulative probability exceeds the draw has probability > 0.
    passed = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, passed, right=True).squeeze(1)
