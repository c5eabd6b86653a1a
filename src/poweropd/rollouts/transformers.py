"""Sampling with a `transformers` model in this process: KV cache, no logits kept.

A model whose cache is keys and values alone is decoded in slots that are filled again
(`continuous`), any other in padded chunks (`padded`). Which it is, a check decides that runs.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from poweropd.config import Config
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Request, Rollout
from poweropd.errors import UsageError
from poweropd.models import attention, loading
from poweropd.models.language_model import Student
from poweropd.models.packed import PackedLinears
from poweropd.rollouts import continuous
from poweropd.rollouts.base import Sampling
from poweropd.rollouts.continuous import ContinuousDecoder
from poweropd.rollouts.draws import Sampler
from poweropd.rollouts.padded import PaddedDecoder

# What `check_decoding` samples, and how far its log-probs may be from those of a full forward.
PROBE_LENGTHS, PROBE_TOKENS = (7, 3, 5), 6
# Slots of a probe, and columns that they attend to: more than the windows that some architectures
# lay over the last columns, whatever their caches say.
PROBE_VIEW = 2, 1024
TOLERANCES = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.5}


# Decodes requests with packed weights and a sampler; `probe` is as `_in_slots` says.
Decode = Callable[..., Iterator[Rollout]]


class TransformersEngine:
    """Samples from `model`, at most `batch_size` completions at once.

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
        self._decode: Decode | None = None  # as `check_decoding` chooses

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
        """Chooses how the model is decoded; raises UsageError if decoding is not its full forward.

        A few completions of prompts of different lengths are sampled, one of which ends early, and
        scored by a forward each. Some architectures ignore the cache, or padding, without a word.
        """
        packed = PackedLinears(self.model)
        if continuous.holds_all_tokens(self.model) and not self._problem(self._in_slots, packed):
            # Where the model's own mask is right, so is one that costs less, as a rule.
            fast = partial(self._in_slots, makes_mask=True)
            self._decode = self._in_slots if self._problem(fast, packed) else fast
            return
        problem = self._problem(self._padded, packed)
        if problem is None:
            self._decode = self._padded
            return
        raise UsageError(
            f"rollout.engine: transformers: decoding {type(self.model).__name__} with a cache "
            f"{problem}: this engine cannot sample from it; try another version of transformers, "
            "or rollout.engine=vllm"
        )

    def _problem(self, way: Decode, packed: PackedLinears) -> str | None:
        """Returns what goes wrong if the model is decoded in a way; None if nothing does."""
        prompts = [[(5 * i + n) % self.vocab_size for i in range(n)] for n in PROBE_LENGTHS]
        requests = [Request(Prompt(i, p, p), i, 0, seed=i) for i, p in enumerate(prompts)]
        requests.append(replace(requests[0], sample_index=1, seed=len(requests)))

        def sampled(stop_ids: tuple[int, ...]) -> list[Rollout]:
            sampling = Sampling(PROBE_TOKENS, stop_ids)
            return list(self._evaluating(partial(way, probe=True), packed, requests, sampling))

        try:
            first = next(r for r in sampled(()) if r.request.key == (0, 0))
            stop = first.completion_ids[1]  # with which at least the first ends early
            rollouts = sampled((stop,))
        except loading.FORWARD_FAILURES as error:
            return f"fails ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        difference = max(self._difference(rollout) for rollout in rollouts)
        if difference <= TOLERANCES[self.model.dtype]:
            return None
        return f"gives other log-probs than its forward (by {difference:.3g})"

    @torch.inference_mode()
    def _difference(self, rollout: Rollout) -> float:
        """Returns the largest difference of a rollout's log-probs from those of one forward."""
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids], device=self.model.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, :, : self.vocab_size].float()
        logits[:, self.masked_ids] = -torch.inf
        log_probs = logits[:-1].log_softmax(1).gather(1, ids[0, 1:, None]).squeeze(1)
        own = torch.tensor(rollout.sampling_log_probs, device=ids.device)
        return (log_probs[-len(own) :] - own).abs().max().item()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        """Yields rollouts as they end, those of the longest prompts first."""
        if not requests:
            return
        if self._decode is None:
            self.check_decoding()
        assert self._decode is not None
        packed = PackedLinears(self.model)  # of the weights as they are now
        yield from self._evaluating(self._decode, packed, requests, sampling)

    def _evaluating(
        self,
        decode: Decode,
        packed: PackedLinears,
        requests: Sequence[Request],
        sampling: Sampling,
    ) -> Iterator[Rollout]:
        """Decodes with the model in evaluation mode."""
        # Neighbours of similar length need little padding; the sort is stable.
        ordered = sorted(requests, key=lambda r: -len(r.prompt_ids))
        sampler = Sampler(sampling, self.vocab_size, self.masked_ids, self.model.device)
        was_training = self.model.training
        self.model.eval()
        try:
            yield from decode(packed, sampler, ordered)
        finally:
            self.model.train(was_training)

    def _in_slots(
        self,
        packed: PackedLinears,
        sampler: Sampler,
        requests: Sequence[Request],
        probe: bool = False,
        makes_mask: bool = False,
    ) -> Iterator[Rollout]:
        """Decodes in slots; a probe fills few of them again, and attends to many masked columns."""
        slots, width = PROBE_VIEW if probe else (self.batch_size, 0)
        decoder = ContinuousDecoder(
            self.model, packed, sampler, requests, slots, width, makes_mask=makes_mask
        )
        return decoder.run()

    def _padded(
        self,
        packed: PackedLinears,
        sampler: Sampler,
        requests: Sequence[Request],
        probe: bool = False,
    ) -> Iterator[Rollout]:
        """Decodes in padded chunks, one after another."""
        for start in range(0, len(requests), self.batch_size):
            chunk = requests[start : start + self.batch_size]
            yield from PaddedDecoder(self.model, packed, sampler, chunk).run()
