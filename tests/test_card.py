"""The trained student leaves well: its model card, and its way to a real server on loopback."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from poweropd import Config, Trainer
from poweropd.evaluation.metrics import problem_values
from poweropd.runs import card
from poweropd.runs.files import read_jsonl

MAKES = Callable[..., Config]
EVALUATE = {"every": 2, "benchmarks": ["embedded"], "n": 2, "limit": 4, "max_new_tokens": 8}


@pytest.fixture
def trained(recipe: MAKES) -> Path:
    config = recipe(evaluate=EVALUATE, **{"train.steps": 2, "data.system": "Be brief"})
    return Trainer(config, progress=False).train().run_dir


def test_the_card_says_what_was_trained_and_measured(trained: Path, student_dir: Path) -> None:
    found = ModelCard.load(trained / "final" / "README.md")
    assert found.data.library_name == "transformers"
    assert found.data.base_model is None  # a local directory is no address on the Hub
    assert found.data.license is None
    assert {"poweropd", "on-policy-distillation"} <= set(found.data.tags)
    (measured,) = found.data.eval_results
    rows = read_jsonl(trained / "eval" / "step-2" / "embedded.jsonl")
    solved = problem_values(rows).values()
    assert measured.metric_type == "avg@2"
    assert measured.metric_value == pytest.approx(100 * sum(solved) / len(solved))
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| gradient norm | {last['grad_norm']:.4g} |" in found.text
    assert "| embedded | 4 | " in found.text
    assert f"`{student_dir.name}`" in found.text
    assert "reward `power` (alpha 5.0, scale unit)" in found.text
    assert json.loads((trained / "environment.json").read_text())["packages"]["torch"] in found.text
    assert "2606.17199" in found.text
    # No path of this machine, prompt text or address is in anything that an upload would send.
    private = (str(trained.parent), str(student_dir.parent), "Be brief")
    for file in (trained / "final").iterdir():
        content = file.read_bytes()
        assert not [text for text in private if text.encode() in content], file.name
    AutoModelForCausalLM.from_pretrained(trained / "final")


def test_the_card_of_the_best_student_is_of_its_step(trained: Path) -> None:
    step = json.loads((trained / "best.json").read_text())["step"]
    assert f"after step {step} of 2" in (trained / "best" / "README.md").read_text()


def test_an_adapter_has_a_card_too(recipe: MAKES) -> None:
    config = recipe(**{"model.lora": {"r": 2}, "train.steps": 1})
    found = ModelCard.load(Trainer(config, progress=False).train().final / "README.md")
    assert found.data.library_name == "peft"
    assert "A LoRA adapter of" in found.text
    assert "Evaluation" not in found.text


def test_hub_names_are_in_the_front_matter(recipe: MAKES, tmp_path: Path) -> None:
    config = recipe(**{"model.student": "Qwen/Qwen3-0.6B-Base", "data.prompts": "owner/prompts"})
    run = Path(config.run.dir)
    run.mkdir()
    (run / "environment.json").write_text('{"python": "3.12", "packages": {}}')
    card.write_card(tmp_path, config, step=0)
    found = ModelCard.load(tmp_path / "README.md")
    assert found.data.base_model == "Qwen/Qwen3-0.6B-Base"
    assert found.data.datasets == "owner/prompts"


@pytest.mark.parametrize("several", [False, True])
def test_where_servers_are_stays_private(recipe: MAKES, tmp_path: Path, several: bool) -> None:
    teacher: dict[str, Any] = {"model": "owner/teacher", "concurrency": 7}
    teacher |= {"servers": ["http://private:1"], "api_key_env": "PRIVATE_KEY"}
    server = {"url": "http://private:2", "weights_dir": "/private", "api_key_env": "PRIVATE_KEY"}
    teachers = {"by": "domain", "math": teacher, "code": teacher} if several else teacher
    config = recipe(teacher=teachers, **{"rollout.server": server})
    run = Path(config.run.dir)
    run.mkdir()
    (run / "environment.json").write_text('{"python": "3.12", "packages": {}}')
    card.write_card(tmp_path, config, step=0)
    text = (tmp_path / "README.md").read_text()
    assert "private" not in text.lower()
    assert text.count("concurrency: 7") == (2 if several else 1)


def test_every_mark_of_a_field_is_respected_in_the_card(recipe: MAKES, tmp_path: Path) -> None:
    secret = tmp_path / "s3cr3t-place"
    overrides = {
        **{
            "model.student": str(secret / "my-student"),
            "teacher.model": str(secret / "my-teacher"),
        },
        **{"teacher.tokenizer": str(secret / "my-tokenizer"), "data.system": "s3cr3t system"},
        **{"data.prompts": str(secret / "my-prompts.jsonl"), "data.chat": {"note": "s3cr3t note"}},
        "rollout.vllm": {"download_dir": "/s3cr3t", "max_num_seqs": 7},
    }
    benchmarks = {"every": 1, "benchmarks": [str(secret / "my-bench.jsonl")]}
    config = recipe(evaluate=benchmarks | {"data_dir": str(secret)}, **overrides)
    run = Path(config.run.dir)
    run.mkdir()
    (run / "environment.json").write_text('{"python": "3.12", "packages": {}}')
    card.write_card(tmp_path, config, step=0)
    text = (tmp_path / "README.md").read_text()
    assert "s3cr3t" not in text
    assert str(tmp_path) not in text
    for name in ("my-student", "my-teacher", "my-tokenizer", "my-prompts.jsonl", "my-bench.jsonl"):
        assert name in text
    assert "max_num_seqs: 7" in text


class Hub(BaseHTTPRequestHandler):
    """The few endpoints of the Hub that an upload of small files needs."""

    TOKEN = "hf_test"
    repos: dict[str, dict[str, Any]]
    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.headers["Authorization"] != f"Bearer {self.TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            self.repos[name] = asked
            self.answer(200, {"url": f"http://{self.headers['Host']}/{name}"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self.answer(200, {"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"http://{self.headers['Host']}/me/student/commit/1"
            self.answer(200, {"commitUrl": url, "commitOid": "1", "pullRequestUrl": None})
        else:
            self.answer(404, {"error": self.path})

    def do_GET(self) -> None:
        self.answer(200, {"id": "me/student", "sha": "0", "siblings": []})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: Any) -> None: ...


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    class Handler(Hub):
        repos, files = {}, {}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()
    thread.join()
    server.server_close()


def push(run: Path, *options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    cache = {"HF_HOME": str(run / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-m", "poweropd", "push", str(run), *options]
    return subprocess.run(
        command, check=False, env={**kept, **cache, **environment}, capture_output=True, text=True
    )


def student(run: Path) -> Path:
    (run / "final").mkdir(parents=True)
    (run / "final" / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A student\n")
    (run / "final" / "model.safetensors").write_bytes(b"weights" * 1000)
    return run


def test_push_uploads_the_student_with_its_card(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    address, server = hub
    run = student(tmp_path / "run")
    done = push(run, "me/student", "--private", HF_ENDPOINT=address, HF_TOKEN=Hub.TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{address}/me/student"
    asked = server.repos["me/student"]
    assert asked.get("visibility") == "private" or asked.get("private")  # by the Hub's library
    assert server.files == {p.name: p.read_bytes() for p in (run / "final").iterdir()}


@pytest.mark.parametrize(
    ("options", "environment", "status", "message"),
    [
        (["me/student", "--best"], {}, 2, "evaluate section"),
        (["me/student"], {}, 2, "no login at the Hub: run `hf auth login`"),
        (["me//student"], {"HF_TOKEN": Hub.TOKEN}, 2, "expected a repository owner/name"),
        (["me/student"], {"HF_TOKEN": "wrong"}, 1, "me/student: not uploaded: "),
        (["me/student"], {"HF_TOKEN": Hub.TOKEN, "HF_HUB_OFFLINE": "1"}, 1, "offline mode"),
        (
            ["me/student"],
            {"HF_TOKEN": Hub.TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"},
            1,
            "me/student: not uploaded: ",
        ),
    ],
)
def test_what_goes_wrong_with_a_push_is_one_line(
    hub: tuple[str, type[Hub]],
    tmp_path: Path,
    options: list[str],
    environment: dict[str, str],
    status: int,
    message: str,
) -> None:
    run = student(tmp_path / "run")
    (run / "config.yaml").touch()
    done = push(run, *options, **{"HF_ENDPOINT": hub[0], **environment})
    assert done.returncode == status
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_dry_run_shows_what_a_push_would_send_and_sends_nothing(
    hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    run = student(tmp_path / "run")
    done = push(run, "me/student", "--dry-run", HF_ENDPOINT=hub[0], HF_TOKEN=Hub.TOKEN)
    assert done.returncode == 0, done.stderr
    head, *files, empty, _, _, _, title = done.stdout.rstrip("\n").split("\n")
    assert head == "to me/student, 2 files (bytes, name):"
    assert [line.split() for line in files] == [
        [f"{(run / 'final' / name).stat().st_size:,}", name]
        for name in ("README.md", "model.safetensors")
    ]
    assert (empty, title) == ("", "# A student")
    assert not hub[1].repos
    assert not hub[1].files


def test_an_unfinished_run_is_not_pushed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    done = push(tmp_path, "me/student")
    assert done.returncode == 2
    assert f"the run is not finished: poweropd train {tmp_path}/config.yaml" in done.stderr
