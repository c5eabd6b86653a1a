"""Stop ids and terminal-token policies."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from poweropd import stops

END_OF_TEXT, TURN_END = 0, 2


def tokenizer_and_config(directory: Path) -> tuple[object, GenerationConfig]:
    return AutoTokenizer.from_pretrained(directory), GenerationConfig.from_pretrained(directory)


def test_stop_ids_start_with_the_models_own(student_dir: Path, teacher_dir: Path) -> None:
    assert stops.stop_ids(*tokenizer_and_config(student_dir)) == [END_OF_TEXT, TURN_END]
    assert stops.stop_ids(*tokenizer_and_config(teacher_dir)) == [TURN_END]


def test_stop_ids_of_the_generation_config_come_first(student_dir: Path) -> None:
    tokenizer, _ = tokenizer_and_config(student_dir)
    for configured, expected in ((7, [7]), ([7, 5], [7, 5]), ([TURN_END], [TURN_END]), (None, [])):
        found = stops.stop_ids(tokenizer, GenerationConfig(eos_token_id=configured))
        assert found == list(dict.fromkeys([*expected, END_OF_TEXT, TURN_END]))


def test_only_a_special_token_ends_a_template_s_turn(student_dir: Path) -> None:
    tokenizer, config = tokenizer_and_config(student_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}+1{% endfor %}"
    assert stops.stop_ids(tokenizer, config) == [END_OF_TEXT]


def test_a_difference_is_said_with_names(student_dir: Path) -> None:
    tokenizer, _ = tokenizer_and_config(student_dir)
    notice = stops.difference([END_OF_TEXT, TURN_END], [TURN_END], "mask", tokenizer)
    assert notice is not None
    assert "<|endoftext|> or <|im_end|>" in notice
    assert stops.difference([TURN_END], [TURN_END], "mask", tokenizer) is None


def test_a_model_without_any_stop_is_refused(student_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    tokenizer.eos_token = None
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no stop token found"):
        stops.stop_ids(tokenizer, GenerationConfig())


IDS = torch.tensor([[5, 21, 6, 21], [5, 22, 9, 9], [5, 6, 7, 8], [21, 9, 9, 9], [9, 9, 9, 9]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])


def test_only_the_last_valid_token_is_terminal() -> None:
    found = stops.targets(IDS, MASK, [21, 22], [22], "mask")
    assert found.loss_mask.int().tolist() == [
        [1, 1, 1, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]


def test_canonical_and_cross_score_the_teachers_stop() -> None:
    canonical = stops.targets(IDS, MASK, [21, 22], [22], "canonical")
    cross = stops.targets(IDS, MASK, [21, 22], [22], "cross")
    assert canonical.student_targets[0].tolist() == [5, 21, 6, 22]
    assert canonical.teacher_targets[0].tolist() == [5, 21, 6, 22]
    assert cross.student_targets[0].tolist() == [5, 21, 6, 21]
    assert cross.teacher_targets[0].tolist() == [5, 21, 6, 22]
    assert torch.equal(cross.loss_mask, MASK.bool())


def test_semantic_trains_the_stop_as_it_was_sampled() -> None:
    raw, semantic = (stops.targets(IDS, MASK, [21], [22], p) for p in ("raw", "semantic"))
    assert all(torch.equal(a, b) for a, b in zip(raw, semantic, strict=True))


def test_no_completions_and_empty_completions() -> None:
    for shape in ((0, 3), (2, 0)):
        empty = torch.zeros(shape, dtype=torch.long)
        assert stops.targets(empty, empty, [1], [2]).loss_mask.shape == shape


def test_an_unknown_policy_and_missing_stops_are_named() -> None:
    with pytest.raises(ValueError, match="one of raw, mask, canonical, cross, semantic"):
        stops.targets(IDS, MASK, [21], [22], "semantics")
    with pytest.raises(ValueError, match="at least one stop id"):
        stops.targets(IDS, MASK, [21], [])
