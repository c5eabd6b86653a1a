"""Recipes: defaults, overrides, errors that name file, line and key; their reference and schema."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import reference

from poweropd import rewards
from poweropd.config import Config
from poweropd.config.fields import MayChange, Section
from poweropd.config.recipe_file import apply_override, plain, read_yaml
from poweropd.errors import UsageError

RECIPE = """\
model: {student: some/student}
teacher: {model: some/teacher}
data: {prompts: prompts.jsonl}
reward:
  name: power
  alpha: 10
train:
  steps: 20
  learning_rate: 5e-7
"""


def write(tmp_path: Path, text: str = RECIPE) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_a_recipe_states_only_what_differs(tmp_path: Path) -> None:
    config = Config.load(write(tmp_path))
    assert config.run.dir == "runs/mine"
    assert config.train.learning_rate == 5e-7  # YAML 1.2: a number, not text
    assert config.train.prompts_per_step == 32
    assert config.reward.create() == rewards.Power(alpha=10)


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    overrides = ["reward={name: zscore, base: {name: clip}}", "model.lora={r: 8}"]
    config = Config.load(write(tmp_path), overrides)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.to_yaml())
    again = Config.load(resolved)
    assert again == config
    assert config.differences(again) == []
    assert config.flat()["reward.base.high"] == 1.0  # defaults are written down


def test_overrides_are_yaml(tmp_path: Path) -> None:
    config = Config.load(write(tmp_path), ["train.seed=7", "data.chat=null", "train.steps = 3"])
    assert (config.train.seed, config.data.chat, config.train.steps) == (7, None, 3)


@pytest.mark.parametrize(
    ("overrides", "expected", "said"),
    [
        (["reward.name=log_ratio"], {}, ["reward.name: alpha of reward power is left out"]),
        (["reward.low=-2", "reward.name=clip"], {"low": -2, "high": 1.0}, ["reward.name: alpha"]),
        (["reward.name=power"], {"alpha": 10, "scale": "unit"}, []),
        (["reward={name: tanh, temperature: 2}"], {"temperature": 2}, []),
    ],
)
def test_another_reward_starts_from_its_own_defaults(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    overrides: list[str],
    expected: dict[str, object],
    said: list[str],
) -> None:
    caplog.set_level("INFO")
    reward = Config.load(write(tmp_path), overrides).reward
    assert reward.model_extra == expected
    assert [text[: len(start)] for text, start in zip(caplog.messages, said, strict=True)] == said
    with pytest.raises(UsageError, match="unknown parameter of reward clip"):
        Config.load(write(tmp_path), ["reward.name=clip", "reward.alpha=3"])


@pytest.mark.parametrize(
    ("own", "overrides", "expected"),
    [
        ("epochs: 3", ["train.steps=5"], (5, None)),
        ("steps: 9", ["train.epochs=2"], (1500, 2.0)),
        ("steps: 9", ["train.epochs=null"], (9, None)),
        ("epochs: 3", ["train.steps=null"], (1500, 3.0)),
        ("epochs: 3", ["train.steps=5", "train.epochs=null"], (5, None)),
        ("epochs: 3", ["train.steps=5", "train={epochs: 1}"], (1500, 1.0)),
    ],
)
def test_steps_and_epochs_replace_each_other(
    tmp_path: Path, own: str, overrides: list[str], expected: tuple[int, float | None]
) -> None:
    config = Config.load(write(tmp_path, RECIPE.replace("steps: 20", own)), overrides)
    assert (config.train.steps, config.train.epochs) == expected


def test_epochs_are_evaluated_as_often_as_their_steps(tmp_path: Path) -> None:
    overrides = ["train.epochs=3", "train.prompts_per_step=2", "data.holdout=10"]
    config = Config.load(write(tmp_path), overrides)
    assert config.evaluate is not None
    assert config.evaluate.every is None  # until the prompts have been counted
    counted = config.with_steps(100)
    assert (counted.train.steps, counted.train.epochs) == (150, None)
    assert counted.evaluate is not None
    assert counted.evaluate.every == 15


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ([], 5e-7),
        (["model.lora={}"], 5e-6),
        (["model.lora={}", "train.learning_rate=3e-5"], 3e-5),
        (["model.lora=null"], 5e-7),
    ],
)
def test_an_adapter_has_a_learning_rate_of_its_own(
    tmp_path: Path, overrides: list[str], rate: float
) -> None:
    recipe = write(tmp_path, RECIPE.replace("  learning_rate: 5e-7\n", ""))
    config = Config.load(recipe, overrides)
    assert config.train.learning_rate == rate
    assert f"learning_rate: {rate}" in config.to_yaml()


def test_differences_name_keys_and_both_values(tmp_path: Path) -> None:
    config, other = (Config.load(write(tmp_path), [f"train.steps={n}"]) for n in (3, 4))
    assert config.differences(other) == ["train.steps: 3 != 4"]


def test_a_run_may_go_on_with_another_rollout_server(tmp_path: Path) -> None:
    config = Config.load(write(tmp_path), ["rollout.engine=vllm_server"])
    moved = ["rollout.server={url: 'http://other:2', weights_dir: /dev/shm, concurrency: 2}"]
    other = Config.load(write(tmp_path), ["rollout.engine=vllm_server", *moved])
    assert config.differences(other) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 20", "stesp: 20", r"mine.yaml:8: train.stesp: unknown key \(known: steps, "),
        ("steps: 20", "steps: twenty", "mine.yaml:8: train.steps: expected a valid integer, got"),
        ("steps: 20", "steps: 0", "mine.yaml:8: train.steps: expected greater than or equal to 1"),
        ("steps: 20", "steps: true", "mine.yaml:8: train.steps: expected a valid integer"),
        ("alpha: 10", "alpha: -1", "mine.yaml:6: reward.alpha: expected a number > 0, got -1"),
        ("alpha: 10", "aplha: 1", "mine.yaml:6: reward.aplha: unknown parameter of reward power"),
        ("name: power", "name: powr", "mine.yaml:5: reward.name: expected one of log_ratio"),
        ("student: some/student", "", "mine.yaml:1: model.student: this key is required"),
        ("data: {prompts: prompts.jsonl}", "data: 3", "mine.yaml:3: data: expected a section"),
        ("data:", "dato:", "mine.yaml:3: dato: unknown key"),
        ("alpha: 10", "alpha: [", "mine.yaml:8: not valid YAML"),
        ("steps: 20", "steps: 20\n  steps: 3", "mine.yaml:9: not valid YAML: found duplicate key"),
        (RECIPE, "- a", "expected a mapping of sections"),
    ],
)
def test_mistakes_name_file_line_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Config.load(write(tmp_path, RECIPE.replace(old, new)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=0", "override train.steps: expected greater than or equal to 1, got 0"),
        ("train.stesp=1", "override train.stesp: unknown key"),
        ("reward.alpha=0", "override reward.alpha: expected a number > 0, got 0"),
        ("model.lora={r: 0}", "override model.lora.r: expected"),
        ("objective.kind=all", "expected 'sampled' or 'full_vocab', got 'all'"),
        ("train.steps", "expected an override key=value"),
        ("=3", "expected an override key=value"),
        ("data.chat={a", "not a YAML value"),
    ],
)
def test_mistakes_in_overrides_say_so(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Config.load(write(tmp_path), [override])


FULL_VOCAB, TRUNCATED = "objective.kind=full_vocab", "rollout.score=truncated"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([FULL_VOCAB, "reward={name: zscore}"], "override objective.kind: full_vocab needs a poin"),
        ([FULL_VOCAB, "objective.baseline=value"], "override objective.baseline: value needs"),
        (["objective.top_k=8"], "override objective.top_k: 8 needs objective.kind=full_vocab"),
        (["objective.top_k=0"], "override objective.top_k: expected greater than or equal to 1"),
        (["objective.select={keep: 0.4}"], "objective.select.name: this key is required"),
        (["objective.select={name: dial, keep: 0}"], "objective.select.keep: expected greater"),
        (["objective.select={name: dial, beta: 2}"], "objective.select.beta: expected less than"),
        (["objective.select={name: random, beta: 0}"], "objective.select.beta: it belongs to dial"),
        ([FULL_VOCAB, "rollout.correction=truncated"], "override rollout.correction: truncated ne"),
        ([TRUNCATED, "objective.stop=cross"], "override rollout.score: truncated cannot go with"),
        ([TRUNCATED, "rollout.temperature=0"], "override rollout.score: truncated needs rollout"),
        (["rollout.staleness=1"], "override rollout.staleness: 1 needs an engine that samples"),
        (["rollout.staleness=1", "rollout.engine=vllm"], "such as vllm_server; vllm does not"),
        (["objective.stop=semantics"], "override objective.stop: expected 'raw', 'mask', 'canon"),
    ],
)
def test_settings_that_cannot_go_together_are_named(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Config.load(write(tmp_path), overrides)


def test_a_conflict_in_the_file_names_its_line(tmp_path: Path) -> None:
    text = RECIPE + "objective:\n  kind: full_vocab\n  baseline: value\n"
    with pytest.raises(UsageError, match=r"mine.yaml:12: objective.baseline: value needs"):
        Config.load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        ([], None),
        (["objective.select={name: dial}", "rollout.correction=truncated"], None),
        ([FULL_VOCAB], FULL_VOCAB),
        (["objective.baseline=value"], "objective.baseline=value"),
        (["objective.stop=semantic"], "objective.stop=semantic"),
        ([TRUNCATED, "rollout.top_k=20"], TRUNCATED),
        ([TRUNCATED, "rollout.top_p=0.9"], TRUNCATED),
        ([TRUNCATED], None),  # nothing is cut off: the same as full
    ],
)
def test_what_needs_a_teacher_in_this_process(
    tmp_path: Path, overrides: list[str], setting: str | None
) -> None:
    assert Config.load(write(tmp_path), overrides).needs_local_teacher == setting


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe file"):
        Config.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("teacher", "overrides", "key"),
    [
        ("{model: x, give_up_after: 5}", [], "teacher"),
        ("{model: x}", ["teacher.give_up_after=5"], "teacher"),
        ("{model: x}", ["teacher={model: x, give_up_after: 5}"], "teacher"),
        ("{model: x, give_up_after: 3}", ["teacher.patience=5"], "teacher"),
        ("{by: domain, math: {model: x, give_up_after: 5}}", [], "teacher.math"),
        ("{by: domain, math: {model: x}}", ["teacher.math.give_up_after=5"], "teacher.math"),
    ],
)
def test_a_renamed_key_is_accepted_with_a_notice(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    teacher: str,
    overrides: list[str],
    key: str,
) -> None:
    text = RECIPE.replace("{model: some/teacher}", teacher)
    config = Config.load(write(tmp_path, text), overrides)
    assert [teacher.patience for teacher in config.teachers.values()] == [5.0]
    assert caplog.messages == [f"{key}.give_up_after was renamed to {key}.patience"]
    assert "give_up_after" not in config.to_yaml()


def test_a_tree_with_a_renamed_key_is_accepted_and_left_as_it_is() -> None:
    tree = {"model": {"student": "a"}, "data": {"prompts": "p"}}
    tree["teacher"] = {"model": "x", "give_up_after": 5}
    assert Config.from_dict(tree).only_teacher.patience == 5.0
    assert tree["teacher"] == {"model": "x", "give_up_after": 5}


def test_mistakes_in_a_renamed_key_name_its_place(tmp_path: Path) -> None:
    text = RECIPE.replace("{model: some/teacher}", "\n  model: x\n  give_up_after: -1")
    with pytest.raises(UsageError, match=r"mine.yaml:4: teacher.patience: expected greater than 0"):
        Config.load(write(tmp_path, text))
    with pytest.raises(UsageError, match=r"override teacher.patience: expected greater than 0"):
        Config.load(write(tmp_path), ["teacher.give_up_after=-1"])
    both = text.replace("-1", "1\n  patience: 1")
    with pytest.raises(UsageError, match=r"mine.yaml:4: teacher.give_up_after: unknown key"):
        Config.load(write(tmp_path, both))


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, bool, str | None]]:
    """Yields every key of a recipe: whether it may change, and its description."""
    for name, field in section.model_fields.items():
        key, inner = f"{prefix}{name}", list(reference.inner_sections(field.annotation))
        if prefix or not inner:
            yield key, MayChange in field.metadata, field.description
        for one in inner:
            yield from fields(one, f"{key}.")


def test_every_key_is_described_by_a_sentence() -> None:
    for key, _, description in fields(Config):
        assert description is not None, key
        assert description[0].isupper(), key
        assert description.endswith("."), key


def test_what_may_change_between_the_parts_of_a_run() -> None:
    assert {key for key, may_change, _ in fields(Config) if may_change} == {
        *("run.dir", "train.max_tokens_per_batch", "train.packing", "train.sharding"),
        *("checkpoint.every", "checkpoint.keep", "model.gradient_checkpointing"),
        *("model.attention", "model.compile", "rollout.batch_size", "rollout.verify_every"),
        *("rollout.server", "teacher.servers", "teacher.api_key_env", "teacher.timeout"),
        *("teacher.concurrency", "teacher.patience", "teacher.server_type", "data.column"),
        "rollout.tool_workers",
    }


@pytest.mark.parametrize("path", reference.pages(), ids=lambda path: path.name)
def test_the_reference_is_what_the_code_says(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == reference.pages()[path], "run `make reference`"


def test_prose_of_the_reference_fits_a_screen() -> None:
    lines = reference.configuration().splitlines()
    assert max(len(line) for line in lines if not line.startswith("|")) <= 100


ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_satisfies_the_schema(path: Path) -> None:
    jsonschema.validate(plain(read_yaml(path)), SCHEMA)
    jsonschema.validate(Config.load(path).model_dump(), SCHEMA)


@pytest.mark.parametrize(
    ("override", "valid"),
    [
        ("train.steps=3", True),
        ("rollout.engine=mine:engine", True),
        ("teacher={by: domain, math: {model: x}}", True),
        ("train.steps=0", False),
        ("train.stesp=3", False),
        ("rollout.engine=mine", False),
        ("rollout.staleness=5", False),
        ("objective.stop=semantics", False),
        ("teacher={by: domain, math: {modle: x}}", False),
    ],
)
def test_the_schema_refuses_what_loading_refuses(
    tmp_path: Path, override: str, valid: bool
) -> None:
    tree = read_yaml(write(tmp_path))
    apply_override(tree, override)
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(plain(tree)) == valid
    if valid:
        Config.from_dict(tree)
    else:
        with pytest.raises(UsageError, match=r"expected|unknown key"):
            Config.from_dict(tree)


SECRETS = {
    "rollout.vllm.hf_token": "hf_0000",
    "rollout.vllm.api_key": "x",
    "rollout.vllm.apikey": "x",
    "rollout.vllm.DB_PASSWORD": "x",
    "data.chat.client_secret": "x",
    "data.system": "sk-0123456789abcdefABCDEF",
    "data.chat.note": "hf_AbCdEfGhIjKlMnOpQrSt",
}
NO_SECRETS = {
    "rollout.vllm.seed": 1,
    "data.chat.bos_token": "<s>",
    "data.chat.stop_token": "<|im_end|>",
    "data.chat.max_token": 5,
    "data.system": "You keep the password of the tower: sk-ip it.",
    "teacher.api_key_env": "TEACHER_KEY",
}


@pytest.mark.parametrize("key", [*SECRETS, *NO_SECRETS])
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    tree: dict[str, dict[str, object]] = {
        **{"model": {"student": "a"}, "teacher": {"model": "b"}, "data": {"prompts": "p"}},
        "rollout": {"engine": "vllm"},
    }
    section, *parts = key.split(".")
    node: dict[str, Any] = tree[section]
    for part in parts[:-1]:
        node = node.setdefault(part, {})
    node[parts[-1]] = (SECRETS | NO_SECRETS)[key]
    if key == "teacher.api_key_env":
        node["servers"] = ["http://127.0.0.1:1"]
    path.write_text(json.dumps(tree))
    if key in NO_SECRETS:
        Config.load(path)
        return
    with pytest.raises(UsageError, match=rf"{key}: expected no secret in a recipe") as refused:
        Config.load(path)
    assert len(str(SECRETS[key])) == 1 or str(SECRETS[key]) not in str(refused.value)
