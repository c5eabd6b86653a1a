"""Sampling with a `transformers` model in this process: KV cache, no logits kept.

Each completion draws one uniform number per token from its own generator and takes the token
where the cumulative probability passes it, so a completion does not depend on its neighbours.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from poweropd.config import Config
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Request, Rollout
from poweropd.errors import DivergedError, UsageError
from poweropd.models import attention
from poweropd.models.language_model import Student
from poweropd.models.loading import FORWARD_FAILURES
from poweropd.rollouts.base import Sampling

# What `check_decoding` samples, and how far its log-probs may be from those of a full forward.
PROBE_LENGTHS, PROBE_TOKENS = (7, 3, 5), 6
TOLERANCES = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.5}


class TransformersEngine:
    """Samples from `model`, in chunks of at most `batch_size` completions.

    `sync` brings the model up to date with the student, and does nothing if it is the student's.
    Ids from `vocab_size` on (padded embeddings) and `masked_ids` are never sampled.
    """

    concurrent = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocab_size: int,
        batch_size: int = 128,
        masked_ids: Sequence[int] = (),
        sync: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.vocab_size, self.batch_size = model, vocab_size, batch_size
        self.masked_ids = list(masked_ids)
        self._sync = sync

    @classmethod
    def build(
        cls, student: Student, config: Config, accelerator: Accelerator, longest: int | None
    ) -> "TransformersEngine":
        """Returns an engine on the student itself if that can decode, or on a plain copy.

        The copy is in the compute dtype. The `longest` sequence does not matter here.
        """
        model = student.model
        make = partial(
            cls,
            vocab_size=student.vocab_size,
            batch_size=config.rollout.batch_size,
            masked_ids=student.masked_ids,
        )
        sharded = config.train.sharding != "none" and accelerator.num_processes > 1
        as_it_is = not sharded and not config.model.compile
        decodes = attention.implementation(student) in attention.PADDED
        if model.dtype == student.compute_dtype and as_it_is and decodes:
            engine = make(model)
            engine.check_decoding()
            return engine
        twin = copy.deepcopy(model).requires_grad_(False)
        if student.lora:
            twin = twin.merge_and_unload()
        for parameter in twin.parameters():
            # Not `twin.to(dtype)`: that would round the buffers of rotary embeddings as well.
            parameter.data = parameter.data.to(student.compute_dtype)
        if not decodes:
            twin.set_attn_implementation("sdpa")
        own = twin.state_dict()

        def sync() -> None:
            for name, tensor in student.gathered_weights():
                own[name].copy_(tensor)

        engine = make(twin, sync=sync)
        engine.check_decoding()
        return engine

    def sync(self) -> None:
        self._sync()

    def check_decoding(self) -> None:
        """Raises UsageError if decoding with a cache is not what the full forward computes.

        A few completions of prompts of different lengths are sampled, one of which ends early, and
        scored by a forward each. Some architectures ignore the cache, or padding, without a word.
        """
        prompts = [[(5 * i + n) % self.vocab_size for i in range(n)] for n in PROBE_LENGTHS]
        requests = [Request(Prompt(i, p, p), i, 0, seed=i) for i, p in enumerate(prompts)]
        endless = Sampling(PROBE_TOKENS, stop_ids=())
        try:
            first = next(r for r in self.generate(requests, endless) if r.request.key == (0, 0))
            stops = (first.completion_ids[1],)  # with which at least the first ends early
            rollouts = list(self.generate(requests, Sampling(PROBE_TOKENS, stops)))
        except FORWARD_FAILURES as error:
            reason = str(error).partition("\n")[0]
            raise self._refused(f"fails ({type(error).__name__}: {reason})") from error
        difference = max(self._difference(rollout) for rollout in rollouts)
        if not difference <= TOLERANCES[self.model.dtype]:
            raise self._refused(f"gives other log-probs than its forward (by {difference:.3g})")

    @torch.inference_mode()
    def _difference(self, rollout: Rollout) -> float:
        """Returns the largest difference of a rollout's log-probs from those of one forward."""
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids], device=self.model.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, :, : self.vocab_size].float()
        logits[:, self.masked_ids] = -torch.inf
        log_probs = logits[:-1].log_softmax(1).gather(1, ids[0, 1:, None]).squeeze(1)
        own = torch.tensor(rollout.sampling_log_probs, device=ids.device)
        return (log_probs[-len(own) :] - own).abs().max().item()

    def _refused(self, problem: str) -> UsageError:
        name = type(self.model).__name__
        return UsageError(
            f"rollout.engine: transformers: decoding {name} with a cache {problem}: this engine "
            "cannot sample from it; try another version of transformers, or rollout.engine=vllm"
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        """Yields rollouts as they end, those of the longest prompts first."""
        # Neighbours of similar length need little padding.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), self.batch_size):
                chunk = [requests[i] for i in order[start : start + self.batch_size]]
                sizes = self.vocab_size, self.masked_ids
                yield from _Decoder(self.model, *sizes, chunk, sampling).run()
        finally:
            self.model.train(was_training)


class _Decoder:
    """One chunk of completions, decoded together; a completion that has ended is dropped."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        masked_ids: list[int],
        requests: Sequence[Request],
        sampling: Sampling,
    ) -> None:
        self.model, self.requests, self.sampling = model, requests, sampling
        self.device, self.vocab_size = model.device, vocab_size
        self.masked_ids = torch.tensor(masked_ids, dtype=torch.int64, device=self.device)
        self.stop_ids = torch.tensor(sampling.stop_ids, device=self.device)
        self.cache = DynamicCache(config=model.config)
        self.input_ids, self.mask = self._left_padded([r.prompt_ids for r in requests])
        self.uniforms = torch.stack([self._uniforms(r.seed) for r in requests]).to(self.device)
        self.live = list(range(len(requests)))  # the requests that are still being decoded
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.log_probs: list[list[float]] = [[] for _ in requests]

    def _left_padded(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Returns [B, T] ids and their mask, 0 on padding."""
        width = max(len(ids) for ids in prompts)
        ids = [[0] * (width - len(p)) + p for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _uniforms(self, seed: int) -> Tensor:
        """Returns [max_new_tokens] float64 draws from [0, 1)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.sampling.max_new_tokens, generator=generator, dtype=torch.float64)

    def run(self) -> Iterator[Rollout]:
        """Yields each rollout when it ends."""
        for position in range(self.sampling.max_new_tokens):
            tokens, log_probs = self._next(position)
            last = position + 1 == self.sampling.max_new_tokens
            stopped = torch.isin(tokens, self.stop_ids).tolist()
            for i, token, log_prob in zip(
                self.live, tokens.tolist(), log_probs.tolist(), strict=True
            ):
                if not math.isfinite(log_prob):
                    raise DivergedError(
                        "the student's logits are not finite: its training has diverged, so lower "
                        "train.learning_rate (or its weights are damaged)"
                    )
                self.tokens[i].append(token)
                self.log_probs[i].append(log_prob)
            for i, has_stopped in zip(self.live, stopped, strict=True):
                if has_stopped or last:
                    yield self.requests[i].rollout(self.tokens[i], self.log_probs[i], has_stopped)
            if last or all(stopped):
                return
            self._continue_with(tokens, [i for i, ended in enumerate(stopped) if not ended])

    @torch.inference_mode()
    def _next(self, position: int) -> tuple[Tensor, Tensor]:
        """Returns the next token of each live completion and its log-prob, [live] each."""
        logits = self.model(
            input_ids=self.input_ids,
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.input_ids.shape[1] :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1, : self.vocab_size]
        logits = logits.float()
        logits[:, self.masked_ids] = -torch.inf
        tokens = draw(logits, self.uniforms[:, position], self.sampling)
        tokens = tokens.clamp(max=self.vocab_size - 1)  # beyond it if the logits are NaN
        chosen = logits.gather(1, tokens[:, None]).squeeze(1)
        return tokens, chosen - logits.logsumexp(1)

    @torch.inference_mode()
    def _continue_with(self, tokens: Tensor, alive: list[int]) -> None:
        """Makes `tokens` the next input; drops all completions but those at positions `alive`."""
        if len(alive) < len(self.live):
            keep = torch.tensor(alive, device=self.device)
            # Not `batch_select_indices`, which layers with a recurrent state lack or half do.
            self.cache.reorder_cache(keep)
            tokens, self.mask, self.uniforms = tokens[keep], self.mask[keep], self.uniforms[keep]
            self.live = [self.live[i] for i in alive]
        self.input_ids = tokens[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.live), 1)], dim=1)


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Samples by the inverse CDF: [B, V] logits and [B] uniforms in [0, 1) -> [B] ids.

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
