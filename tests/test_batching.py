"""From completions to micro-batches."""

from hypothesis import given
from hypothesis import strategies as st
from rollout_cases import make_rollout

from poweropd.data.batch import collate, pack
from poweropd.data.rollout import Rollout, make_examples

STOP, TEACHER_STOP = 21, 22


def rollout(index: int, prompt: list[int], completion: list[int], teacher: list[int]) -> Rollout:
    return make_rollout(
        index,
        prompt,
        completion,
        log_probs=[0.0] * len(completion),
        teacher_prompt_ids=teacher,
    )


ROLLOUTS = [
    rollout(1, [1], [7, 8, STOP], [2, 2, 1]),
    rollout(0, [3, 4, 5], [9, STOP], [3, 4, 5]),
    rollout(2, [6], [STOP], [6]),
]


def test_examples_hold_the_trained_tokens_in_a_fixed_order() -> None:
    examples = make_examples(ROLLOUTS, [STOP], [TEACHER_STOP], "mask")
    assert [e.rollout.request.prompt_index for e in examples] == [
        0,
        1,
    ]  # the lone stop trains nothing
    assert examples[1].positions.tolist() == [0, 1]
    assert examples[1].student_targets.tolist() == [7, 8]
    # The model reads up to the token that predicts the last trained one, and no further.
    assert examples[1].student_length == 2
    assert examples[1].teacher_length == 4


def test_a_batch_aligns_both_models_on_the_completion() -> None:
    batch = collate(make_examples(ROLLOUTS, [STOP], [TEACHER_STOP], "cross"))
    for view, stop in ((batch.student, STOP), (batch.teacher, TEACHER_STOP)):
        assert view.targets.tolist() == [9, stop, 7, 8, stop, stop]
        before = view.input_ids.flatten()[view.index]  # the token read just before each target
        assert before[[1, 3, 4]].tolist() == [9, 7, 8]
        assert view.inputs["attention_mask"].flatten()[view.index].all()
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 0]
    assert batch.completion_index.tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.student.input_ids[1].tolist() == [1, 7, 8, 0]
    assert batch.teacher.input_ids[1].tolist() == [2, 2, 1, 7, 8]


def test_each_model_takes_its_own_layout() -> None:
    examples = make_examples(ROLLOUTS, [STOP], [TEACHER_STOP], "raw")
    for flat, teacher_flat in ((False, False), (True, False), (False, True)):
        batch = collate(examples, flat, teacher_flat)
        rows = [len(view.input_ids) for view in (batch.student, batch.teacher)]
        assert rows == [1 if flat else 3, 1 if teacher_flat else 3]
        assert batch.teacher.targets.tolist() == [9, STOP, 7, 8, STOP, STOP]


def test_a_batch_of_nothing_still_has_a_row() -> None:
    batch = collate([])
    assert batch.student.input_ids.shape == (1, 1)
    assert len(batch.student.index) == len(batch.positions) == 0
    assert batch.teacher_log_probs is not None  # it counts as scored
    assert len(batch.teacher_log_probs) == 0


def test_flat_packing_fills_the_budget_to_the_last_token() -> None:
    assert pack([3, 7, 5, 5], 10, True) == [[1, 0], [2, 3]]
    assert pack([3, 7, 5, 5], 10) == [[1], [2, 3], [0]]


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_packing_keeps_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = pack(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert len(group) * longest <= budget or len(group) == 1


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 1000))
def test_packing_puts_neighbours_in_length_together(lengths: list[int], budget: int) -> None:
    packed = [lengths[i] for group in pack(lengths, budget) for i in group]
    assert packed == sorted(lengths, reverse=True)
