"""Several teachers, chosen by a column of the prompts, and the recipe keys of teachers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_server import NAME, TeacherServer

from poweropd import Config, Trainer
from poweropd.data.rollout import Example
from poweropd.errors import UsageError
from poweropd.teachers import base
from poweropd.teachers.local import LocalTeacher
from poweropd.teachers.routed import RoutedTeacher
from poweropd.training.metrics import teacher_metrics, token_metrics

MAKES = Callable[..., Config]


@pytest.fixture
def several(recipe: MAKES, teacher_dir: Path, code_dir: Path, domains: Path) -> MAKES:
    """A recipe whose prompts belong to "math" and "code" in turn, with a teacher for each."""

    def make(**overrides: Any) -> Config:
        teachers = {
            "by": "domain",
            "math": {"model": str(teacher_dir), "dtype": "float32"},
            "code": {"model": str(code_dir), "dtype": "float32"},
        }
        return recipe(**{"teacher": teachers, "data.prompts": str(domains), **overrides})

    return make


@pytest.mark.parametrize("column", [None, "hint"])
def test_each_prompt_is_scored_by_its_own_teacher(
    several: MAKES, teacher_dir: Path, code_dir: Path, column: str | None
) -> None:
    trainer = Trainer(several(**{"data.teacher_column": column}), progress=False)
    found = trainer.scored(trainer.sample(0))
    domains = [trainer.prompts(0)[e.rollout.request.prompt_index].row["domain"] for e in found]
    assert set(domains) == {"math", "code"}
    assert [e.prompt.domain for e in found] == domains
    for name, teacher in trainer.models.teachers.items():
        own = [e for e in found if e.prompt.domain == name]
        alone = base.score(LocalTeacher(teacher, 1024), own)
        for a, b in zip(own, alone, strict=True):
            assert torch.equal(a.teacher_log_probs, b.teacher_log_probs)
    assert trainer.train().steps == 3


def test_every_teacher_has_its_own_numbers_and_they_add_up(several: MAKES) -> None:
    config = several()
    Trainer(config, progress=False).train()
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        tokens = {name: row[f"teacher/{name}/tokens"] for name in ("code", "math")}
        assert sum(tokens.values()) == row["num_tokens"]
        assert min(tokens.values()) > 0
        for key, whole in (("reward", "reward/mean"), ("reverse_kl", "reverse_kl")):
            parts = [row[f"teacher/{name}/{key}"] * count for name, count in tokens.items()]
            assert sum(parts) / row["num_tokens"] == pytest.approx(row[whole], rel=1e-6)
    assert row["teacher/code/reverse_kl"] != row["teacher/math/reverse_kl"]


def test_a_teacher_without_a_token_in_a_step_has_no_means(several: MAKES) -> None:
    trainer = Trainer(several(), progress=False)
    examples = trainer.scored(trainer.sample(0))
    domains = [prompt.domain for prompt in trainer.prompts(0)]
    own = [e for e in examples if domains[e.rollout.request.prompt_index] == "math"]
    outcome = trainer.updater.update(own, trainer.reward, 0)
    assert outcome is not None
    found = teacher_metrics(outcome, domains)
    assert found["teacher/code/tokens"] == 0
    assert found.keys() == {
        *("teacher/code/tokens", "teacher/math/tokens"),
        *("teacher/math/reward", "teacher/math/reverse_kl"),
    }
    assert teacher_metrics(outcome, [""] * len(domains)) == {}
    assert token_metrics(None, domains) == {"num_tokens": 0}


def test_one_may_be_here_and_another_on_a_server(
    several: MAKES, code_dir: Path, tmp_path: Path
) -> None:
    here = several()
    with TeacherServer(code_dir) as server:
        code = {"model": NAME, "servers": [server.url], "tokenizer": str(code_dir)}
        teachers = {**here.teacher.model_dump(), "code": code}
        mixed = several(**{"teacher": teachers, "run.dir": str(tmp_path / "mixed")})
        losses = []
        for config in (here, mixed):
            Trainer(config, progress=False).train()
            lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line)["loss"] for line in lines])
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        asked = [ids for ids in server.requests if len(ids) > 2]
        assert len(asked) > 2 * 4  # its four prompts twice at the start, then completions


def test_a_turn_ends_with_the_stop_of_its_own_teacher(several: MAKES) -> None:
    trainer = Trainer(several(**{"objective.stop": "cross"}), progress=False)
    stops = {name: profile.stop_ids[0] for name, profile in trainer.inputs.teachers.items()}
    assert stops["math"] != stops["code"]
    assert set(stops.values()) <= set(trainer.sampling.stop_ids)
    rollouts = [
        replace(r, completion_ids=[*r.completion_ids, stops["math"]], stopped=True)
        for r in trainer.sample(0)
    ]
    for example in trainer.scored(rollouts):
        assert example.student_targets[-1] == stops["math"]
        assert example.teacher_targets[-1] == stops[example.prompt.domain]


def of_domain(example: Example, domain: str, index: int) -> Example:
    request = example.rollout.request
    prompt = replace(request.prompt, domain=domain, index=index)
    request = replace(request, prompt=prompt, prompt_index=index)
    return replace(example, rollout=replace(example.rollout, request=request))


class Late:
    """Hands examples on with its own number as their only log-prob."""

    def __init__(self, number: float) -> None:
        self.number, self.waiting = number, []

    def submit(self, example: Any) -> None:
        self.waiting.append(example)

    def collect(self) -> list[Any]:
        waiting, self.waiting = self.waiting, []
        return [e.scored(torch.tensor([self.number])) for e in waiting]


def test_examples_come_back_in_the_order_in_which_they_were_submitted(several: MAKES) -> None:
    trainer = Trainer(several(), progress=False)
    (example, *_) = trainer.scored(trainer.sample(0))
    teacher = RoutedTeacher({"a": Late(0.0), "b": Late(1.0)})
    for _ in range(2):  # nothing is left over from one step to the next
        sent = [of_domain(example, domain, i) for i, domain in enumerate("abbabaab")]
        found = base.score(teacher, sent)
        assert [e.prompt.index for e in found] == list(range(8))
        assert [float(e.teacher_log_probs) for e in found] == [0, 1, 1, 0, 1, 0, 0, 1]


def test_a_value_without_a_teacher_is_refused_with_its_count(several: MAKES) -> None:
    teachers = several().teacher.model_dump()
    del teachers["code"]
    message = r"column 'domain' holds 'code' \(4 rows\), for which .* \(it has math\)"
    with pytest.raises(UsageError, match=message):
        Trainer(several(teacher=teachers), progress=False)
    with pytest.raises(UsageError, match="expected text in column 'subject'"):
        Trainer(several(teacher={**teachers, "by": "subject"}), progress=False)


TEACHERS = "  by: domain\n  math: {model: x}\n  code: {model: y, servers: [http://h:1]}\n"


@pytest.mark.parametrize(
    ("teacher", "overrides", "message"),
    [
        ("  modle: x\n", [], r"r.yaml:4: teacher.modle: unknown key \(known: model, "),
        (
            TEACHERS.replace("model: x", "modle: x"),
            [],
            r"r.yaml:5: teacher.math.modle: unknown",
        ),
        ("  by: domain\n  math: 3\n", [], "r.yaml:5: teacher.math: expected a section, got 3"),
        ("  by: domain\n", [], "r.yaml:4: teacher.by: expected a teacher for each value of"),
        (
            TEACHERS,
            ["teacher.math.dtype=3"],
            "override teacher.math.dtype: expected 'auto', 'bfloat16'",
        ),
        (TEACHERS, ["objective.kind=full_vocab"], "teacher: objective.kind=full_vocab needs"),
        (TEACHERS, ["objective.baseline=value"], "teacher: objective.baseline=value needs"),
        (
            "  {model: x, servers: [http://h:1]}\n",
            ["objective.stop=semantic"],
            "semantic needs",
        ),
        (
            "  {model: x, offload: true}\n",
            ["objective.kind=full_vocab"],
            "teacher.offload: it cannot",
        ),
        (
            "  {model: x, servers: ['http://h:1'], offload: true}\n",
            [],
            "offload: it belongs",
        ),
        (
            "  {model: x, servers: [h:1]}\n",
            [],
            r"teacher.servers: expected .* got ...h:1",
        ),
        ("  {model: x, measure_quantization: true}\n", [], "there is no teacher.quantization"),
        ("  {model: x, quantization: {a: 1}, offload: true}\n", [], "teacher.offload: a quantized"),
    ],
)
def test_mistakes_name_the_line_and_the_key(
    tmp_path: Path, teacher: str, overrides: list[str], message: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{student: a}}\ndata: {{prompts: p.jsonl}}\nteacher:\n{teacher}")
    with pytest.raises(UsageError, match=message):
        Config.load(path, overrides)


def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path: Path) -> None:
    for url in ("http://me:secret@h:1", "me:secret@h:1", "http://h:1?key=secret"):
        tree = {"model": {"student": "a"}, "data": {"prompts": "p"}}
        with pytest.raises(UsageError, match="without a key or password") as refused:
            Config.from_dict({**tree, "teacher": {"model": "x", "servers": [url]}})
        assert "secret" not in str(refused.value)


def test_servers_may_move_between_the_parts_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{student: a}}\ndata: {{prompts: p.jsonl}}\nteacher:\n{TEACHERS}")
    config = Config.load(path)
    moved = ["teacher.code.servers=[http://other:2]", "teacher.code.timeout=5"]
    assert config.differences(Config.load(path, moved)) == []
    assert config.differences(Config.load(path, ["teacher.code.model=z"])) == [
        "teacher.code.model: 'y' != 'z'"
    ]
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config.to_yaml())
    assert Config.load(resolved) == config.model_copy(update={"run": config.run})
