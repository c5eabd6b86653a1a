"""Tokenizers that differ by added tokens: what is shared is used, and the rest is nowhere."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_cases import make_request
from tiny_models import CHATML, END_OF_TEXT, TURN_END, make_byte_tokenizer, make_model, make_recipe
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from poweropd import Config, Trainer, stops
from poweropd.config.data import DataConfig
from poweropd.config.teachers import TeacherConfig
from poweropd.data.rollout import Request, Rollout
from poweropd.errors import RunError, UsageError
from poweropd.evaluation import judging
from poweropd.evaluation.divergence_command import ModelOptions, measure_divergence
from poweropd.evaluation.settings import DivergenceSettings
from poweropd.kernels import Head, TeacherHead, compare_heads, full_vocab_loss, score_tokens
from poweropd.models.language_model import Student
from poweropd.models.vocabulary import Vocabulary, unshared_ids
from poweropd.plan import command
from poweropd.rewards import create
from poweropd.rollouts.base import Sampling, shared_weights
from poweropd.rollouts.guards import CheckedEngine
from poweropd.rollouts.renumbered import RenumberedEngine
from poweropd.rollouts.transformers import TransformersEngine
from poweropd.rollouts.vllm import VllmEngine, _process, vllm_parameters
from poweropd.training.build import RunInputs

BYTES, ROWS = 259, 320  # tokens of the tiny tokenizer, ids of its models
# The student's and the teacher's added tokens: a gap between shared ones, and ids past them.
OWN, OTHER = ["<a>", "<gap>", "<b>", "<c>", "<end>"], ["<a>", "<other>", "<b>", "<c>"]
GAP, LAST, END = BYTES + 1, BYTES + 3, BYTES + 4


def tokenizer(*added: str) -> PreTrainedTokenizerBase:
    made = make_byte_tokenizer()
    made.add_tokens(list(added), special_tokens=True)
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student and a teacher whose added tokens differ."""
    folder = tmp_path_factory.mktemp("models")
    pair = (make_model("qwen2", folder / "s", 0), make_model("qwen2", folder / "t", 1))
    for path, added in zip(pair, (OWN, OTHER), strict=True):
        tokenizer(*added).save_pretrained(path)
    return pair


def recipe(models: tuple[Path, Path], folder: Path, **overrides: Any) -> Config:
    return make_recipe(*models, folder, **overrides)


def test_added_tokens_may_differ_and_no_others() -> None:
    assert unshared_ids(tokenizer(*OWN), tokenizer(*OWN)) == []
    assert unshared_ids(tokenizer(*OWN), tokenizer(*OTHER)) == [GAP, END]
    assert unshared_ids(tokenizer(*OTHER), tokenizer(*OWN)) == [GAP, END]
    assert unshared_ids(tokenizer("<a>", "<b>"), tokenizer("<b>", "<a>")) == [BYTES, BYTES + 1]
    other = make_byte_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab["Q"], vocab["R"] = vocab["R"], vocab["Q"]
    renamed = type(other)(tokenizer_object=other.backend_tokenizer.from_str(json.dumps(state)))
    message = rf"2 ids differ that are no added tokens: {vocab['R']} \('Q' / 'R'\)"
    with pytest.raises(UsageError, match=message):
        unshared_ids(tokenizer(*OWN), renamed)


def test_the_vocabulary_ends_with_the_last_shared_token() -> None:
    own = tokenizer(*OWN)
    assert Vocabulary.shared(ROWS, own, []) == Vocabulary(ROWS)  # with padding, as ever
    assert Vocabulary.shared(ROWS, own, [GAP, END, END + 7]) == Vocabulary(LAST + 1, (GAP,))
    assert Vocabulary.shared(ROWS, own, [END]) == Vocabulary(LAST + 1)
    assert Vocabulary.shared(GAP, own, [GAP, END]) == Vocabulary(GAP)
    assert Vocabulary(9, (2, 7)).cut(5) == Vocabulary(5, (2,))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_masked_id_is_in_no_softmax(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, other = (torch.randn(n, 8, generator=generator) for n in (5, 12, 12))
    bias = torch.zeros(12)
    bias[[3, 7]] = -torch.inf
    kept = torch.tensor([i for i in range(12) if i not in (3, 7)])
    targets = torch.tensor([0, 1, 4, 8, 9])
    whole = targets.clone().apply_(lambda i: kept[i])

    def numbers(ids: Any, mask: Any, targets: torch.Tensor) -> list[torch.Tensor]:
        leaf = weight.clone().requires_grad_()
        head = Head(leaf[ids], mask, softcap=softcap)
        teacher = TeacherHead(hidden, Head(other[ids], mask, softcap=softcap))
        compared = compare_heads(hidden, head, targets, teacher)
        reward = replace(teacher, reward=create("power", alpha=5.0))
        loss, statistics = full_vocab_loss(hidden, head, targets, reward, 0.2)
        loss.backward()
        own = score_tokens(hidden, head, targets)
        found = [*vars(own).values(), *vars(statistics).values(), compared.reverse_kl]
        return [*found, loss, leaf.grad]

    masked = numbers(slice(None), bias, whole)
    for a, b in zip(masked, numbers(kept, None, targets), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def rollouts(engine: Any, sampling: Sampling) -> list[Rollout]:
    requests = [make_request(i, [40 + i, 50, 60], seed=i) for i in range(8)]
    return sorted(engine.generate(requests, sampling), key=lambda r: r.key)


def favourite(model: Any) -> int:
    """An id that the model's greedy completions hold."""
    engine = TransformersEngine(model, vocab_size=LAST + 1)
    return rollouts(engine, Sampling(4, (TURN_END,), temperature=0))[0].completion_ids[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_engine_without_the_masked_ids_samples_as_one_that_masks_them(
    models: tuple[Path, Path], temperature: float
) -> None:
    # vLLM is the engine without them; here it is played by a model of its size.
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype="float32")
    masked = sorted({favourite(model), GAP})
    student = Student(model, LAST + 1, torch.float32, masked_ids=masked)
    engine = TransformersEngine(model, vocab_size=LAST + 1, masked_ids=masked)
    engine.check_decoding()
    small = AutoModelForCausalLM.from_config(
        type(model.config).from_dict(model.config.to_dict() | {"vocab_size": LAST - 1})
    ).eval()
    small.load_state_dict(dict(shared_weights(student)))
    inner = TransformersEngine(small, vocab_size=LAST - 1)
    sampling = Sampling(12, (TURN_END, END_OF_TEXT), temperature=temperature)
    expected = rollouts(engine, sampling)
    found = rollouts(RenumberedEngine(inner, student.kept_ids()), sampling)
    for a, b in zip(expected, found, strict=True):
        assert (a.completion_ids, a.stopped) == (b.completion_ids, b.stopped)
        assert a.sampling_log_probs == pytest.approx(b.sampling_log_probs, abs=1e-5)
        assert not {*a.completion_ids} & {*masked}
        ids = torch.tensor([a.prompt_ids + a.completion_ids])
        logits = model(ids).logits[0, 2:-1, : LAST + 1]
        logits[:, masked] = -torch.inf
        own = logits.log_softmax(-1).gather(1, ids[0, 3:, None])[:, 0]
        assert a.sampling_log_probs == pytest.approx(own.tolist(), abs=1e-4)
    assert any(len(r.completion_ids) > 4 for r in expected)


def test_vllm_is_given_a_model_of_the_shared_ids(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_process, "llm_for", lambda engine: None)
    trainer = Trainer(recipe(models, tmp_path), progress=False)
    config = recipe(models, tmp_path, **{"rollout.engine": "vllm"})
    engine = VllmEngine.build(trainer.student, config, trainer.accelerator, 30)
    assert engine.options["hf_overrides"] == {"vocab_size": LAST}
    sizes = {name: tensor.shape[0] for name, tensor in engine.weights() if "norm" not in name}
    assert sizes["model.embed_tokens.weight"] == sizes["lm_head.weight"] == LAST
    seen: list[dict[str, Any]] = []

    class Vllm:
        concurrent = False

        def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
            for request in requests:
                seen.append({**vllm_parameters(sampling, request.seed), "ids": request.prompt_ids})
                yield request.rollout([GAP, TURN_END], [-1.0, -1.0], True)

        def sync(self) -> None:
            """Nothing to do."""

    renumbered = RenumberedEngine(Vllm(), trainer.student.kept_ids())
    request = make_request(0, [7, LAST])
    (found,) = renumbered.generate([request], Sampling(4, (TURN_END, LAST)))
    assert (found.completion_ids, found.request) == ([GAP + 1, TURN_END], request)
    assert seen[0]["ids"] == [7, LAST - 1]
    assert seen[0]["stop_token_ids"] == [TURN_END, LAST - 1]
    renumbered.kept = renumbered.kept[:GAP]
    message = r"""expected ids below 260, .* got 260: .*--hf-overrides '\{"vocab_size": 260\}'"""
    with pytest.raises(RunError, match=message):
        next(renumbered.generate([request], Sampling(4, (TURN_END,))))


@pytest.mark.parametrize("kind", ["sampled", "full_vocab"])
def test_a_run_trains_on_what_is_shared(
    models: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level(logging.WARNING)
    options = {"train.steps": 1, "data.holdout": 1, "train.prompts_per_step": 3}
    tree = recipe(models, tmp_path, **options).model_dump(exclude_unset=True)
    config = Config.from_dict(tree | {"objective": {"kind": kind, "stop": "semantic"}})
    RunInputs.load(config)
    assert "share all but 2 added tokens" in caplog.text
    assert f"{GAP} ('<gap>' / '<other>'), {END} ('<end>' / None)" in caplog.text
    trainer = Trainer(config, progress=False)
    assert (trainer.student.vocab_size, trainer.student.masked_ids) == (LAST + 1, (GAP,))
    before = trainer.student.head().weight.detach().clone()
    trainer.train()
    metrics = trainer.run.metrics()[-1]
    assert metrics["sampler/mean_abs_difference"] < 1e-5  # engine and student mask alike
    assert 0 < metrics["eval/divergence/reverse_kl"] < 50
    changed = (trainer.student.head().weight != before).any(1)
    assert changed.float().mean() > 0.9


def test_the_gradient_of_a_masked_row_of_the_head_is_zero(models: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype="float32")
    student = Student(model, LAST + 1, torch.float32, masked_ids=[GAP])
    hidden = torch.randn(3, student.head().weight.shape[1])
    teacher = TeacherHead(hidden.flip(0), student.head(), reward=create("log_ratio"))
    loss, _ = full_vocab_loss(hidden, student.head(), torch.tensor([5, 6, 7]), teacher, 1.0)
    loss.backward()
    gradient = model.get_output_embeddings().weight.grad
    assert gradient[[GAP, *range(END, ROWS)]].abs().max() == 0 < gradient[GAP - 1].abs().max()


@pytest.mark.parametrize(("row", "held"), [("a<gap>b", "<gap>"), ("<end>", "<end>")])
def test_a_prompt_with_a_token_of_the_students_own_is_refused_with_its_row(
    models: tuple[Path, Path], tmp_path: Path, row: str, held: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"problem": t}) + "\n" for t in ("<a><b>", "fine", row)))
    config = recipe(models, tmp_path)
    message = f"data.prompts row 2: its prompt holds {held} .* not the same token to student and"
    with pytest.raises(UsageError, match=message):
        RunInputs.load(config)
    checks = {c.name: c for c in command.make_plan(config, command.Options()).inspected.checks}
    assert checks["prompts"].status == "failed"
    assert checks["vocabulary"].status == "warning"
    assert f"row 2: its prompt holds {held}" in checks["prompts"].detail


def test_other_prompts_of_the_run_are_checked_as_well(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"problem": "2<gap>", "answer": "4"}) + "\n")
    for section, source in (
        ({"benchmarks": [{"name": "own", "file": str(path)}]}, "evaluate.benchmarks: own"),
        ({"divergence": {"prompts": str(path)}}, "evaluate.divergence.prompts"),
    ):
        config = recipe(models, tmp_path)
        config = Config.from_dict(config.model_dump(exclude_unset=True) | {"evaluate": section})
        with pytest.raises(UsageError, match=f"{source} row 0: its prompt holds <gap>"):
            Trainer(config, progress=False)


def test_a_teacher_reads_its_own_tokens_in_its_own_prompts(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    template = CHATML.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<other>")
    teacher = make_model("qwen2", tmp_path / "teacher", 1)
    made = tokenizer(*OTHER)
    made.chat_template = template.replace("assistant\n", "assistant\n<other>")
    made.save_pretrained(teacher)
    config = recipe((models[0], teacher), tmp_path, **{"data.teacher_column": "problem"})
    inputs = RunInputs.load(config)
    assert inputs.unshared == {GAP, END}
    assert inputs.prompts[0].teacher_prompt_ids[-1] == GAP
    assert Trainer(config, progress=False).train().steps == 2


@pytest.mark.parametrize(
    ("own", "other", "policy", "expected"),
    [
        ([TURN_END, END], [TURN_END], "mask", ([TURN_END], [TURN_END])),
        ([END, TURN_END], [GAP], "mask", ([TURN_END], [TURN_END])),
        ([TURN_END], [GAP, END_OF_TEXT], "semantic", ([TURN_END], [END_OF_TEXT])),
        ([END], [TURN_END], "mask", "the student ends a turn with <end> .id 263., which is not"),
        ([TURN_END], [GAP, TURN_END], "cross", "cross scores the teacher's own stop token, id 260"),
        ([TURN_END], [GAP], "canonical", "set objective.stop=mask"),
    ],
)
def test_stops_are_shared_ids(own: list[int], other: list[int], policy: str, expected: Any) -> None:
    arguments = (own, other, {GAP, END}, policy, tokenizer(*OWN))
    if isinstance(expected, tuple):
        assert stops.shared_stops(*arguments) == expected
    else:
        with pytest.raises(UsageError, match=expected):
            stops.shared_stops(*arguments)


def test_an_engine_of_ones_own_may_not_sample_the_rest() -> None:
    class Own:
        concurrent = False

        def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
            yield requests[0].rollout([GAP], [-1.0], False)

        def sync(self) -> None:
            """Nothing to do."""

    engine = CheckedEngine(Own(), "own:engine", LAST + 1, 100, [GAP])
    with pytest.raises(RunError, match="token id 260, which student and teacher do not share"):
        next(engine.generate([make_request(0, [1])], Sampling(1, ())))


def test_a_run_does_not_go_on_with_another_shared_vocabulary(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    teacher = make_model("qwen2", tmp_path / "teacher", 1)
    tokenizer(*OTHER).save_pretrained(teacher)
    config = recipe((models[0], teacher), tmp_path)
    Trainer(config, progress=False).train(1)
    tokenizer(*OTHER, "<more>", "<most>").save_pretrained(teacher)
    with pytest.raises(UsageError, match="the tokens that student and teacher share"):
        Trainer(config, progress=False)


def test_divergence_is_over_the_shared_ids(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"problem": "2+2?"}) + "\n")
    sampled: list[Rollout] = []
    make_row = judging.judged_row
    monkeypatch.setattr(judging, "judged_row", lambda r, *o: sampled.append(r) or make_row(r, *o))
    measure_divergence(
        str(models[0]),
        TeacherConfig(model=str(models[1]), dtype="float32"),
        DataConfig(prompts=str(path)),
        DivergenceSettings(max_new_tokens=8),
        tmp_path / "rows",
        ModelOptions("float32", trust_remote_code=False, batch_size=4),
    )
    row = json.loads((tmp_path / "rows" / "divergence.jsonl").read_text())
    (rollout,) = sampled
    kept = torch.tensor([i for i in range(LAST + 1) if i != GAP])
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    p, t = (
        AutoModelForCausalLM.from_pretrained(model, dtype="float32")(ids)
        .logits[0, len(rollout.prompt_ids) - 1 : -1]
        .index_select(1, kept)
        .log_softmax(-1)
        for model in models
    )
    assert row["reverse_kl"] == pytest.approx((p.exp() * (p - t)).sum().item(), rel=1e-4)
