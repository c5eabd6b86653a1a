"""A teacher behind a real server of llama.cpp, beside the same model in this process.

POWEROPD_LLAMA_CPP names a folder with the program `llama-server`, a model of transformers in
`model`, with a tokenizer of its own, and that model as `model.gguf`, which llama.cpp's
`convert_hf_to_gguf.py model --outtype f32 --outfile model.gguf` makes.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_cases import make_rollout
from test_teachers_top_k import WHOLE, loss_and_gradient
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from vllm_server import ServerProcess

from poweropd import Config, Trainer
from poweropd.config.teachers import TeacherConfig
from poweropd.data.rollout import make_example
from poweropd.teachers import base
from poweropd.teachers.server import ServerTeacher

pytestmark = pytest.mark.thorough
MAKES = Callable[..., Config]
TEXT = "The capital of France is Paris, a town of 2,102,650 people; é, 漢, 🙂."
CONTEXT = 256
NAME = "teacher"
TOP = 6


@pytest.fixture(scope="module")
def folder() -> Path:
    found = os.environ.get("POWEROPD_LLAMA_CPP")
    if found is None:
        pytest.skip("POWEROPD_LLAMA_CPP does not name a folder with llama-server and a model")
    return Path(found)


class LlamaServer(ServerProcess):
    """`llama-server` with two slots, in float32 throughout."""

    def __init__(self, folder: Path, log: Path) -> None:
        super().__init__(log)
        self.folder = folder

    def command(self) -> list[str]:
        command = [str(self.folder / "llama-server"), "--model", str(self.folder / "model.gguf")]
        command += ["--alias", NAME, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--threads", "1", "--parallel", "2", "--ctx-size", str(2 * CONTEXT)]
        command += ["--cache-type-k", "f32", "--cache-type-v", "f32"]
        return [*command, "--flash-attn", "off"]  # which would round to half precision


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with LlamaServer(folder, tmp_path_factory.mktemp("llama") / "log") as running:
        yield running.url


def test_it_gives_the_models_log_probs(folder: Path, url: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    section = TeacherConfig(model=NAME, servers=[url], server_type="llama_cpp")
    teacher = ServerTeacher(section, TOP)
    assert teacher.context() == CONTEXT - 1
    ids = tokenizer(TEXT)["input_ids"]
    prompt, completion = ids[:4], ids[4:]
    teacher.check([prompt])
    example = make_example(make_rollout(0, prompt, completion, stopped=False), [2], [2], "raw")
    assert example is not None
    (scored,) = base.score(teacher, [example])
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
    own = rows.gather(1, torch.tensor(completion)[:, None])[:, 0]
    torch.testing.assert_close(scored.teacher_log_probs, own, atol=1e-3, rtol=0)
    values, tops = rows.topk(TOP)
    torch.testing.assert_close(scored.teacher_top.log_probs, values, atol=1e-3, rtol=0)
    told = rows.gather(1, scored.teacher_top.ids)  # two ids may be equally probable
    torch.testing.assert_close(told, values, atol=1e-3, rtol=0)
    assert (scored.teacher_top.ids == tops).double().mean() > 0.9


def test_a_distillation_has_the_update_of_a_local_teacher(
    folder: Path, url: str, recipe: MAKES, tmp_path: Path
) -> None:
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = AutoConfig.from_pretrained(folder / "model", **small)
    config.num_attention_heads = config.num_key_value_heads = config.head_dim = 2
    torch.manual_seed(0)
    student = tmp_path / "student"
    AutoModelForCausalLM.from_config(config).save_pretrained(student)
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(student)
    found = []
    local = {"teacher.model": str(folder / "model"), "model.student": str(student)}
    served = {"teacher.model": NAME, "teacher.tokenizer": str(folder / "model")}
    served |= {"teacher.servers": [url], "teacher.server_type": "llama_cpp"}
    keys = {**local, "objective.teacher_top_k": TOP, "rollout.max_new_tokens": 4, **WHOLE}
    for name, own in (("local", {}), ("served", served)):
        run = {"run.dir": str(tmp_path / name)}
        found.append(loss_and_gradient(Trainer(recipe(**{**keys, **own, **run}), progress=False)))
    (loss, gradient), (other_loss, others) = found
    assert loss == pytest.approx(other_loss, abs=1e-4)
    assert (gradient - others).norm() < 1e-3 * gradient.norm()
