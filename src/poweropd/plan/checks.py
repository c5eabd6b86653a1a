"""Checks a recipe before any weight is loaded, with the functions that training uses.

A check that needs the Hub says so if the Hub cannot be reached.
"""

import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Literal

import huggingface_hub
import huggingface_hub.constants
from transformers import PreTrainedTokenizerBase

from poweropd import stops
from poweropd.config import Config
from poweropd.data import preview
from poweropd.data import prompts as data_prompts
from poweropd.data.chat import encode_chat
from poweropd.data.sources import is_file_name
from poweropd.embedded import EMBEDDED_PREFIX
from poweropd.errors import UsageError
from poweropd.models import loading, places, vocabulary
from poweropd.models.geometry import KNOWN, Geometry
from poweropd.models.token_bytes import TokenBytes
from poweropd.rollouts.turns.tools import tool_schemas

Status = Literal["ok", "warning", "failed", "not checked"]
Tokenizers = tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]  # the student's, the teacher's
HUB_TIMEOUT = 3.0  # seconds


@dataclass(frozen=True)
class PlanCheck:
    """The result of one check."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class PlannedModel:
    """A model's name, its geometry, and where the geometry comes from."""

    name: str
    geometry: Geometry
    source: str


@dataclass(frozen=True)
class Inspected:
    """What is known of a recipe's models and prompts."""

    models: dict[str, PlannedModel]  # student, teacher and, if the reward has one, reference
    checks: list[PlanCheck]
    prompt_lengths: list[int] = field(default_factory=list)  # tokens; empty if not known
    first_prompt: list[str] = field(default_factory=list)  # as it is shown; empty if not known

    @property
    def mean_prompt(self) -> float | None:
        """Returns the mean length of a prompt in tokens, or None if it is not known."""
        return fmean(self.prompt_lengths) if self.prompt_lengths else None


def inspect(config: Config) -> Inspected:
    """Finds geometries and runs checks. Raises UsageError if a model cannot be planned at all."""
    hub = Hub()
    models = find_models(config, hub)
    section = config.only_teacher
    own = (config.model.student, config.model.trust_remote_code)
    other = (section.tokenizer or section.model, section.trust_remote_code)
    unreachable = [name for name, _ in (own, other) if not hub.can_load(name)]
    if unreachable:
        why = f"hub unreachable: {', '.join(dict.fromkeys(unreachable))}"
        names = ("vocabulary", "stop ids", "chat template", "prompts")
        skipped = [PlanCheck(name, "not checked", why) for name in names]
        return Inspected(models, [*skipped, check_context(config, models, None)])
    tokenizers = loading.load_tokenizer(*own), loading.load_tokenizer(*other)
    prompts, prompt_check = check_prompts(config, tokenizers, hub)
    if prompts is not None and config.data.filter_longer:
        prompts, filtered = filter_prompts(config, models, prompts)
        prompt_check = replace(prompt_check, detail=f"{prompt_check.detail}; {filtered}")
    checks = [
        _run_check("vocabulary", lambda: check_vocabulary(config, tokenizers)),
        _run_check("stop ids", lambda: check_stop_ids(config, tokenizers)),
        _run_check("chat template", lambda: check_template(config, tokenizers, prompts)),
        prompt_check,
        check_context(config, models, prompts),
    ]
    lengths = [len(prompt.prompt_ids) for prompt in prompts or []]
    first = preview.prompt_lines(prompts[0], *tokenizers) if prompts else []
    return Inspected(models, checks, lengths, first)


class Hub:
    """Knows whether names can be loaded; it asks the Hub at most once."""

    def can_load(self, name: str) -> bool:
        """Returns whether a model or data set is here or, if the Hub may be used, on the Hub."""
        if huggingface_hub.constants.is_offline_mode():
            return is_local(name) or is_cached(name)
        return is_local(name) or self.reachable

    @cached_property
    def reachable(self) -> bool:
        """Asks with a short time-out, because the libraries' own retries take half a minute."""
        request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
        except urllib.error.HTTPError:
            return True  # it answered
        except OSError:
            return False
        return True


def is_local(name: str) -> bool:
    """Returns whether a name is embedded, a data file, or a directory of this machine."""
    return (
        name.startswith(EMBEDDED_PREFIX)
        or is_file_name(name)
        or Path(places.resolve(name)).exists()
    )


def is_cached(name: str) -> bool:
    """Returns whether the Hub's cache holds this model's config."""
    return isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)


def find_models(config: Config, hub: Hub) -> dict[str, PlannedModel]:
    """Finds the geometries of student and teacher, and of the reward's reference if it has one.

    Raises UsageError if one is not known.
    """
    sections = {"teacher": config.only_teacher, "reference": config.reference_model}
    return {
        "student": find_model(config.model.student, config.model.trust_remote_code, hub),
        **{
            role: find_model(section.model, section.trust_remote_code, hub)
            for role, section in sections.items()
            if section is not None
        },
    }


def geometries(models: Mapping[str, PlannedModel]) -> dict[str, Geometry]:
    """Returns the geometries of models by their role."""
    return {role: model.geometry for role, model in models.items()}


def find_model(name: str, trust_remote_code: bool, hub: Hub) -> PlannedModel:
    """Reads a model's geometry from its config, or from the table of the paper's models."""
    if hub.can_load(name):
        fields = loading.load_config(name, trust_remote_code).get_text_config().to_dict()
        return PlannedModel(name, Geometry.from_fields(name, fields), "config")
    if name in KNOWN:
        return PlannedModel(name, KNOWN[name], "built in")
    raise UsageError(
        f"{name}: the hub cannot be reached, and its geometry is not built in (built in: "
        f"{', '.join(KNOWN)}); give a local directory with its config.json"
    )


def _run_check(name: str, check: Callable[[], tuple[Status, str]]) -> PlanCheck:
    try:
        return PlanCheck(name, *check())
    except UsageError as error:
        return PlanCheck(name, "failed", str(error))


def by_spans(config: Config) -> bool:
    """Returns whether the models are compared on spans of text, so that no id need be shared."""
    return config.only_teacher.align == "spans"


def check_vocabulary(config: Config, tokenizers: Tokenizers) -> tuple[Status, str]:
    if by_spans(config):
        for tokenizer, key in zip(tokenizers, ("model.student", "teacher.model"), strict=True):
            TokenBytes(tokenizer, key)
        own, other = map(len, tokenizers)
        return "ok", f"{own:,} and {other:,} tokens, compared on spans of text"
    unshared = vocabulary.unshared_ids(*tokenizers)
    if unshared:
        return "warning", vocabulary.unshared_notice(unshared, *tokenizers)
    return "ok", f"{len(tokenizers[0]):,} tokens, the same in both models"


def check_stop_ids(config: Config, tokenizers: Tokenizers) -> tuple[Status, str]:
    names, policy = (config.model.student, config.only_teacher.model), config.objective.stop
    own, other = (
        stops.stop_ids(tokenizer, loading.load_generation_config(name))
        for tokenizer, name in zip(tokenizers, names, strict=True)
    )
    if by_spans(config):
        names = tokenizers[0].decode(own[0]), tokenizers[1].decode(other[0])
        return "ok", "the student ends a turn with {}, the teacher with {}".format(*names)
    unshared = vocabulary.unshared_ids(*tokenizers)
    own, other = stops.shared_stops(own, other, unshared, policy, tokenizers[0])
    notice = stops.difference(own, other, policy, tokenizers[0])
    if notice:
        return "warning", notice
    return "ok", f"both end a turn with {tokenizers[0].convert_ids_to_tokens(own[0])}"


def check_template(
    config: Config, tokenizers: Tokenizers, prompts: Sequence[data_prompts.Prompt] | None
) -> tuple[Status, str]:
    settings = (["?"], config.data.chat, config.data.system)
    (ids,) = encode_chat(tokenizers[0], *settings)
    if config.data.teacher_column is not None or by_spans(config):
        encode_chat(tokenizers[1], *settings)
    if config.data.chat is None:
        return "ok", "prompts are plain text"
    notice = preview.template_notice(prompts[0], *tokenizers, config.data) if prompts else None
    if notice:
        return "warning", notice
    return "ok", f"the student's, {len(ids) - 1} tokens around a prompt"


def check_prompts(
    config: Config, tokenizers: Tokenizers, hub: Hub
) -> tuple[list[data_prompts.Prompt] | None, PlanCheck]:
    """Checks that the prompts can be loaded; returns them, or None if they cannot."""
    source = config.data.prompts
    if not hub.can_load(source):
        return None, PlanCheck("prompts", "not checked", f"hub unreachable: {source}")
    try:
        prompts = data_prompts.load_prompts(
            config.data,
            tokenizers[0],
            {"": tokenizers[1]},
            apart=[""] if by_spans(config) else [],
            tools=tool_schemas(config.rollout.tool_names),
        )
        data_prompts.split_holdout(prompts, config.data.holdout, config.train.seed)
    except UsageError as error:
        return None, PlanCheck("prompts", "failed", str(error))
    try:
        unshared = set() if by_spans(config) else {*vocabulary.unshared_ids(*tokenizers)}
        data_prompts.check_shared(prompts, unshared, tokenizers[0])
    except UsageError as error:
        return prompts, PlanCheck("prompts", "failed", str(error))
    lengths = [len(prompt.prompt_ids) for prompt in prompts]
    detail = f"{len(prompts):,} of {fmean(lengths):.0f} tokens on average, at most {max(lengths)}"
    return prompts, PlanCheck("prompts", "ok", detail)


def filter_prompts(
    config: Config, models: dict[str, PlannedModel], prompts: Sequence[data_prompts.Prompt]
) -> tuple[list[data_prompts.Prompt], str]:
    """Returns the prompts that fit both contexts, and how many do not."""
    own, other = (model.geometry.context or loading.UNLIMITED for model in models.values())
    new = config.rollout.longest
    kept = [prompt for prompt in prompts if data_prompts.fits(prompt, own, other, new)]
    return kept, data_prompts.filter_notice(len(kept), len(prompts))


def check_context(
    config: Config,
    models: dict[str, PlannedModel],
    prompts: Sequence[data_prompts.Prompt] | None,
) -> PlanCheck:
    """Checks that prompts and completions fit; without prompts, says how long they may be."""
    contexts = {role: model.geometry.context or loading.UNLIMITED for role, model in models.items()}
    own, other = contexts["student"], contexts["teacher"]
    own = min(own, contexts.get("reference", own))  # it reads what the student reads
    new, context = config.rollout.longest, min(own, other)
    if new >= context:
        detail = f"rollout.max_new_tokens={new} leaves no room for a prompt in {context}"
        return PlanCheck("context", "failed", detail)
    if prompts is None:
        detail = f"{new:,} new tokens leave {context - new:,} for a prompt"
        return PlanCheck("context", "ok", detail)
    try:
        data_prompts.check_lengths(prompts, own, other, new)
    except UsageError as error:
        return PlanCheck("context", "failed", str(error))
    return PlanCheck("context", "ok", f"every prompt and {new:,} new tokens fit in {context:,}")
