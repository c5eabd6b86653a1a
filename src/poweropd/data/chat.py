"""Prompts as a model reads them: its chat template, its special tokens, and the traps in both."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import jinja2

from poweropd.data.messages import Conversation, Part, Tool, Turn, content_text, tool_name
from poweropd.errors import UsageError, one_line
from poweropd.stops import special_ids

if TYPE_CHECKING:  # it takes a second to import
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("poweropd")

_PROBE = "Is 7 odd?"
Form = Callable[[str | list[Part]], object]


def _as_text(content: str | list[Part]) -> str:
    return content_text({"content": content})


def _as_parts(content: str | list[Part]) -> list[Part]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


# The forms in which templates take a content: as a text, or as a list of parts.
_FORMS: tuple[Form, ...] = (_as_text, _as_parts)


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Conversation],
    chat: Mapping[str, Any] | None,
    system: str | None = None,
) -> list[list[int]]:
    """Returns the token ids of each prompt, up to the point where the model goes on.

    A text is one user turn. `chat` holds the chat template's own arguments, such as
    enable_thinking; None stands for the plain text without any template. `system` is put before
    prompts without a system turn. Raises UsageError if a template fails or leaves a text out.
    """
    asked = [Conversation.of_text(one) if isinstance(one, str) else one for one in prompts]
    if chat is None and system:
        raise UsageError("a system turn needs the chat template: drop one of the two settings")
    if chat is None:
        return [_encode_plain(tokenizer, _plain_text(one)) for one in asked]
    if not tokenizer.chat_template:
        raise UsageError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; to give it plain text "
            "set data.chat=null in a recipe, --no-chat-template in poweropd eval"
        )
    form = content_form(tokenizer, chat, system)
    rendered = [_rendered(tokenizer, one, chat, system, form) for one in asked]
    encoded = tokenizer(rendered, add_special_tokens=False)["input_ids"] if rendered else []
    texts = [text for one in asked if (text := one.text) is not None]
    _notice_rendered(tokenizer, texts, [ids[0] for ids in encoded if ids])
    return [list(ids) for ids in encoded]


def _plain_text(prompt: Conversation) -> str:
    """Returns the text of a prompt; raises UsageError for one that needs a chat template."""
    if prompt.text is None:
        raise _prompt_error(
            prompt,
            "messages, a row's system turn and tools need the chat template: drop data.chat=null, "
            "or give plain text",
        )
    return prompt.text


def _prompt_error(prompt: Conversation, message: str) -> UsageError:
    """Returns the error of a prompt, which begins with its place if that is known."""
    return UsageError(f"{prompt.place}: {message}" if prompt.place else message)


def _rendered(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Conversation,
    chat: Mapping[str, Any],
    system: str | None,
    form: Form,
) -> str:
    """Returns a prompt as its chat template renders it; raises UsageError if a part is lost."""
    before = [] if prompt.has_system or not system else [{"role": "system", "content": system}]
    turns = [*before, *prompt.turns]
    formed = [{**turn, "content": form(turn["content"])} for turn in turns]
    try:
        text = render_chat(tokenizer, formed, chat, prompt.tools, prompt.continues)
    except UsageError as error:
        raise _prompt_error(prompt, str(error)) from None
    for turn in turns:
        lost = _lost_text(turn, text)
        if lost is not None:
            whose = "prompt's" if turn["role"] == "user" else f"{turn['role']}'s"
            raise _prompt_error(
                prompt,
                f"{tokenizer.name_or_path}: its chat template leaves the {whose} text out or "
                f"changes it: {lost[:80]!r} became {text[:160]!r}; give it another template, or "
                "render the prompts yourself and set data.chat=null",
            )
    for tool in prompt.tools or ():
        if tool_name(tool) not in text:
            raise _prompt_error(
                prompt,
                f"{tokenizer.name_or_path}: its chat template leaves out the tool "
                f"{tool_name(tool)!r}: give it a template that takes tools, or drop the column",
            )
    return text


def _lost_text(turn: Turn, rendered: str) -> str | None:
    """Returns a text of the turn that a template left out or changed; None if there is none.

    It may leave out the assistant's reasoning, and write a tool's answer as JSON.
    """
    for part in _as_parts(turn["content"]):
        text = part["text"].strip()
        if turn["role"] == "assistant":
            text = text.rpartition("</think>")[2].strip()
        as_json = json.dumps(text, ensure_ascii=False)[1:-1]
        if text not in rendered and (turn["role"] != "tool" or as_json not in rendered):
            return text
    return None


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
            form = content_form(tokenizer, {}, None)
            prompts.append(render_chat(tokenizer, _probe(None, form), {}))
        except UsageError:
            prompts.append("")
    return prompts[0] != prompts[1]


def _probe(system: str | None, form: Form) -> list[Turn]:
    before = [{"role": "system", "content": form(system)}] if system else []
    return [*before, {"role": "user", "content": form(_PROBE)}]


def content_form(
    tokenizer: "PreTrainedTokenizerBase", chat: Mapping[str, Any], system: str | None
) -> Form:
    """Returns the form of content in which the template keeps a text."""
    failure = None
    for form in _FORMS:
        try:
            if _PROBE in render_chat(tokenizer, _probe(system, form), chat):
                return form
        except UsageError as error:
            failure = failure or error
    raise failure or UsageError(
        f"{tokenizer.name_or_path}: its chat template leaves the user's text out, given as text "
        "and as content parts; give it another template, or render the prompts yourself and set "
        "data.chat=null"
    )


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Turn],
    chat: Mapping[str, Any],
    tools: list[Tool] | None = None,
    continues: bool = False,
) -> str:
    """Returns turns as the template renders them; raises UsageError, of one line, if it fails."""
    try:
        return str(
            tokenizer.apply_chat_template(
                list(turns),
                tools=tools,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tokenize=False,
                **chat,
            )
        )
    except (TypeError, ValueError, jinja2.TemplateError) as error:
        reason = one_line(str(error))[:300]
        raise UsageError(f"{tokenizer.name_or_path}: its chat template fails: {reason}") from None


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
