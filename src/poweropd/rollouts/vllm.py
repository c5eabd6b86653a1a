"""Sampling with vLLM in this process, on the device that trains.

The engine starts with random weights and is given the student's at the first sync, cut to the
vocabulary that student and teacher share: ids past it do not exist for vLLM. Where the platform
can, it sleeps between rollouts (its weights moved to the host, its KV cache freed).
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from poweropd.batching import Rollout
from poweropd.errors import UsageError
from poweropd.rollouts.base import Request, Sampling

Weights = Callable[[], Iterable[tuple[str, Tensor]]]


class VllmEngine:
    """An offline `vllm.LLM` for the model directory or Hub name `model`.

    `weights()` yields the student's weights in the checkpoint's names, merged and unsharded, a tied
    head under its own name, too: vLLM keeps the old one otherwise. `options` are keyword arguments
    of `vllm.LLM`. Raises UsageError where vLLM is missing or refuses them.
    """

    concurrent = False

    def __init__(self, model: str, weights: Weights, options: Mapping[str, Any]) -> None:
        check_installed()
        # In this process, so that weights can be handed over as tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm
        from vllm.platforms import current_platform

        self.weights, self.sleeps = weights, current_platform.is_sleep_mode_available()
        try:
            self.llm = vllm.LLM(
                model,
                load_format="dummy",
                skip_tokenizer_init=True,
                enable_sleep_mode=self.sleeps,
                **options,
            )
        except (TypeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(f"rollout.vllm: vLLM refuses these options: {reason}") from error
        self._sleep()

    def sync(self) -> None:
        # No KV cache yet: beside the trainer's gradients there may be no room for it.
        self._wake_up(["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self.weights()})
        self.llm.reset_prefix_cache()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        self._wake_up()
        engine = self.llm.llm_engine
        prompts = engine.renderer.render_cmpl(
            [{"prompt_token_ids": r.prompt_ids} for r in requests]
        )
        waiting = {str(number): request for number, request in enumerate(requests)}
        for (name, request), prompt in zip(waiting.items(), prompts, strict=True):
            engine.add_request(name, prompt, _sampling_params(sampling, request.seed))
        try:
            while waiting:
                for output in engine.step():
                    if output.finished:
                        yield _rollout(waiting.pop(output.request_id), output.outputs[0], sampling)
        finally:  # also where the caller has seen enough
            engine.abort_request(list(waiting))
            self._sleep()

    def _sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=1)

    def _wake_up(self, tags: list[str] | None = None) -> None:
        if self.sleeps:
            self.llm.wake_up(tags)


def check_installed() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise UsageError("rollout.engine: vllm needs vLLM: pip install 'poweropd[vllm]'")


def _sampling_params(sampling: Sampling, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed,
        # Ours are all the stop ids there are: not the model's own besides.
        ignore_eos=True,
        stop_token_ids=list(sampling.stop_ids),
        logprobs=0,  # of the sampled token: raw, at temperature 1
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _rollout(request: Request, output: Any, sampling: Sampling) -> Rollout:
    ids = list(output.token_ids)
    return Rollout(
        prompt_index=request.prompt_index,
        sample_index=request.sample_index,
        prompt_ids=request.prompt_ids,
        teacher_prompt_ids=request.teacher_prompt_ids,
        completion_ids=ids,
        sampling_log_probs=[
            found[i].logprob for i, found in zip(ids, output.logprobs, strict=True)
        ],
        stopped=ids[-1] in sampling.stop_ids,
    )
