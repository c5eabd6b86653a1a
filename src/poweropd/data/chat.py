"""Texts as a model reads them: its chat template, its special tokens, and the traps in both."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import jinja2

from poweropd.errors import UsageError
from poweropd.stops import special_ids

if TYPE_CHECKING:  # it takes a second to import
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("poweropd")

Turn = dict[str, Any]  # role and content, as chat templates take them
_PROBE = "Is 7 odd?"
# The forms in which templates take a text: as it is, or as a list of parts.
_FORMS: tuple[Callable[[str], object], ...] = (
    lambda text: text,
    lambda text: [{"type": "text", "text": text}],
)


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    chat: Mapping[str, Any] | None,
    system: str | None = None,
) -> list[list[int]]:
    """Returns the token ids of one user turn each, up to the point where the model's turn begins.

    `chat` holds the chat template's own arguments, such as enable_thinking; None stands for the
    plain text without any template. Raises UsageError if a template fails or leaves a text out.
    """
    if chat is None and system:
        raise UsageError("a system turn needs the chat template: drop one of the two settings")
    if chat is None:
        return [_encode_plain(tokenizer, text) for text in texts]
    if not tokenizer.chat_template:
        raise UsageError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; to give it plain text "
            "set data.chat=null in a recipe, --no-chat-template in poweropd eval"
        )
    form = _form(tokenizer, chat, system)
    rendered = [_render(tokenizer, _turns(text, system, form), chat) for text in texts]
    for text, prompt in zip(texts, rendered, strict=True):
        if text.strip() not in prompt:
            raise UsageError(
                f"{tokenizer.name_or_path}: its chat template leaves the prompt's text out or "
                f"changes it: {text.strip()[:80]!r} became {prompt[:160]!r}; give it another "
                "template, or render the prompts yourself and set data.chat=null"
            )
    encoded = tokenizer(rendered, add_special_tokens=False)["input_ids"] if rendered else []
    _notice_rendered(tokenizer, texts, [ids[0] for ids in encoded if ids])
    return [list(ids) for ids in encoded]


def _notice_rendered(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], first_ids: Sequence[int]
) -> None:
    """Tells the user of texts that begin with the special token with which the template begins."""
    beginnings = {i: tokenizer.decode([i]) for i in {*first_ids} & special_ids(tokenizer)}
    for beginning in beginnings.values():
        if any(text.lstrip().startswith(beginning) for text in texts):
            _notify(
                f"prompts begin with {beginning}, as what the chat template makes of them does: "
                "they look rendered already; to give them to the models as they are set "
                "data.chat=null"
            )


def template_differs(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> bool:
    """Says whether two tokenizers render the same user turn differently."""
    prompts = []
    for tokenizer in (one, other):
        try:
            prompts.append(_render(tokenizer, _turns(_PROBE, None, _form(tokenizer, {}, None)), {}))
        except UsageError:
            prompts.append("")
    return prompts[0] != prompts[1]


def _turns(text: str, system: str | None, form: Callable[[str], object]) -> list[Turn]:
    before = [{"role": "system", "content": form(system)}] if system else []
    return [*before, {"role": "user", "content": form(text)}]


def _form(
    tokenizer: "PreTrainedTokenizerBase", chat: Mapping[str, Any], system: str | None
) -> Callable[[str], object]:
    """Returns the form of content in which the template keeps a text."""
    failure = None
    for form in _FORMS:
        try:
            if _PROBE in _render(tokenizer, _turns(_PROBE, system, form), chat):
                return form
        except UsageError as error:
            failure = failure or error
    raise failure or UsageError(
        f"{tokenizer.name_or_path}: its chat template leaves the user's text out, given as text "
        "and as content parts; give it another template, or render the prompts yourself and set "
        "data.chat=null"
    )


def _render(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], chat: Mapping[str, Any]
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(turns), add_generation_prompt=True, tokenize=False, **chat
            )
        )
    except (TypeError, jinja2.TemplateError) as error:
        raise UsageError(f"{tokenizer.name_or_path}: its chat template fails: {error}") from None


def _encode_plain(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Encodes a text as it is, with one beginning-of-sequence token and no end of sequence."""
    ids = list(tokenizer(text)["input_ids"])
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
        _notify(
            f"prompts begin with {bos} already: the tokenizer's own is left out, so that there is "
            "one; set data.chat=null only for prompts that are rendered"
        )
        ids = ids[1:]
    if eos and not text.endswith(eos) and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        _notify(
            f"the tokenizer ends every text with {eos}, which would end a prompt before its "
            "completion: it is left out; to keep it, write it at the end of the prompts"
        )
        ids = ids[:-1]
    return ids


@cache
def _notify(message: str) -> None:
    """Tells the user something once in a process."""
    logger.warning("%s", message)
