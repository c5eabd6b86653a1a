"""Teachers that have another tokenizer than the student: scores, gradients, and what is refused."""

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from build_embedded import PATTERN, WORDS, make_tokenizer
from random_models import build_model
from remade_embedded import TOKENIZERS, remade
from remade_embedded import make_tokenizer as make_other
from teacher_server import NAME, TeacherServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from poweropd import Config, Trainer
from poweropd.config.recipe_file import read_yaml
from poweropd.config.shipped import shipped_recipe
from poweropd.data.batch import collate
from poweropd.data.rollout import Example, Rollout, span_totals
from poweropd.embedded import END_OF_TEXT, TURN_END
from poweropd.errors import UsageError
from poweropd.plan import checks
from poweropd.rewards import Reward, create
from poweropd.training.update import UpdateOutcome

MAKES = Callable[..., Config]
MERGED_PATTERN = TOKENIZERS["merged"][1]
SPANS = {"teacher.align": "spans"}
WORK = [
    "4+8=12+6=18+9=27+2=29\n\\boxed{29}",
    "7=7",
    "+9=9+1=10",
    "1+2=3+4=7+5=12+6=18+7=25+1=26+3=29+8=37+4=41+9=50+5=55+2=57\n\\boxed{57}",
]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student and a teacher that read a sign and its digit as one token."""
    folder, found = tmp_path_factory.mktemp("merged"), {}
    for seed, (role, stop) in enumerate((("student", END_OF_TEXT), ("teacher", TURN_END))):
        tokenizer = make_other("merged", stop)
        found[role] = build_model(folder / role, stop, 24, seed, rows=len(tokenizer))
        tokenizer.save_pretrained(folder / role)
    return found


@pytest.fixture
def across(recipe: MAKES, merged: dict[str, Path]) -> MAKES:
    """As `recipe`, with a teacher of another tokenizer."""

    def make(**overrides: Any) -> Config:
        return recipe(**{"teacher.model": str(merged["teacher"]), **SPANS, **overrides})

    return make


def trainer_of(config: Config) -> Trainer:
    return Trainer(config, progress=False)


def written(trainer: Trainer, texts: Sequence[str], stop: bool = True) -> list[Rollout]:
    """Completions of the first prompts, in the student's own tokens."""
    tokenizer, end = trainer.inputs.tokenizer, trainer.inputs.student_stop_ids[:1]
    return [
        Rollout(request, tokenizer.encode(text) + (end if stop else []), [], stop)
        for request, text in zip(trainer.requests(0), texts, strict=False)
    ]


def gradient(trainer: Trainer, examples: Sequence[Example], reward: Reward) -> torch.Tensor:
    trainer.updater.accumulate(examples, reward, sum(e.num_tokens for e in examples))
    return torch.cat([p.grad.flatten() for p in trainer.student.trained_weights().values()])


def update(trainer: Trainer, examples: Sequence[Example]) -> UpdateOutcome:
    outcome = trainer.updater.update(examples, trainer.reward.at(0), 0)
    assert outcome is not None
    return outcome


def log_probs_of(model: Any, prompt: list[int], ids: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


# What is scored and trained.


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("reward", "policy"), [(create("log_ratio"), "cross"), (create("power", alpha=0.5), "mask")]
)
def test_the_gradient_is_that_of_the_textbook_loss(
    across: MAKES,
    merged: dict[str, Path],
    teacher_dir: Path,
    reward: Reward,
    policy: str,
    turned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The student has characters or, turned, merged tokens, which are the spans of both."""
    monkeypatch.setattr("poweropd.kernels.head.CHUNK_BYTES", {"cpu": 2**14, "cuda": 2**14})
    other = {"model.student": str(merged["student"]), "teacher.model": str(teacher_dir)}
    trainer = trainer_of(across(**{"objective.stop": policy, **(other if turned else {})}))
    examples = trainer.scored(written(trainer, WORK))
    assert sum(e.num_tokens for e in examples) > 64  # tokens of a chunk
    got = gradient(trainer, examples, reward)

    names = (trainer.config.model.student, trainer.config.only_teacher.model)
    student, teacher = (AutoModelForCausalLM.from_pretrained(name).double() for name in names)
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in names]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example, text in zip(examples, WORK, strict=True):
        wide = re.findall(MERGED_PATTERN, text)
        sizes = [len(re.findall(PATTERN, piece)) for piece in wide]
        both = [re.findall(PATTERN, text), wide]
        if policy == "cross":
            sizes, both = [*sizes, 1], [[*pieces, None] for pieces in both]
        own, its = (
            [tokenizer.eos_token_id if p is None else tokenizer.get_vocab()[p] for p in pieces]
            for tokenizer, pieces in zip(tokenizers, both[::-1] if turned else both, strict=True)
        )
        p = log_probs_of(student, example.prompt.prompt_ids, own)
        t = log_probs_of(teacher, example.prompt.teacher_prompt_ids, its).detach()
        spans = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        narrow = t if turned else p.detach()
        narrow = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, spans, narrow)
        rewards = reward(narrow, p.detach()) if turned else reward(t, narrow)[spans]
        total = total - (rewards * p).sum()
        count += len(p)
    (total / count).backward()
    expected = torch.cat([q.grad.flatten() for q in student.parameters()])
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("reward", ["log_ratio", "zscore"])
def test_micro_batches_do_not_change_the_gradient(across: MAKES, reward: str) -> None:
    trainer = trainer_of(across())
    examples = trainer.scored(written(trainer, WORK))
    whole = gradient(trainer, examples, create(reward))
    trainer.updater.max_tokens = 60
    split = gradient(trainer, examples[::-1], create(reward))
    assert len(trainer.updater._micro_batches(examples)) > 1
    assert (split - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("policy", ["mask", pytest.param("cross", marks=pytest.mark.thorough)])
def test_equal_vocabularies_give_todays_numbers_bit_for_bit(
    recipe: MAKES, tmp_path: Path, policy: str
) -> None:
    lines, weights = [], []
    for align in ("ids", "spans"):
        config = recipe(
            **{
                **{"teacher.align": align, "objective.stop": policy},
                "run.dir": str(tmp_path / align),
                "rollout.correction": "truncated",
            }
        )
        trainer = trainer_of(config)
        trainer.train()
        rows = (tmp_path / align / "metrics.jsonl").read_text().splitlines()
        lines.append([{k: v for k, v in json.loads(r).items() if "seconds" not in k} for r in rows])
        weights.append(trainer.student.trained_weights())
    timed = {"tokens_per_second", "memory/peak_bytes"}
    for ids, spans in zip(*lines, strict=True):
        assert ids.keys() == spans.keys()
        assert all(ids[key] == spans[key] for key in ids.keys() - timed)
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_spans_of_one_token_give_todays_numbers_bit_for_bit(
    recipe: MAKES, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the short way of equal vocabularies: text is encoded again, and cut."""
    found = []
    for align in ("ids", "spans"):
        trainer = trainer_of(recipe(**{"teacher.align": align}))
        if align == "spans":
            monkeypatch.setattr(trainer.inputs.teachers[""].aligner, "same", False)
        examples = trainer.scored(written(trainer, WORK))
        assert all((e.spans is None) == (align == "ids") for e in examples)
        found.append((examples, update(trainer, examples)))
    (ids, one), (spans, other) = found
    for a, b in zip(ids, spans, strict=True):
        assert torch.equal(a.teacher_log_probs, b.teacher_log_probs)
    assert one.loss == other.loss
    assert one.grad_norm == other.grad_norm
    for name, column in vars(one.record).items():
        assert torch.equal(column, vars(other.record)[name]) or column.isnan().all(), name


def test_a_student_in_other_tokens_as_its_own_teacher_has_reward_0(
    recipe: MAKES, student_dir: Path, tmp_path: Path
) -> None:
    """The teacher is the student with its ids in another order."""
    model = AutoModelForCausalLM.from_pretrained(student_dir)
    old, new = make_tokenizer(END_OF_TEXT), make_tokenizer(END_OF_TEXT, WORDS[::-1])
    order = [old.get_vocab()[token] for token in sorted(new.get_vocab(), key=new.get_vocab().get)]
    assert order != sorted(order)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.copy_(table[order].clone())
    model.save_pretrained(tmp_path / "turned")
    new.save_pretrained(tmp_path / "turned")
    trainer = trainer_of(
        recipe(**{"teacher.model": str(tmp_path / "turned"), **SPANS, "reward.name": "log_ratio"})
    )
    examples = trainer.scored([*written(trainer, WORK), *list(trainer.sample(0))])
    record = update(trainer, examples).record
    assert len(record.rewards) > 100
    assert record.rewards.abs().max() < 1e-4
    assert (record.rewards != 0).any()


def test_metrics_share_a_spans_log_ratio_among_its_tokens(across: MAKES) -> None:
    trainer = trainer_of(across(**{"reward.name": "log_ratio"}))
    examples = trainer.scored(written(trainer, WORK))
    record = update(trainer, examples).record
    sizes = record.span_sizes
    assert {1.0, 2.0} == {*sizes.tolist()}
    assert torch.equal(record.log_ratios * sizes, record.rewards)
    whole = sum(e.teacher_log_probs[_firsts(e)].double().sum() for e in examples)
    own = sum(record.student_log_probs.double() / sizes)
    assert record.log_ratios.double().sum().item() == pytest.approx(float(whole - own), abs=1e-3)


def _firsts(example: Example) -> torch.Tensor:
    """The first token of each span."""
    return torch.searchsorted(example.spans, example.spans.unique())


def test_a_spans_importance_weight_is_that_of_all_its_tokens(across: MAKES) -> None:
    trainer = trainer_of(across(**{"rollout.correction": "truncated"}))
    rollouts = [
        replace(r, sampling_log_probs=[-5.0 - i % 3 for i in range(len(r.completion_ids))])
        for r in written(trainer, WORK)
    ]
    examples = trainer.scored(rollouts)
    batch = collate(examples)
    _, record = trainer.student(batch, trainer.updater.objective, create("power"), 1.0)
    expected = record.student_log_probs - span_totals(batch.sampling_log_probs, batch.spans)
    assert torch.allclose(record.weights, expected.exp().clamp(max=2.0))
    assert (record.span_sizes > 1).any()


# Which tokens are trained.


def kept(trainer: Trainer, rollout: Rollout) -> list[str]:
    """The trained tokens of a completion."""
    found = trainer.scored([rollout])
    tokenizer = trainer.inputs.tokenizer
    return [tokenizer.decode(i) for e in found for i in e.student_targets]


def test_a_span_with_a_token_that_somebody_else_wrote_is_not_trained(across: MAKES) -> None:
    trainer = trainer_of(across())
    (rollout,) = written(trainer, ["1+2=3"], stop=False)
    assert kept(trainer, rollout) == ["1", "+", "2", "=", "3"]
    masked = replace(rollout, completion_mask=[True, True, False, True, True])
    assert kept(trainer, masked) == ["1", "=", "3"]
    assert kept(trainer, replace(rollout, completion_mask=[False] * 4 + [True])) == []


def test_what_the_students_tokenizer_would_not_have_written_is_not_trained(
    across: MAKES, caplog: pytest.LogCaptureFixture
) -> None:
    """The student's word "user" in letters, which its own tokenizer would not have written."""
    trainer = trainer_of(across())
    (rollout,) = written(trainer, ["1"], stop=False)
    letters = trainer.inputs.tokenizer.convert_tokens_to_ids([*"1user2"])
    with caplog.at_level(logging.WARNING, "poweropd"):
        assert kept(trainer, replace(rollout, completion_ids=letters)) == ["1", "2"]
        assert kept(trainer, replace(rollout, completion_ids=letters)) == ["1", "2"]
    (warning,) = [r.message for r in caplog.records if "align" in r.message]
    assert "2 of 6 tokens of a step are trained" in warning


def test_what_is_beyond_the_teachers_context_is_not_trained(across: MAKES) -> None:
    trainer = trainer_of(across())
    (rollout,) = written(trainer, ["1+2=3+4=7"], stop=False)
    aligner = trainer.inputs.teachers[""].aligner
    prompt = len(rollout.request.prompt.teacher_prompt_ids)
    aligner.context = prompt + 2
    assert kept(trainer, rollout) == ["1", "+", "2"]


def test_each_model_has_its_own_prompt_and_stop(across: MAKES, merged: dict[str, Path]) -> None:
    trainer = trainer_of(across(**{"objective.stop": "cross"}))
    prompt = trainer.prompts(0)[0]
    other = AutoTokenizer.from_pretrained(merged["teacher"])
    assert other.decode(prompt.teacher_prompt_ids) == trainer.inputs.tokenizer.decode(
        prompt.prompt_ids
    )
    assert len(prompt.teacher_prompt_ids) < len(prompt.prompt_ids)
    (rollout,) = written(trainer, ["1+2"])
    aligner = trainer.inputs.teachers[""].aligner
    spans = aligner.spans(rollout.completion_ids, trainer.inputs.stop_ids)
    assert spans.student == [0, 1, 1, 2]
    assert other.convert_ids_to_tokens(spans.teacher_ids) == ["1", "+2", TURN_END]
    assert trainer.inputs.stop_ids == (0, 2)  # the student's own, and its name of the teacher's


def test_a_special_token_that_both_have_is_one_to_both(across: MAKES) -> None:
    trainer = trainer_of(across())
    ids = trainer.inputs.tokenizer.encode("1<|im_start|>+2")
    aligner = trainer.inputs.teachers[""].aligner
    spans = aligner.spans(ids, [])
    assert spans.student == [0, 1, 2, 2]
    assert aligner.teacher.of(spans.teacher_ids) == [b"1", b"<|im_start|>", b"+2"]
    text = aligner.teacher.encode("<|im_start|>")
    assert len(text) == len("<|im_start|>")


# Where the teacher is.


@pytest.mark.thorough
def test_a_served_teacher_gives_the_local_numbers(
    across: MAKES, merged: dict[str, Path], tmp_path: Path
) -> None:
    local = trainer_of(across())
    with TeacherServer(merged["teacher"]) as server:
        teacher = {
            **{"model": NAME, "servers": [server.url], "tokenizer": str(merged["teacher"])},
            "align": "spans",
        }
        served = trainer_of(across(**{"teacher": teacher, "run.dir": str(tmp_path / "served")}))
        both = [t.scored(written(t, WORK)) for t in (local, served)]
        assert served.train(until=1).steps == 1
    for a, b in zip(*both, strict=True):
        assert torch.equal(a.spans, b.spans)
        assert torch.allclose(a.teacher_log_probs, b.teacher_log_probs, atol=1e-4)


def test_several_teachers_may_each_have_their_own_tokenizer(
    across: MAKES, merged: dict[str, Path], teacher_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "domains.jsonl"
    rows = [{"problem": f"{i}+{i + 1}", "domain": ("same", "other")[i % 2]} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = {
        "by": "domain",
        "same": {"model": str(teacher_dir), "dtype": "float32"},
        "other": {"model": str(merged["teacher"]), "dtype": "float32", "align": "spans"},
    }
    trainer = trainer_of(across(**{"teacher": teachers, "data.prompts": str(path)}))
    rollouts = written(trainer, WORK)
    empty = replace(rollouts[0], completion_ids=rollouts[0].completion_ids[:0])
    for e in trainer.scored(rollouts):
        assert (e.spans is None) == (e.prompt.domain == "same")
    batch = collate(trainer.scored(rollouts))
    assert int(batch.spans[-1]) + 1 == len(batch.spans.unique()) < len(batch.spans)
    assert (batch.spans.diff() >= 0).all()
    assert trainer.scored([empty]) == []
    assert trainer.train().steps == 3


@pytest.mark.thorough
def test_a_resumed_run_ends_as_one_that_was_not_stopped(across: MAKES, tmp_path: Path) -> None:
    whole = across(**{"run.dir": str(tmp_path / "whole")})
    parts = across(**{"run.dir": str(tmp_path / "parts")})
    expected = trainer_of(whole)
    expected.train()
    trainer_of(parts).train(until=1)
    resumed = trainer_of(parts)
    resumed.train()
    weights = resumed.student.trained_weights()
    for name, tensor in expected.student.trained_weights().items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_that_spells(tmp_path: Path) -> None:
    teacher = remade("teacher", "spelled", tmp_path / "teacher", steps=80, batch_size=16)
    tree = read_yaml(shipped_recipe("embedded.yaml"))
    tree["teacher"] |= {"model": str(teacher), "align": "spans"}
    tree["train"] |= {"steps": 30, "prompts_per_step": 8, "learning_rate": 1e-4}
    config = Config.from_dict({**tree, "run": {"dir": str(tmp_path / "run")}, "evaluate": None})
    trainer_of(config).train()
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    divergences = [row["reverse_kl"] for row in rows]
    assert sum(divergences[-5:]) < 0.6 * sum(divergences[:5]), divergences


# What is refused.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"objective.kind": "full_vocab"}, "cannot go with objective.kind=full_vocab"),
        ({"objective.baseline": "value"}, "cannot go with objective.baseline=value"),
        ({"objective.stop": "semantic"}, "cannot go with objective.stop=semantic"),
        ({"rollout.score": "truncated", "rollout.top_k": 5}, "cannot go with rollout.score"),
        ({"objective.stop": "raw"}, "set objective.stop=cross"),
        ({"objective.stop": "canonical"}, "set objective.stop=cross"),
        ({"objective.select": {"name": "random"}}, "drop objective.select and"),
        ({"objective.weights": {"name": "drift"}}, "and objective.weights"),
        ({"data.holdout": 8}, "^evaluate.divergence: .* teacher.align=spans"),
        (
            {
                "teacher.quantization": {"quant_method": "bitsandbytes", "load_in_8bit": True},
                "teacher.measure_quantization": True,
            },
            "^teacher.measure_quantization: .* align=spans",
        ),
    ],
    ids=str,
)
def test_what_compares_tokens_is_refused(
    across: MAKES, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        across(**overrides)


def test_ids_of_another_tokenizer_are_refused_as_before(across: MAKES) -> None:
    with pytest.raises(UsageError, match=r"must share .*teacher.align=spans"):
        trainer_of(across(**{"teacher.align": "ids"}))


def test_a_plan_checks_both_tokenizers(across: MAKES) -> None:
    found = {check.name: check for check in checks.inspect(across()).checks}
    assert {check.status for check in found.values()} == {"ok"}
    assert "121 and 103 tokens" not in found["vocabulary"].detail
    assert "103 and 121 tokens, compared on spans" in found["vocabulary"].detail
