"""Sampling with vLLM in this process, on the device that trains.

vLLM starts with random weights and is given the student's at the first sync, cut to the vocabulary
that student and teacher share: other ids do not exist for it. Where the platform can, it sleeps
between rollouts (its weights moved to the host, its KV cache freed).
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from poweropd.config import Config
from poweropd.data.rollout import Request, Rollout
from poweropd.errors import UsageError
from poweropd.models.devices import name_of
from poweropd.models.language_model import Student
from poweropd.models.places import resolve
from poweropd.rollouts.base import Sampling, Weights, shared_weights

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput


class VllmEngine:
    """An offline `vllm.LLM` for the model directory or Hub name `model`.

    `weights()` yields the student's weights in the checkpoint's names, merged and unsharded, a tied
    head under its own name, too: vLLM keeps the old one otherwise. `options` are keyword arguments
    of `vllm.LLM`. Raises UsageError if vLLM is missing or refuses them.
    """

    concurrent = False

    def __init__(self, model: str, weights: Weights, options: Mapping[str, Any]) -> None:
        self.model, self.weights, self.options = model, weights, dict(options)
        _process.llm_for(self)

    @classmethod
    def build(
        cls, student: Student, config: Config, accelerator: Accelerator, longest: int | None
    ) -> "VllmEngine":
        """Returns the engine of a run, with room for the `longest` sequence, in tokens."""
        options: dict[str, Any] = {
            "dtype": name_of(student.compute_dtype),
            "trust_remote_code": config.model.trust_remote_code,
        }
        shared = len(student.kept_ids())
        if student.causal_lm.get_output_embeddings().weight.shape[0] > shared:
            options["hf_overrides"] = {"vocab_size": shared}
        if accelerator.num_processes > 1:  # each process has an engine, on its own device
            options["distributed_executor_backend"] = "external_launcher"
        options |= config.rollout.vllm.model_dump()
        if options["enforce_eager"] is None:
            options["enforce_eager"] = student.device.type != "cuda"
        if options["max_model_len"] is None:
            options["max_model_len"] = longest
        return cls(resolve(config.model.student), partial(shared_weights, student), options)

    def sync(self) -> None:
        """Hands vLLM the student's weights as they are now."""
        # No KV cache yet: beside the trainer's gradients there may be no room for it.
        llm = _process.awake(self, ["weights"])
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self.weights()})
        llm.reset_prefix_cache()
        _process.synced = self

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        """Yields rollouts as they end; vLLM batches them continuously."""
        if _process.synced is not self:
            self.sync()
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        llm = _process.awake(self)
        fixed = {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        _check_room(llm.model_config.max_model_len, requests, sampling)
        engine = llm.llm_engine
        ids = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        waiting = {str(number): request for number, request in enumerate(requests)}
        for name, prompt in zip(waiting, engine.renderer.render_cmpl(ids), strict=True):
            request = waiting[name]
            parameters = vllm_parameters(sampling.of(request), request.seed)
            engine.add_request(name, prompt, SamplingParams(**parameters, **fixed))
        try:
            while waiting:
                for output in engine.step():
                    if output.finished:
                        yield _rollout(waiting.pop(output.request_id), output.outputs[0], sampling)
        finally:  # also where the caller has seen enough
            engine.abort_request(list(waiting))
            _process.sleep()


class _Process:
    """The one LLM of a process, handed from run to run: vLLM keeps its process groups in globals.

    `synced` is the engine whose student's weights the LLM holds.
    """

    def __init__(self) -> None:
        self.llm: LLM | None = None
        self.loaded: tuple[str, dict[str, Any]] | None = None
        self.synced: VllmEngine | None = None
        self.sleeps = False

    def llm_for(self, engine: VllmEngine) -> "LLM":
        """Returns the LLM with the engine's model and options, loaded anew if they differ."""
        if self.loaded != (engine.model, engine.options):
            if self.llm is not None:
                self.llm.llm_engine.engine_core.shutdown()
            self.llm = self.loaded = self.synced = None
            self.llm = self._load(engine.model, engine.options)
            self.loaded = (engine.model, engine.options)
            self.sleep()
        return self.llm

    def _load(self, model: str, options: dict[str, Any]) -> "LLM":
        """Starts vLLM in this process with random weights."""
        if importlib.util.find_spec("vllm") is None:
            raise UsageError("rollout.engine: vllm needs vLLM: pip install 'poweropd[vllm]'")
        # In this process, so that weights can be handed over as tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm
        from vllm.platforms import current_platform

        self.sleeps = current_platform.is_sleep_mode_available()
        fixed = {"load_format": "dummy", "skip_tokenizer_init": True}
        try:
            return vllm.LLM(model, **fixed, enable_sleep_mode=self.sleeps, **options)
        except (TypeError, ValueError) as error:
            reason = str(error).strip().replace("\n", " ")[:300]
            raise UsageError(f"rollout.vllm: vLLM refuses these options: {reason}") from error

    def awake(self, engine: VllmEngine, tags: list[str] | None = None) -> "LLM":
        """Returns the engine's LLM with the memory of `tags`, by default all, on the device."""
        llm = self.llm_for(engine)
        if self.sleeps:
            llm.wake_up(tags)
        return llm

    def sleep(self) -> None:
        """Frees the device's memory where the platform can."""
        if self.sleeps and self.llm is not None:
            self.llm.sleep(level=1)


_process = _Process()


def _check_room(room: int, requests: Sequence[Request], sampling: Sampling) -> None:
    """Raises UsageError if a completion may not fit: vLLM would end it at its limit in silence."""
    pairs = [(len(r.prompt_ids), sampling.of(r).max_new_tokens) for r in requests]
    prompt, new = max(pairs, key=sum, default=(0, 0))
    if prompt + new > room:
        raise UsageError(
            f"rollout.vllm.max_model_len: {room} tokens do not hold a prompt of {prompt} and "
            f"{new} new ones; raise it"
        )


def vllm_parameters(sampling: Sampling, seed: int) -> dict[str, Any]:
    """Returns the settings of a completion under vLLM's names, the same in process and served."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": seed,
        # A model's generation_config.json sets a server's defaults, so these are said, too.
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        # These are all stop ids; the model's own do not count besides.
        "ignore_eos": True,
        "stop_token_ids": list(sampling.stop_ids),
        "logprobs": 0,  # of the sampled token: raw, at temperature 1
    }


def _rollout(request: Request, output: "CompletionOutput", sampling: Sampling) -> Rollout:
    """Returns the rollout of a request from what vLLM made of it."""
    ids = list(output.token_ids)
    return request.rollout(
        ids,
        [found[i].logprob for i, found in zip(ids, output.logprobs, strict=True)],
        ids[-1] in sampling.stop_ids,
    )
