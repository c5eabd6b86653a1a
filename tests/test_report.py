"""Reports: what they say of whole, unfinished, broken and different runs; figures as files."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from report_cases import by_hand, finish, token_record, unknown_teacher
from typer.testing import CliRunner

from poweropd import Config, commands
from poweropd.errors import UsageError
from poweropd.evaluation.divergence import JudgedRow, summarize_divergence
from poweropd.report import (
    curves,
    distributions,
    evaluations,
    heatmaps,
    page,
    planes,
    samples,
    tables,
)
from poweropd.report.runs import RecordedRun, read_runs
from poweropd.runs.directory import RunDirectory, run_directories
from poweropd.runs.files import write_json
from poweropd.runs.metrics import OF_DIVERGENCE
from poweropd.runs.recorder import RewardRecorder

MAKES = Callable[..., Config]


@pytest.fixture
def make_run(recipe: MAKES, tmp_path: Path) -> Callable[..., Path]:
    """Makes a finished run directory by hand: metrics and reward records of so many steps."""

    def make(name: str = "run", steps: int = 20, **overrides: object) -> Path:
        config = recipe(**{"run.dir": str(tmp_path / name), "train.steps": steps, **overrides})
        run = by_hand(config, steps)
        finish(run)
        return run.path

    return make


def rendered(paths: list[Path]) -> str:
    runs = read_runs(paths)
    made, notes = page.sections(runs)
    return page.render(runs, made, notes)


def test_the_summary_has_the_numbers_of_each_run(make_run: Callable[..., Path]) -> None:
    one, two = make_run("one"), make_run("two", steps=10)
    for when, snr in (("start", 0.5), ("end", 0.25)):
        RunDirectory(one).write_gradients(when, {"gradient_snr": snr})
    found = {"sums": {"avg_at_k": {"mean": 0.5, "low": 0.4, "high": 0.625}}}
    RunDirectory(one).write_evaluation(20, found)
    table = tables.summary_table(read_runs([one, two]))
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert rows[0]["Avg@k on sums"] == "50.0% [40.0, 62.5] at step 20"
    assert rows[1]["Avg@k on sums"] == "–"
    expected = {"length": "10", "truncated, %": "25.0", "gradient norm": "19.5", "time": "0:00:40"}
    expected |= {"peak memory, GiB": "1.00", "trained tokens": "800", "state": "complete"}
    expected |= {"gradient SNR at the start": "0.5", "gradient SNR at the end": "0.25"}
    assert {key: rows[0][key] for key in expected} == expected


def test_a_run_going_on_a_crash_in_the_first_step_and_cut_lines_are_said(
    make_run: Callable[..., Path], recipe: MAKES, tmp_path: Path
) -> None:
    going = make_run("going")
    shutil.rmtree(going / "final")
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "rev')
    crashed = RunDirectory.open(recipe(**{"run.dir": str(tmp_path / "crashed")})).path
    text = rendered([going, crashed])
    assert "going: metrics.jsonl: 1 line cut short or damaged, left out" in text
    assert "going: not complete: step 20 of 20" in text
    assert "crashed: no step finished; it is still going, or was stopped or broken off" in text
    assert "crashed: no reward records" in text
    assert "crashed: no step finished" in rendered([crashed])  # also alone


def test_damaged_files_are_left_out_and_named(make_run: Callable[..., Path]) -> None:
    run = make_run()
    (run / "environment.json").write_text("{")
    (part,) = (run / "rewards").iterdir()
    (part / "histogram.parquet").write_bytes(b"PAR1")
    text = rendered([run])
    assert "environment.json: cannot be read" in text
    assert f"reward records left out, unreadable: {part.name}" in text


def test_runs_of_different_tasks_and_rewards_are_told_apart(
    make_run: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(prompts.read_text())
    one = make_run("one")
    two = make_run("two", **{"data.prompts": str(other), "reward.name": "clip"})
    notes = tables.comparison_notes(read_runs([one, two]))
    assert any("differ in data.prompts: they are of different tasks" in note for note in notes)
    assert any("have different rewards" in note for note in notes)
    rows = {row[0]: row[1:] for row in tables.differences_table(read_runs([one, two])).rows}
    assert rows["reward.name"] == ["power", "clip"]
    assert rows["reward.alpha"] == ["5.0", "–"]
    assert "data.prompts" in rows
    assert "train.steps" not in rows
    assert tables.comparison_notes(read_runs([one])) == []


def test_wrong_arguments_are_one_line(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(UsageError, match=r"RUN: .* directories .*/nowhere does not exist"):
        run_directories([run, tmp_path / "nowhere"])
    with pytest.raises(UsageError, match=r"has no config\.yaml"):
        run_directories([tmp_path / "run" / "final"])
    with pytest.raises(UsageError, match="is given twice"):
        read_runs([run, run / ".." / run.name])


def test_runs_of_one_name_are_shown_by_longer_ones(make_run: Callable[..., Path]) -> None:
    runs = read_runs([make_run("a/run", steps=1), make_run("b/run", steps=1)])
    assert [run.name for run in runs] == ["a/run", "b/run"]


def test_the_command_writes_the_page_and_every_figure(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    out, pictures = tmp_path / "out" / "page.html", tmp_path / "pictures"
    arguments = ["report", str(make_run(steps=3)), "--out", str(out), "--png", str(pictures)]
    result = CliRunner().invoke(commands.app, arguments)
    assert result.exit_code == 0, result.output
    assert out.read_text().count('class="chart"') == len(list(pictures.iterdir())) > 10
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures.iterdir())
    assert all(p.stat().st_size > 5_000 for p in pictures.iterdir())


def test_long_curves_are_drawn_by_mean_and_range_of_buckets(make_run: Callable[..., Path]) -> None:
    run = read_runs([make_run(steps=2)])[0]
    run.metrics = [{"step": s, "grad_norm": float(s % 7)} for s in range(1, 1001)]
    width = curves.bucket_width([run])
    rows = list(curves.curve_rows(run, "grad_norm", width))
    assert (width, len(rows)) == (4, 250)
    assert rows[1] == {"run": "run", "step": 6.5, "mean": 3.0, "low": 0.0, "high": 6.0}
    assert [row["mean"] for row in curves.curve_rows(run, "grad_norm", 1)][:3] == [1, 2, 3]
    assert all(row["low"] > 0 for row in curves.curve_rows(run, "grad_norm", 4, positive=True))


def test_figures_of_rewards_are_those_of_the_tokens(make_run: Callable[..., Path]) -> None:
    run = read_runs([make_run(steps=20)])[0]
    all_tokens = [token_record(40, seed=step) for step in range(1, 21)]
    rewards = np.concatenate([record.rewards.numpy() for record in all_tokens])
    tails = rows_of(run, "tail-below")
    two = next(row for row in tails if row["x"] == 2)
    assert two["value"] == pytest.approx((rewards < -2).mean(), rel=1e-3)
    shares = [row["value"] for row in rows_of(run, "reward-distribution") if row["value"]]
    assert sum(shares) == pytest.approx(1, abs=1e-2)
    lowest = [row for row in rows_of(run, "lowest-by-position") if row["kind"] == "extreme"]
    fifth = min(record.rewards[5].item() for record in all_tokens)
    assert lowest[5]["value"] == pytest.approx(fifth, rel=1e-3)
    far = rows_of(run, "far-over-training")
    late = [row["value"] for row in far if row["kind"] == "later positions"]
    expected = [
        np.mean([np.abs(r.rewards[16:].numpy()) >= 4 for r in all_tokens[start : start + 10]])
        for start in (0, 10)
    ]
    assert late == pytest.approx(expected, rel=1e-3)
    (figure,) = heatmaps.position_and_step([run])
    cell = next(row for row in figure.rows if row["step"] == 3 and row["position"] == 7)
    assert cell["mean"] == pytest.approx(all_tokens[2].rewards[7].item(), rel=1e-3)


def rows_of(run: RecordedRun, key: str) -> list[dict[str, float]]:
    plots = [*distributions.DISTRIBUTIONS, *distributions.BY_POSITION, *distributions.PERSISTENCE]
    (plot,) = (plot for plot in plots if plot.key == key)
    return list(plot.rows(run))


def test_without_the_teachers_statistics_its_lines_are_absent(
    make_run: Callable[..., Path],
) -> None:
    path = make_run(steps=1)
    recorder = RewardRecorder(path / "rewards", str)
    recorder.truncate(0)
    recorder.record(1, unknown_teacher(token_record(40)), [])
    recorder.write()
    run = read_runs([path])[0]
    assert {row["kind"] for row in rows_of(run, "entropy-by-position")} == {"student"}
    assert {row["kind"] for row in rows_of(run, "top1-by-position")} == {"student"}


def test_the_plane_shows_the_reward_of_the_run(make_run: Callable[..., Path]) -> None:
    alpha = {"schedule": "linear", "start": 1.0, "end": 3.0, "steps": 2}
    scheduled = make_run("a", steps=3, **{"reward.name": "power", "reward.alpha": alpha})
    zscore = make_run("b", steps=1, **{"reward.name": "zscore"})
    runs = read_runs([scheduled, zscore])
    runs.append(read_runs([make_run("c", steps=1)])[0])
    runs[2].recipe["reward"] = {"name": "nowhere.at:all"}
    figures, notes = planes.plane(runs)
    assert len(figures) == 2
    for row in (figures[0].rows[7], figures[0].rows[-20]):
        assert row["reward"] == pytest.approx(row["t"] ** 3 - row["p"] ** 3, rel=1e-3)
    assert "base reward" in figures[1].description
    (note,) = notes
    assert note.startswith("the reward of c is not drawn: it is code of the user's own")


def test_a_plane_shows_an_alpha_of_500(make_run: Callable[..., Path]) -> None:
    path = make_run(steps=1, **{"reward.name": "power", "reward.alpha": 500.0})
    (figure,), _ = planes.plane(read_runs([path]))
    values = np.array([row["reward"] for row in figure.rows])
    assert (np.abs(values) > 0.5).mean() > 0.2  # of the plane; by linear axes it was none
    colour = figure.spec()["encoding"]["color"]
    assert colour["scale"]["domain"] == [-1, 1]  # of the reward, not of what is drawn
    assert colour["legend"]["values"] == [-1, 0, 1]
    assert "0.9999" in figure.spec()["encoding"]["x"]["axis"]["labelExpr"]


def test_sampled_estimates_are_called_so(make_run: Callable[..., Path]) -> None:
    runs = read_runs([make_run(steps=2)])
    found = {figure.key: figure for figure in curves.training(runs, [])}
    assert "A sampled estimate" in found["reverse_kl"].description
    table = tables.summary_table(runs)
    assert "reverse KL (sampled)" in table.columns
    assert "a sampled estimate" in table.caption


def accuracy_of(solved: dict[str, object]) -> dict[str, object]:
    return {"avg_at_k": {"mean": 0.5, "low": 0.25, "high": 0.75}, "solved": solved}


def test_before_after_and_the_teacher_are_a_table(make_run: Callable[..., Path]) -> None:
    path = make_run(steps=4)
    run, problems = RunDirectory(path), [str(i) for i in range(40)]
    assert evaluations.change_table(read_runs([path])) is None  # nothing was measured
    run.write_evaluation(4, {"sums": accuracy_of(dict.fromkeys(problems, 0.75))})
    assert evaluations.change_table(read_runs([path])) is None  # nothing to compare with
    run.write_evaluation(0, {"sums": accuracy_of(dict.fromkeys(problems, 0.5))})
    (path / "eval" / "teacher").mkdir()
    write_json(path / "eval" / "teacher" / "results.json", {"results": {"sums": accuracy_of({})}})
    table = evaluations.change_table(read_runs([path]))
    assert table is not None
    (row,) = table.rows
    assert row[:3] == ["sums", "run", "50.0% [25.0, 75.0]"]
    assert row[3:] == [
        "50.0% [25.0, 75.0] at step 4",
        "+25.0 [+25.0, +25.0]",
        "50.0% [25.0, 75.0]",
    ]
    assert "+25.0 [+25.0,\N{NO-BREAK SPACE}+25.0]" in rendered([path])
    for other in ({"another": 0.5}, dict.fromkeys(problems, "half"), "none"):
        run.write_evaluation(0, {"sums": accuracy_of(other)})  # type: ignore[arg-type]
        table = evaluations.change_table(read_runs([path]))
        assert table is not None
        assert table.rows[0][4] == "–"


def judged(kl: Mapping[str, float]) -> dict[str, object]:
    """The file's part of an evaluation in which each prompt had one completion of 10 tokens."""
    rows = [
        JudgedRow(
            id=i, sample=0, completion="x", length=10, stop="</s>", tokens=10,
            reverse_kl=10 * value, agreement=5, teacher_log_prob=-20.0,
        )
        for i, value in kl.items()
    ]  # fmt: skip
    return summarize_divergence(rows, "exact").to_dict()


def test_the_divergence_is_in_both_tables_and_a_figure_with_its_interval(
    make_run: Callable[..., Path],
) -> None:
    path = make_run(steps=4)
    run, ids = RunDirectory(path), [str(i) for i in range(40)]
    before = judged({i: 1.0 + int(i) / 40 for i in ids})
    after = judged({i: 0.5 + int(i) / 40 for i in ids})
    run.write_evaluation(4, {}, after)
    runs = read_runs([path])
    assert evaluations.change_table(runs) is None  # nothing was measured before
    summary = tables.summary_table(runs)
    column = summary.columns.index("held-out KL")
    assert summary.rows[0][column].startswith("0.9875 [")
    assert summary.rows[0][column].endswith("] at step 4")
    run.write_evaluation(0, {}, before)
    runs = read_runs([path])
    table = evaluations.change_table(runs)
    assert table is not None
    rows = {row[0]: row for row in table.rows}
    kl = rows["held-out KL, nats per token"]
    assert kl[2].startswith("1.4875 [")
    assert kl[4:] == ["-0.5000 [-0.5000, -0.5000]", "–"]  # the prompts' own part cancels
    assert rows["agreement, %"][4] == "+0.0 [+0.0, +0.0]"
    assert len(rows) == len(OF_DIVERGENCE)
    figures = {figure.key: figure for figure in evaluations.evaluation_figures(runs)}
    figure = figures["eval-divergence-reverse_kl"]
    assert [row["step"] for row in figure.rows] == [0, 4]
    assert all(row["low"] < row["mean"] < row["high"] for row in figure.rows)
    assert "sampled" not in figure.description
    band = figure.spec()["layer"][0]
    assert (band["mark"]["type"], band["encoding"]["y2"]) == ("area", {"field": "high"})
    assert "-0.5000 [-0.5000,\N{NO-BREAK SPACE}-0.5000]" in rendered([path])


def test_a_sampled_divergence_is_called_so(make_run: Callable[..., Path]) -> None:
    path = make_run(steps=4)
    for step in (0, 4):
        found = judged({"a": 1.0, "b": 2.0}) | {"estimate": "sampled"}
        RunDirectory(path).write_evaluation(step, {}, found)
    runs = read_runs([path])
    table = evaluations.change_table(runs)
    assert table is not None
    assert table.rows[0][0] == "held-out KL, nats per token, a sampled estimate"
    found = {figure.key: figure.description for figure in evaluations.evaluation_figures(runs)}
    assert found["eval-divergence-reverse_kl"].endswith("A sampled estimate in run.")
    assert "sampled" not in found["eval-divergence-agreement"]


@pytest.mark.parametrize("damage", [{}, {"a": 1}, {"a": {"tokens": "ten"}}, [], {"other": None}])
def test_a_change_without_the_prompts_own_figures_is_absent(
    make_run: Callable[..., Path], damage: object
) -> None:
    path = make_run(steps=4)
    whole = judged({"a": 1.0, "b": 2.0})
    RunDirectory(path).write_evaluation(0, {}, whole | {"per_prompt": damage})
    RunDirectory(path).write_evaluation(4, {}, whole)
    table = evaluations.change_table(read_runs([path]))
    assert table is not None
    assert {row[4] for row in table.rows} == {"–"}


def test_tooltips_name_fields_that_the_rows_have(make_run: Callable[..., Path]) -> None:
    made, _ = page.sections(read_runs([make_run(steps=3), make_run("other", steps=3)]))
    for figure in (figure for _, _, figures in made for figure in figures):
        assert 3 <= len(figure.tooltip) <= 6
        known = {key for row in figure.rows for key in row} | {"smooth"}
        assert {field.field for field in figure.tooltip} <= known


def test_a_tokens_colour_is_its_rewards_share_of_the_scale() -> None:
    levels = {-9.0: -4, -0.5: -1, 0.0: 0, 0.99: 2, 2.0: 4}
    for reward, level in levels.items():
        assert samples._token("x", reward, -1.0, -2.0, strongest=2.0).level == level
    assert samples._token("x", None, None, None, strongest=2.0).level is None
