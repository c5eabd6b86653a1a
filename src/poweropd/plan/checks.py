"""What can be checked of a recipe before any weight is loaded, by the functions that training uses.

A check that needs the Hub says so where the Hub cannot be reached.
"""

import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import huggingface_hub
import huggingface_hub.constants

from poweropd import stops
from poweropd.config import Config
from poweropd.data import prompts as data_prompts
from poweropd.errors import UsageError
from poweropd.models import loading
from poweropd.models.geometry import KNOWN, Geometry

Status = Literal["ok", "warning", "failed", "not checked"]
HUB_TIMEOUT = 3.0  # seconds


@dataclass(frozen=True)
class PlanCheck:
    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Inspected:
    """What is known of a recipe's models and prompts."""

    student: Geometry
    teacher: Geometry
    sources: dict[str, str]  # "student" and "teacher" -> where the geometry is from
    checks: list[PlanCheck]
    prompt_lengths: list[int] = field(default_factory=list)  # tokens; none where not known

    @property
    def mean_prompt(self) -> float | None:
        return fmean(self.prompt_lengths) if self.prompt_lengths else None


def inspect(config: Config) -> Inspected:
    """Geometries and checks. Raises UsageError where a model cannot be planned at all."""
    hub = Hub()
    own = (config.model.student, config.model.trust_remote_code)
    section = config.only_teacher
    other = (section.tokenizer or section.model, section.trust_remote_code)
    student, teacher, sources = geometries(config, hub)
    unreachable = [name for name, _ in (own, other) if not hub.can_load(name)]
    if unreachable:
        why = f"hub unreachable: {', '.join(dict.fromkeys(unreachable))}"
        skipped = [
            PlanCheck(name, "not checked", why)
            for name in ("vocabulary", "stop ids", "chat template", "prompts")
        ]
        context = check_context(config, student, teacher, None)
        return Inspected(student, teacher, sources, [*skipped, context])
    tokenizers = loading.load_tokenizer(*own), loading.load_tokenizer(*other)
    checks = [
        _check("vocabulary", lambda: check_vocabulary(*tokenizers)),
        _check("stop ids", lambda: check_stop_ids(config, *tokenizers)),
        _check("chat template", lambda: check_template(config, *tokenizers)),
    ]
    prompts, check = check_prompts(config, *tokenizers, hub)
    context = check_context(config, student, teacher, prompts)
    lengths = [len(prompt.prompt_ids) for prompt in prompts or []]
    return Inspected(student, teacher, sources, [*checks, check, context], lengths)


def geometries(config: Config, hub: "Hub") -> tuple[Geometry, Geometry, dict[str, str]]:
    """Of student and teacher, and where each is from."""
    student, own = geometry(config.model.student, config.model.trust_remote_code, hub)
    teacher, other = geometry(config.only_teacher.model, config.only_teacher.trust_remote_code, hub)
    return student, teacher, {"student": own, "teacher": other}


class Hub:
    """Whether names can be loaded; the Hub is asked at most once."""

    def __init__(self) -> None:
        self._reachable: bool | None = None

    def can_load(self, name: str) -> bool:
        if huggingface_hub.constants.is_offline_mode():
            return is_local(name) or is_cached(name)
        return is_local(name) or self.reachable()

    def reachable(self) -> bool:
        """Asked for with a short time-out: the libraries' own retries take half a minute."""
        if self._reachable is None:
            self._reachable = self._ask()
        return self._reachable

    def _ask(self) -> bool:
        request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
        except urllib.error.HTTPError:
            return True  # it answered
        except OSError:
            return False
        return True


def is_local(name: str) -> bool:
    return (
        name.startswith((loading.EMBEDDED_PREFIX, data_prompts.EMBEDDED_PREFIX))
        or Path(name).suffix in data_prompts.FILE_ENDINGS
        or Path(loading.resolve(name)).exists()
    )


def is_cached(name: str) -> bool:
    """Whether the Hub's cache holds this model's config."""
    return isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)


def geometry(name: str, trust_remote_code: bool, hub: Hub) -> tuple[Geometry, str]:
    """A model's geometry and where it is from: its config, or the table of the paper's models."""
    if hub.can_load(name):
        config = loading.load_config(name, trust_remote_code)
        return Geometry.from_fields(name, config.get_text_config().to_dict()), "config"
    if name in KNOWN:
        return KNOWN[name], "built in"
    raise UsageError(
        f"{name}: the hub cannot be reached, and its geometry is not built in (built in: "
        f"{', '.join(KNOWN)}); give a local directory with its config.json"
    )


def _check(name: str, check: Callable[[], tuple[Status, str]]) -> PlanCheck:
    try:
        return PlanCheck(name, *check())
    except UsageError as error:
        return PlanCheck(name, "failed", str(error))


def check_vocabulary(tokenizer: Any, teacher_tokenizer: Any) -> tuple[Status, str]:
    loading.check_vocabularies(tokenizer, teacher_tokenizer)
    return "ok", f"{len(tokenizer):,} tokens, the same in both models"


def check_stop_ids(config: Config, tokenizer: Any, teacher_tokenizer: Any) -> tuple[Status, str]:
    own, other = (
        stops.stop_ids(its, loading.load_generation_config(name))
        for its, name in (
            (tokenizer, config.model.student),
            (teacher_tokenizer, config.only_teacher.model),
        )
    )
    notice = stops.difference(own, other, config.objective.stop, tokenizer)
    if notice:
        return "warning", notice
    return "ok", f"both end a turn with {tokenizer.convert_ids_to_tokens(own[0])}"


def check_template(config: Config, tokenizer: Any, teacher_tokenizer: Any) -> tuple[Status, str]:
    settings = (["?"], config.data.chat, config.data.system)
    (ids,) = data_prompts.encode_chat(tokenizer, *settings)
    if config.data.teacher_column is not None:
        data_prompts.encode_chat(teacher_tokenizer, *settings)
    if config.data.chat is None:
        return "ok", "prompts are plain text"
    return "ok", f"the student's, {len(ids) - 1} tokens around a prompt"


def check_prompts(
    config: Config, tokenizer: Any, teacher_tokenizer: Any, hub: Hub
) -> tuple[list[data_prompts.Prompt] | None, PlanCheck]:
    source = config.data.prompts
    if not hub.can_load(source):
        return None, PlanCheck("prompts", "not checked", f"hub unreachable: {source}")
    try:
        prompts = data_prompts.load_prompts(config.data, tokenizer, {"": teacher_tokenizer})
    except UsageError as error:
        return None, PlanCheck("prompts", "failed", str(error))
    lengths = [len(prompt.prompt_ids) for prompt in prompts]
    detail = f"{len(prompts):,} of {fmean(lengths):.0f} tokens on average, at most {max(lengths)}"
    return prompts, PlanCheck("prompts", "ok", detail)


def check_context(
    config: Config,
    student: Geometry,
    teacher: Geometry,
    prompts: Sequence[data_prompts.Prompt] | None,
) -> PlanCheck:
    """Whether prompts and completions fit; without prompts, how long they may be."""
    own, other = (g.context or loading.UNLIMITED for g in (student, teacher))
    new = config.rollout.max_new_tokens
    room = min(own, other) - new
    if room < 1:
        detail = f"rollout.max_new_tokens={new} leaves no room for a prompt in {min(own, other)}"
        return PlanCheck("context", "failed", detail)
    if prompts is None:
        return PlanCheck("context", "ok", f"{new:,} new tokens leave {room:,} for a prompt")
    return _check("context", lambda: _fitting(prompts, own, other, new))


def _fitting(
    prompts: Sequence[data_prompts.Prompt], own: int, other: int, new: int
) -> tuple[Status, str]:
    data_prompts.check_lengths(prompts, own, other, new)
    return "ok", f"every prompt and {new:,} new tokens fit in {min(own, other):,}"
