"""Trackers get what metrics.jsonl holds, by the real packages; those not installed are skipped."""

import importlib.util
import json
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from poweropd import Config, Trainer
from poweropd.errors import UsageError
from poweropd.runs.files import read_jsonl
from poweropd.training import trackers

Rows = dict[int, dict[str, float]]


def from_tensorboard(run: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (run / "trackers").rglob("events.out.tfevents*")} - {
        path.parent for path in (run / "trackers").glob("*/*/events.out.tfevents*")
    }
    events = EventAccumulator(str(folder)).Reload()
    rows: Rows = {}
    for key in events.Tags()["scalars"]:
        for event in events.Scalars(key):
            rows.setdefault(event.step, {})[key] = event.value
    return rows


def from_wandb(run: Path) -> Rows:
    """From the file that `wandb sync` would send: records in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    (path,) = (run / "trackers").glob("wandb/offline-run-*/run-*.wandb")
    data, at, parts, rows = path.read_bytes(), 7, b"", Rows()
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            if items := record.history.item:
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                rows[row["_step"]] = {k: v for k, v in row.items() if not k.startswith("_")}
    return rows


def from_mlflow(run: Path) -> Rows:
    rows: Rows = {}
    with closing(sqlite3.connect(run / "trackers" / "mlflow.db")) as database:
        for step, key, value in database.execute("SELECT step, key, value FROM metrics"):
            rows.setdefault(step, {})[key] = value
    return rows


def from_trackio(run: Path) -> Rows:
    with closing(sqlite3.connect(run.parent / "trackio" / "poweropd.db")) as database:
        found = database.execute("SELECT step, metrics FROM metrics").fetchall()
    return {step: json.loads(numbers) for step, numbers in found}


READERS: dict[str, Callable[[Path], Rows]] = {
    "tensorboard": from_tensorboard,
    "wandb": from_wandb,
    "mlflow": from_mlflow,
    "trackio": from_trackio,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("default")  # theirs are not ours
def test_a_tracker_has_the_numbers_of_the_metrics_and_stays_at_home(
    name: str, recipe: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    for kind in ("HTTP", "HTTPS", "ALL"):  # a proxy that nobody serves: who reaches out fails
        monkeypatch.setenv(f"{kind}_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    config = recipe(**{"log.trackers": [name], "train.steps": 2})
    run = Trainer(config, progress=False).train().run_dir
    rows = READERS[name](run)
    for row in read_jsonl(run / "metrics.jsonl"):
        numbers = {key: value for key, value in row.items() if value is not None}
        # TensorBoard keeps float32.
        assert rows[numbers.pop("step")] == pytest.approx(numbers, rel=1e-6)


def test_a_missing_tracker_is_named(recipe: Callable[..., Config], tmp_path: Path) -> None:
    missing = [n for n in ("swanlab", "trackio") if importlib.util.find_spec(n) is None]
    if not missing:
        pytest.skip("all are installed")
    message = rf"log.trackers: {missing[0]} not installed: pip install .* pip install {missing[0]}"
    with pytest.raises(UsageError, match=message):
        Trainer(recipe(**{"log.trackers": [missing[0]]}), progress=False)
    assert not (tmp_path / "run").exists()


def test_the_users_environment_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: dict[str, Any] = trackers.tracker_options(["wandb", "swanlab", "tensorboard"], tmp_path)
    assert (found["wandb"]["mode"], found["swanlab"]["mode"]) == ("offline", "offline")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("SWANLAB_MODE", "online")
    found = trackers.tracker_options(["wandb", "swanlab"], tmp_path)
    assert (found["wandb"]["mode"], found["swanlab"]["mode"]) == ("online", "online")
