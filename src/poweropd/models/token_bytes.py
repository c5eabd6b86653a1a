"""A tokenizer by bytes: which bytes each token stands for, and the tokens of a text, exactly.

Decoding token by token would not do: a token may hold a part of a character, and a decoder may
treat the first token of a text in another way than the rest.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from poweropd.errors import UsageError
from poweropd.stops import special_ids

#: Steps of decoders that write each token's own text, whatever its neighbours are. The first token
#: of a text may lose a space.
DECODERS = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip"}
#: Normalizers that only change how tokenizers write spaces. Others change the text.
NORMALIZERS = {"Prepend", "Replace", "Sequence"}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # of what is no text

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # GPT-2's alphabet
_ANCHOR = "a"  # a token in front of another one, which is then not the first

Json = dict[str, Any]


class TokenBytes:
    """The tokens of one tokenizer as bytes.

    Text is encoded as it is: a normal form (such as NFC) is not applied, and the name of a special
    token in a text is text. Raises UsageError for a tokenizer whose tokens have no bytes of their
    own; `key` is that of the recipe that names it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
        if not tokenizer.is_fast:
            raise UsageError(
                f"{key}: {tokenizer.name_or_path}: teacher.align=spans needs a tokenizer.json, by "
                "which the bytes of a token are known; this tokenizer has none"
            )
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        kinds = {step["type"] for step in _steps(spec["decoder"])}
        if not kinds or kinds - DECODERS:
            found = ", ".join(sorted(kinds - DECODERS)) or "none"
            raise UsageError(
                f"{key}: {tokenizer.name_or_path}: teacher.align=spans needs a tokenizer that "
                f"gives back the text it encodes, by one of {', '.join(sorted(DECODERS))}; its "
                f"decoder is {found}"
            )
        spec["normalizer"] = _kept(spec["normalizer"])
        for step in _steps(spec["pre_tokenizer"]):
            if step["type"] == "ByteLevel":
                step["add_prefix_space"] = False  # its decoder would not take it away again
        spec["truncation"] = spec["padding"] = None
        self._tokenizer = Tokenizer.from_str(json.dumps(spec))
        self._tokenizer.encode_special_tokens = True
        self.vocabulary = tokenizer.get_vocab()
        self.special = {
            token: i
            for i in special_ids(tokenizer)
            if (token := self._tokenizer.id_to_token(i)) is not None
        }
        self._added = {*tokenizer.added_tokens_decoder}
        self._kinds, self._known = kinds, dict[int, bytes]()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without any that the tokenizer adds around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def of(self, ids: Sequence[int]) -> list[bytes]:
        """Returns the bytes of each of a text's tokens.

        An id without a token is no text, and counts as U+FFFD.
        """
        found = [self._of(i) for i in ids]
        if found and self._loses_space:
            found[0] = found[0].removeprefix(b" ")
        return found

    @cached_property
    def _loses_space(self) -> bool:
        """Returns whether the decoder drops the space in front of a text, which encoding adds."""
        decoder = self._tokenizer.decoder
        return "ByteLevel" not in self._kinds and decoder.decode(["\u2581" + _ANCHOR]) == _ANCHOR

    def _of(self, token_id: int) -> bytes:
        if token_id not in self._known:
            token = self._tokenizer.id_to_token(token_id)
            self._known[token_id] = (
                REPLACEMENT.encode() if token is None else self._spelled(token_id, token)
            )
        return self._known[token_id]

    def _spelled(self, token_id: int, token: str) -> bytes:
        """Returns the bytes of a token that is not the first of a text."""
        if "ByteLevel" in self._kinds:
            if token_id in self._added or not _BYTES.keys() >= {*token}:
                return token.encode()
            return bytes(_BYTES[letter] for letter in token)
        if "ByteFallback" in self._kinds and (byte := _FALLBACK.fullmatch(token)):
            return bytes.fromhex(byte[1])
        return self._tokenizer.decoder.decode([_ANCHOR, token]).removeprefix(_ANCHOR).encode()


def _steps(part: Json | None) -> Iterator[Json]:
    """Yields the steps of a part of a tokenizer, with the sequences that hold others."""
    if part is not None:
        yield part
        for inner in part.get("decoders") or part.get("pretokenizers") or ():
            yield from _steps(inner)


def _kept(normalizer: Json | None) -> Json | None:
    """Returns a normalizer without the steps that change a text."""
    if normalizer is None or normalizer["type"] not in NORMALIZERS:
        return None
    if normalizer["type"] != "Sequence":
        return normalizer
    steps = [kept for step in normalizer["normalizers"] if (kept := _kept(step)) is not None]
    return {**normalizer, "normalizers": steps} if steps else None
