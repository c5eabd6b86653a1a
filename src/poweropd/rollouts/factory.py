"""The rollout engine of a recipe, built around the run's student: `rollout.engine`."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from poweropd.config import Config
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Example, Request, Rollout, make_example
from poweropd.errors import UsageError
from poweropd.models import attention, language_model, loading
from poweropd.rewards import import_object
from poweropd.rollouts import vllm
from poweropd.rollouts.base import RolloutEngine, Sampling
from poweropd.rollouts.guards import TOLERANCES, CheckedEngine, VerifiedEngine
from poweropd.rollouts.http import JsonServer
from poweropd.rollouts.transformers import TransformersEngine
from poweropd.rollouts.vllm_server import VllmServerEngine

LogProbs = Callable[[Sequence[Example]], list[list[float]]]

PROBES, PROBE_TOKENS = 4, 16  # what a verification samples


@dataclass(frozen=True)
class EngineInputs:
    """What an engine may be built from."""

    config: Config
    student: language_model.Student
    tokenizer: Any
    prompts: Sequence[Prompt]
    context: int  # tokens of the student's
    accelerator: Accelerator
    log_probs: LogProbs  # the student's own of each example's tokens, once it is trained


def build_engine(parts: EngineInputs) -> RolloutEngine:
    """Raises UsageError where the recipe's engine cannot be had."""
    name = parts.config.rollout.engine
    return _own(parts, name) if ":" in name else MAKERS[name](parts)


def _transformers(parts: EngineInputs) -> RolloutEngine:
    """Samples from the student itself where it can, or from a plain copy in the compute dtype."""
    config, student = parts.config, parts.student
    model, batch_size = student.model, config.rollout.batch_size
    sharded = config.train.sharding != "none" and parts.accelerator.num_processes > 1
    as_it_is = not sharded and not config.model.compile
    decodes = attention.implementation(student) in attention.PADDED
    if model.dtype == student.compute_dtype and as_it_is and decodes:
        return TransformersEngine(model, vocab_size=student.vocab_size, batch_size=batch_size)
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

    return TransformersEngine(twin, vocab_size=student.vocab_size, batch_size=batch_size, sync=sync)


def _vllm(parts: EngineInputs) -> RolloutEngine:
    config, student = parts.config, parts.student
    options = config.rollout.vllm.model_dump()
    if options["enforce_eager"] is None:
        options["enforce_eager"] = student.device.type != "cuda"
    if options["max_model_len"] is None:
        options["max_model_len"] = _longest(parts)
    defaults: dict[str, Any] = {
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
    }
    if student.causal_lm.get_output_embeddings().weight.shape[0] > student.vocab_size:
        defaults["hf_overrides"] = {"vocab_size": student.vocab_size}
    if parts.accelerator.num_processes > 1:  # each process has an engine, on its own device
        defaults["distributed_executor_backend"] = "external_launcher"
    model = loading.resolve(config.model.student)
    weights = partial(shared_weights, student)
    return _verified(parts, vllm.VllmEngine(model, weights, defaults | options))


def _vllm_server(parts: EngineInputs) -> RolloutEngine:
    section, run = parts.config.rollout.server, parts.config.run.dir
    accelerator = parts.accelerator
    engine = VllmServerEngine(
        JsonServer(section.url, section.timeout, section.patience, section.api_key_env),
        partial(shared_weights, parts.student),
        Path(section.weights_dir or f"{run}/weights"),
        section.concurrency,
        is_main=accelerator.is_main_process,
        wait=accelerator.wait_for_everyone,
    )
    return _verified(parts, _checked(parts, engine))


def _own(parts: EngineInputs, name: str) -> RolloutEngine:
    """What the user's factory(student, config, tokenizer) makes."""
    try:
        factory = import_object(name)
    except ValueError as error:
        raise UsageError(f"rollout.engine: {str(error).removeprefix('name: ')}") from None
    engine = factory(parts.student, parts.config, parts.tokenizer)
    if not isinstance(engine, RolloutEngine):
        raise UsageError(
            f"rollout.engine: expected {name} to return an object with concurrent, generate and "
            f"sync, got {type(engine).__name__}"
        )
    return _checked(parts, engine)


MAKERS: dict[str, Callable[[EngineInputs], RolloutEngine]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "vllm_server": _vllm_server,
}


def _checked(parts: EngineInputs, engine: RolloutEngine) -> RolloutEngine:
    name = parts.config.rollout.engine
    return CheckedEngine(engine, name, parts.student.vocab_size, parts.context)


def _verified(parts: EngineInputs, engine: RolloutEngine) -> RolloutEngine:
    """The engine with its weights compared with the student's every so many syncs."""
    shortest = sorted(parts.prompts, key=lambda p: len(p.prompt_ids))[:PROBES]
    probes = [Request(prompt, number, 0, seed=number) for number, prompt in enumerate(shortest)]
    tokens = min(PROBE_TOKENS, parts.config.rollout.max_new_tokens)

    def log_probs(rollouts: Sequence[Rollout]) -> list[list[float]]:
        # Without stops every token counts.
        examples = [make_example(rollout, (), (0,), "raw") for rollout in rollouts]
        return parts.log_probs([e for e in examples if e is not None])

    return VerifiedEngine(
        engine,
        (probes, Sampling(max_new_tokens=tokens, stop_ids=())),
        log_probs,
        every=parts.config.rollout.verify_every,
        tolerance=TOLERANCES[parts.config.model.dtype],
    )


def shared_weights(student: language_model.Student) -> Iterator[tuple[str, Tensor]]:
    """The gathered weights, embeddings and head cut to the vocabulary shared with the teacher."""
    causal_lm = student.causal_lm
    tables = (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    cut = {id(parameter) for table in tables for parameter in table.parameters()}
    named = causal_lm.named_parameters(remove_duplicate=False)
    names = {name for name, parameter in named if id(parameter) in cut}
    for name, tensor in student.gathered_weights():
        yield name, tensor[: student.vocab_size] if name in names else tensor


def _longest(parts: EngineInputs) -> int | None:
    """Tokens of the longest sequence that training needs; the context where it evaluates, too."""
    if parts.config.evaluate is not None:
        return parts.context if parts.context < loading.UNLIMITED else None
    longest = max(len(prompt.prompt_ids) for prompt in parts.prompts)
    return longest + parts.config.rollout.max_new_tokens
