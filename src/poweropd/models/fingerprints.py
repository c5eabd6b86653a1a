"""Fingerprints of what a run is trained from, so that it does not go on with something else."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from poweropd.data.off_policy import OffPolicy
from poweropd.data.prompts import Prompt
from poweropd.models import loading, places

BLOCKS, BLOCK_BYTES = 16, 2**16  # what is read of each weight file


def of_weights(name: str) -> str:
    """Returns a fingerprint of a model's weights: its Hub commit, or a hash of its files.

    Of each file its size and `BLOCKS` evenly spaced blocks are read, so that a copy of a model has
    the fingerprint of the original and a large one costs nothing. An adapter includes its base.
    """
    path, base = Path(places.resolve(name)), loading.adapted(name)
    if not path.is_dir():
        return str(loading.load_config(name).to_dict().get("_commit_hash"))
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    parts = [part for file in files for part in _sampled(file)]
    return _hash_of([*parts, (of_weights(base) if base else "").encode()])


def _sampled(file: Path) -> Iterable[bytes]:
    size = file.stat().st_size
    yield f"{file.name} {size}".encode()
    with file.open("rb") as opened:
        for block in range(BLOCKS):
            opened.seek(max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1))
            yield opened.read(BLOCK_BYTES)


def of_prompts(prompts: Sequence[Prompt]) -> str:
    """Returns a fingerprint of all prompts, as both models read them, in their order."""
    return _hash_of(
        part
        for prompt in prompts
        for part in (
            array("q", prompt.prompt_ids).tobytes(),
            array("q", prompt.teacher_prompt_ids).tobytes(),
            prompt.domain.encode(),
        )
    )


def of_completions(completions: OffPolicy) -> str:
    """Returns a fingerprint of a file's completions by their prompts, with their log-probs."""
    return _hash_of(
        part
        for index, found in sorted(completions.completions.items())
        for one in found
        for part in (
            array("q", [index, *one.ids]).tobytes(),
            array("d", one.log_probs).tobytes(),
        )
    )


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a fingerprint of a tokenizer's vocabulary."""
    return _hash_of(
        f"{token}\t{i}\n".encode() for token, i in sorted(tokenizer.get_vocab().items())
    )


def of_ids(ids: Iterable[int]) -> str:
    """Returns a fingerprint of a set of ids."""
    return _hash_of([array("q", sorted(ids)).tobytes()])


def _hash_of(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:32]
