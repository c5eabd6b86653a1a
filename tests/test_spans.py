"""Two tokenizations of one text, and the smallest spans that both write in whole tokens.

The tokenizers of Qwen3, Llama 3.1 and Gemma 3 are looked for in POWEROPD_TOKENIZERS, a folder with
qwen3, llama3_1 and gemma3; texts in POWEROPD_DATA, else in shared/data beside the repository.
"""

import json
import os
import random
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_byte_tokenizer
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from poweropd.errors import UsageError
from poweropd.models.token_bytes import TokenBytes
from poweropd.teachers.spans import Spans, text_spans

TEXTS = [
    "The quick brown fox, 12345 times: the end of the text.\n\n\tIndented  twice   thrice.\r\n",
    "🤯🤯 한국어 中文字 é e\u0301 नमस्ते עברית 👩‍👩‍👧 the text 🏳️‍🌈 times the fox",
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(size: int) -> Tokenizer:
    """A byte-level BPE with a normal form, as Qwen's."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet)
    )
    return made


def byte_fallback(size: int) -> Tokenizer:
    """A BPE of characters that falls back to bytes, as Gemma's."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(TEXTS[:1] * 3, trainers.BpeTrainer(vocab_size=size))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", *BYTE_TOKENS, *model["vocab"]]
    made = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(pair) for pair in model["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return made


def sentence_piece(size: int) -> Tokenizer:
    """A unigram model that puts a space in front of a text, as Llama 2's."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS[:1] * 3, trainers.UnigramTrainer(vocab_size=size))
    pieces = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["vocab"]]
    known = {piece for piece, _ in pieces}
    spare = [(token, -20.0) for token in BYTE_TOKENS if token not in known]
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *pieces, *spare], 0, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 0)]
    )
    return made


MAKERS = {
    "bytes": make_byte_tokenizer,
    "byte level": lambda: wrapped(byte_level(300)),
    "more of it": lambda: wrapped(byte_level(400)),
    "byte fallback": lambda: wrapped(byte_fallback(80)),
    "sentence piece": lambda: wrapped(sentence_piece(60)),
}
PAIRS = list(product(MAKERS, MAKERS))


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@cache
def made(name: str) -> TokenBytes:
    return TokenBytes(MAKERS[name](), "model.student")


def check_cover(student: TokenBytes, teacher: TokenBytes, ids: Sequence[int], text: str) -> Spans:
    """Asserts that the spans are the finest common cut of the text, which all of them make up."""
    spans = text_spans(student, teacher, ids)
    sides = ((student.of(ids), spans.student), (teacher.of(spans.teacher_ids), spans.teacher))
    written = []
    for pieces, numbers in sides:
        assert b"".join(pieces) == text.encode()
        own = [b""] * spans.number
        for piece, number in zip(pieces, numbers, strict=True):
            own[number] += piece
        written.append(own)
    assert written[0] == written[1]
    assert all(written[0])
    ends = [{*accumulate(map(len, pieces))} - {0} for pieces, _ in sides]
    assert spans.number == len(ends[0] & ends[1])
    return spans


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
@settings(max_examples=8)
@given(
    st.text(st.sampled_from("the fox 12\n\t  \u00a0é\u0301🤯中한👩\u200d🏳\ufe0f."), max_size=30)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=20)
)
def test_spans_cover_every_byte_of_a_text(pair: tuple[str, str], text: str) -> None:
    student, teacher = map(made, pair)
    ids = student.encode(text)
    spans = check_cover(student, teacher, ids, text)
    assert all(spans.canonical)
    if pair[0] == pair[1]:
        assert spans.teacher_ids == ids
        assert spans.number == len(ids) - student.of(ids).count(b"")


def test_a_character_in_parts_is_a_span_of_its_bytes() -> None:
    student, teacher = made("bytes"), made("byte level")
    ids = student.encode("a🤯b")
    spans = check_cover(student, teacher, ids, "a🤯b")
    (whole,) = [n for n in {*spans.teacher} if spans.teacher.count(n) == 1 and 0 < n < 2]
    assert spans.student == [0, whole, whole, whole, whole, 2]


def test_tokens_cut_where_the_other_tokenizer_merges() -> None:
    student, teacher = made("bytes"), made("more of it")
    text = "the end"
    spans = check_cover(student, teacher, student.encode(text), text)
    assert spans.number == len(spans.teacher_ids) < len(text)


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from([0x61, 0x20, 0xF0, 0x9F, 0xA4, 0xAF, 0xFF, 0xC3, 0xE4]), max_size=12)
)
@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
def test_bytes_that_are_no_text_stand_apart_and_lose_nothing_else(
    name: str, data: list[int]
) -> None:
    """The oracle: which bytes Python keeps if it ignores the wrong ones, one by one."""
    student, teacher = made("bytes"), made(name)
    single = {piece: i for i in range(259) if len(piece := student.of([i])[0]) == 1}
    ids = [single[bytes([byte])] for byte in data]
    spans = text_spans(student, teacher, ids)
    text = bytes(data).decode(errors="surrogateescape")
    good = [
        not "\udc80" <= letter <= "\udcff"
        for letter in text
        for _ in letter.encode(errors="surrogateescape")
    ]
    assert spans.canonical == good
    assert teacher.of(spans.teacher_ids) == teacher.of(
        teacher.encode("".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in text))
    )
    heard = [b""] * (spans.number + 1)
    for piece, number in zip(teacher.of(spans.teacher_ids), spans.teacher, strict=True):
        heard[number] += piece
    for number in range(spans.number):
        own = [i for i, n in enumerate(spans.student) if n == number]
        if all(good[i] for i in own):
            assert bytes(data[i] for i in own) == heard[number]


def test_a_token_that_the_tokenizer_would_not_have_written_is_told() -> None:
    student, teacher = made("more of it"), made("bytes")
    first, last = student.encode("12345 times")[0], student.encode(" times")
    assert len(last) == 1
    letters = [i for letter in " times" for i in student.encode(letter)]
    ids = [first, *letters, *last]
    spans = text_spans(student, teacher, ids)
    assert b"".join(student.of(ids)) == b"".join(student.of([first])) + b" times times"
    assert spans.canonical == [True, *[False] * len(letters), True]
    assert spans.number == len(ids)


def test_from_where_the_teacher_changes_the_text_nothing_is_in_a_span() -> None:
    teacher = wrapped(Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")))
    teacher.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    teacher.backend_tokenizer.decoder = decoders.Fuse()
    student = made("bytes")
    spans = text_spans(student, TokenBytes(teacher, "teacher"), student.encode("abxab"))
    assert spans.student == [0, 1, 2, 2, 2]
    assert spans.teacher == [0, 1, 2, 2, 2]
    assert spans.number == 2


def test_an_id_without_a_token_is_no_text() -> None:
    assert made("bytes").of([100_000]) == ["\ufffd".encode()]


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), None])
def test_a_tokenizer_without_bytes_of_its_own_is_refused(decoder: decoders.Decoder | None) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(UsageError, match=r"^teacher: .*needs a tokenizer that gives back the text"):
        TokenBytes(wrapped(tokenizer), "teacher")


def real(name: str) -> TokenBytes:
    folder = os.environ.get("POWEROPD_TOKENIZERS")
    if folder is None:
        pytest.skip("POWEROPD_TOKENIZERS does not name a folder with the real tokenizers")
    return TokenBytes(AutoTokenizer.from_pretrained(Path(folder) / name), name)


def real_texts(count: int) -> list[str]:
    data = Path(os.environ.get("POWEROPD_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not data.is_dir():
        pytest.skip(f"{data} is not here")
    files = [path.read_text(encoding="utf-8") for path in sorted(data.glob("*.jsonl"))]
    lines = [line for text in files for line in text.split("\n") if line]
    random.Random(0).shuffle(lines)
    texts = (value for line in lines for value in json.loads(line).values())
    return [text for text in texts if isinstance(text, str) and len(text) > 20][:count]


@pytest.mark.thorough
def test_spans_cover_every_byte_of_real_texts_in_real_tokenizers() -> None:
    tokenizers = {name: real(name) for name in ("qwen3", "llama3_1", "gemma3")}
    texts = [*real_texts(1000), *TEXTS, "<|im_end|><bos> <think>\n\n\n</think> \r\n\t <0x0A>"]
    assert len(texts) > 1000
    for student, teacher in product(tokenizers.values(), repeat=2):
        for text in texts:
            ids = student.encode(text)
            spans = check_cover(student, teacher, ids, text)
            assert all(spans.canonical)
            if student is teacher:
                assert spans.student == [*range(len(ids))]
