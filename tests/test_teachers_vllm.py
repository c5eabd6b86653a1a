"""A teacher on a real vLLM server: the local teacher's rewards, and real kills of a real server."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_models import widened_student
from vllm_server import VllmServer, require_vllm

from poweropd import Config, Trainer, embedded
from poweropd.data.rollout import Request, Rollout
from poweropd.errors import UsageError
from poweropd.rollouts.base import RolloutEngine, Sampling

MAKES = Callable[..., Config]
pytestmark = pytest.mark.vllm
MOST_TOLD = 110  # a little more than the pair's vocabulary
PAIR = {"model.student": "embedded:student", "teacher.model": "embedded:teacher"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    require_vllm()
    log = tmp_path_factory.mktemp("vllm") / "log"
    options = ("--served-model-name", "adder", "--max-logprobs", str(MOST_TOLD))
    with VllmServer(embedded.path("teacher"), log, *options) as running:
        yield running


@pytest.fixture
def remote(recipe: MAKES, server: VllmServer) -> MAKES:
    keys = {"model": "adder", "servers": [server.url], "tokenizer": "embedded:teacher"}

    def make(**overrides: Any) -> Config:
        teacher = {f"teacher.{key}": value for key, value in keys.items()}
        return recipe(**{**PAIR, **teacher, "teacher.timeout": 30.0, **overrides})

    return make


def losses(config: Config) -> list[float]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("stop", ["mask", "cross"])
def test_rewards_are_those_of_the_local_teacher(
    recipe: MAKES, remote: MAKES, tmp_path: Path, stop: str
) -> None:
    overrides = {"objective.stop": stop, "train.prompts_per_step": 16}
    local = Trainer(recipe(**PAIR, **overrides, **{"run.dir": str(tmp_path / "l")}), progress=False)
    served = Trainer(remote(**overrides), progress=False)
    rollouts = list(local.sample(0))
    pairs = zip(*(t.scored(rollouts) for t in (local, served)), strict=True)
    for a, b in pairs:
        student = a.sampling_log_probs
        mine, theirs = (local.reward(e.teacher_log_probs, student) for e in (a, b))
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0, equal_nan=True)


WHOLE = {"objective.kind": "full_vocab"}
OBJECTIVES = {
    "power": WHOLE | {"reward.name": "power"},
    "log_ratio": WHOLE | {"reward.name": "log_ratio"},
    "baseline": {"objective.baseline": "value", "reward.name": "log_ratio"},
}


def loss_and_gradient(trainer: Trainer, rollouts: list[Rollout]) -> tuple[float, torch.Tensor]:
    examples = trainer.scored(rollouts)
    num_tokens = sum(example.num_tokens for example in examples)
    loss, _ = trainer.updater.accumulate(examples, trainer.reward.at(0), num_tokens)
    weights = trainer.student.trained_weights().values()
    return loss, torch.cat([weight.grad.flatten() for weight in weights])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_top_k_objective_is_that_of_the_local_teacher(
    recipe: MAKES, remote: MAKES, tmp_path: Path, name: str
) -> None:
    """Over k tokens and the tail; and over all tokens, where it is the whole vocabulary's."""
    keys = {**OBJECTIVES[name], "train.prompts_per_step": 8}
    for k, told in ((20, 20), (None, 103)):
        own = {"run.dir": str(tmp_path / f"local-{k}"), "objective.teacher_top_k": k}
        local = Trainer(recipe(**PAIR, **keys, **own), progress=False)
        own = {"run.dir": str(tmp_path / f"served-{k}"), "objective.teacher_top_k": told}
        served = Trainer(remote(**keys, **own), progress=False)
        rollouts = list(local.sample(0))
        (loss, gradient), (other_loss, other) = (
            loss_and_gradient(trainer, rollouts) for trainer in (local, served)
        )
        assert other_loss == pytest.approx(loss, abs=1e-4)
        assert (other - gradient).norm() < 1e-4 * max(1.0, float(gradient.norm()))


def test_a_vllm_server_that_gives_fewer_log_probs_is_refused(remote: MAKES) -> None:
    top = {"objective.teacher_top_k": MOST_TOLD + 1}
    with pytest.raises(
        UsageError, match=rf"start it with --max-logprobs {MOST_TOLD + 1} .*HTTP 400"
    ):
        Trainer(remote(**WHOLE, **top), progress=False)


@pytest.mark.filterwarnings("ignore")  # vLLM's own imports warn
def test_vllm_may_sample_while_a_server_scores(
    recipe: MAKES, remote: MAKES, tmp_path: Path
) -> None:
    options = {"kv_cache_memory_bytes": 1 << 26, "enforce_eager": True}
    student = {"model.student": str(widened_student(tmp_path / "student"))}
    student |= {"rollout.engine": "vllm", "rollout.vllm": options, "train.prompts_per_step": 8}
    local = recipe(**{**PAIR, **student, "run.dir": str(tmp_path / "local")})
    for config in (local, remote(**student)):
        Trainer(config, progress=False).train()
    assert losses(remote()) == pytest.approx(losses(local), abs=1e-5)


def test_vllm_serves_the_student_that_a_run_leaves(recipe: MAKES, tmp_path: Path) -> None:
    student = str(widened_student(tmp_path / "student"))
    final = Trainer(recipe(**{**PAIR, "model.student": student}), progress=False).train().final
    assert final is not None
    ids = list(range(3, 60))
    request = {"model": str(final), "prompt": [ids], "max_tokens": 1, "prompt_logprobs": 0}
    with VllmServer(final, tmp_path / "log") as server:
        answer = httpx2.post(f"{server.url}/v1/completions", json=request, timeout=60).json()
    found = answer["choices"][0]["prompt_logprobs"][1:]
    served = [scores[str(i)]["logprob"] for scores, i in zip(found, ids[1:], strict=True)]
    model = AutoModelForCausalLM.from_pretrained(final)
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    own = log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(served), own, atol=1e-4, rtol=0)


def test_two_runs_on_one_server_do_not_disturb_each_other(
    recipe: MAKES, remote: MAKES, tmp_path: Path
) -> None:
    configs = [remote(**{"train.seed": i, "run.dir": str(tmp_path / f"{i}")}) for i in (1, 2)]
    runs = []
    for i, config in enumerate(configs):
        path = tmp_path / f"{i}.yaml"
        path.write_text(config.to_yaml())
        runs.append(subprocess.Popen([sys.executable, "-m", "poweropd", "train", path]))
    assert [run.wait(120) for run in runs] == [0, 0]
    for config in configs:
        alone = recipe(
            **PAIR, **{"train.seed": config.train.seed, "run.dir": config.run.dir + "-alone"}
        )
        Trainer(alone, progress=False).train()
        assert losses(config) == pytest.approx(losses(alone), abs=1e-5)


class Disturbed:
    """An engine after whose last completion of a step, with requests under way, something is
    done to the teacher's server; it is started again two seconds later.
    """

    def __init__(self, engine: RolloutEngine, server: VllmServer) -> None:
        self.engine, self.server = engine, server
        self.kills = [server.kill_api, server.kill_engines]
        self.restarts: list[threading.Thread] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        yield from self.engine.generate(requests, sampling)
        if self.kills:
            self.kills.pop(0)()
            self.restarts.append(threading.Thread(target=self._restart))
            self.restarts[-1].start()

    def _restart(self) -> None:
        time.sleep(2)
        self.server.kill_group()  # whatever is left of it
        self.server.launch()

    def sync(self) -> None:
        self.engine.sync()


def test_a_run_survives_kills_of_its_server(
    recipe: MAKES, remote: MAKES, server: VllmServer, tmp_path: Path
) -> None:
    undisturbed = recipe(**PAIR, **{"train.steps": 3, "run.dir": str(tmp_path / "undisturbed")})
    Trainer(undisturbed, progress=False).train()
    config = remote(**{"train.steps": 3})
    trainer = Trainer(config, progress=False)
    trainer.engine = disturbed = Disturbed(trainer.engine, server)
    assert trainer.train().steps == 3
    assert len(disturbed.restarts) == 2
    for restart in disturbed.restarts:
        restart.join()
    assert losses(config) == pytest.approx(losses(undisturbed), abs=1e-5)
