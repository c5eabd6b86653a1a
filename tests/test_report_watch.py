"""A watched report: written when something changed, with new runs, until all runs are complete."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from report_cases import by_hand, finish

from poweropd import Config
from poweropd.report import page, runs, watch
from poweropd.runs.directory import RunDirectory, run_directories

REFRESH = 'data-refresh="7"'


@pytest.fixture(autouse=True)
def _small_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_bundle", lambda: "")  # the drawing code
    monkeypatch.setattr(page, "sections", lambda runs: ([], []))  # and what it draws


@pytest.fixture
def folder(recipe: object, tmp_path: Path) -> Path:
    return tmp_path / "sweep"


def make(recipe: object, folder: Path, name: str) -> RunDirectory:
    config: Config = recipe(**{"run.dir": str(folder / name)})  # type: ignore[operator]
    return by_hand(config, steps=2)


def test_a_page_is_written_when_a_run_grew_or_came_and_at_the_end(
    recipe: object, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.html"
    one = make(recipe, folder, "alpha=5-seed1")
    writer = watch.ReportWriter([folder], out, None, every=7)
    assert writer.update()
    assert REFRESH in out.read_text()
    assert not writer.update()  # nothing changed
    one.append_metrics({"step": 3, "reverse_kl": 0.5})
    assert writer.update()
    assert "step 3 of" in out.read_text()
    read = []
    made = runs.RecordedRun
    monkeypatch.setattr(runs, "RecordedRun", lambda *a: read.append(a[0]) or made(*a))
    two = make(recipe, folder, "alpha=10-seed1")
    assert writer.update()
    assert "alpha=10-seed1" in out.read_text()
    assert read == ["alpha=10-seed1"]  # the other one is not read again
    assert (
        writer.progress() == "0 of 2 runs complete, alpha=5-seed1: step 3, alpha=10-seed1: step 2"
    )
    finish(one)
    assert writer.update()
    assert not writer.complete
    finish(two)
    assert writer.update()
    assert writer.complete
    assert "data-refresh" not in out.read_text()


def test_the_runs_of_a_folder_are_in_the_order_of_their_numbers(
    recipe: object, folder: Path
) -> None:
    names = ["alpha=0.5-seed42", "alpha=5.0-seed42", "alpha=50-seed8", "alpha=50-seed42", "clip"]
    for name in reversed(names):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").write_text("")
    assert [path.name for path in run_directories([folder])] == names


def test_whatever_ends_the_watch_leaves_a_page_that_is_still(
    recipe: object, folder: Path, tmp_path: Path
) -> None:
    out, said = tmp_path / "report.html", list[str]()
    run = make(recipe, folder, "run")

    def interrupted(seconds: float) -> None:
        assert seconds == 7
        assert REFRESH in out.read_text()
        run.append_metrics({"step": 3, "reverse_kl": 0.5})
        raise KeyboardInterrupt

    writer = watch.ReportWriter([run.path], out, None, every=7)
    with pytest.raises(KeyboardInterrupt):
        watch.watch_runs(writer, said.append, interrupted)
    assert "data-refresh" not in out.read_text()
    assert "step 3 of" in out.read_text()  # what came since the last look is in it
    assert said == [f"{out}: 0 of 1 runs complete, run: step 2"]


@pytest.mark.thorough
def test_ctrl_c_ends_the_command_in_two_lines(recipe: object, folder: Path) -> None:
    out = folder / "report.html"
    run = make(recipe, folder, "run")
    command = ["report", str(run.path), "--watch", "--every", "3", "--out", str(out)]
    running = subprocess.Popen(
        [sys.executable, "-m", "poweropd", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not out.exists():
        time.sleep(0.1)
        assert running.poll() is None, running.communicate()
    assert 'data-refresh="3.0"' in out.read_text()
    running.send_signal(signal.SIGINT)
    said, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGINT
    assert errors == ""
    assert "Ctrl-C ends the watch, not the runs" in said
    assert "data-refresh" not in out.read_text()
