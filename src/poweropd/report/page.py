"""One HTML page with all figures, their data and the drawing code; it loads nothing else."""

import base64
import functools
import hashlib
from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from poweropd.report import curves, distributions, evaluations, heatmaps, planes, samples, tables
from poweropd.report.colours import line_styles
from poweropd.report.runs import RecordedRun, read_runs
from poweropd.report.theme import Figure
from poweropd.runs.directory import run_directories
from poweropd.runs.files import write_atomically

Section = tuple[str, str, list[Figure]]  # heading, introduction, figures


def sections(runs: Sequence[RecordedRun]) -> tuple[list[Section], list[str]]:
    """Returns all figures by section, and notes on those that could not be made."""
    functions, notes = planes.plane(runs)
    bounds = planes.bounds_of([run.reward_setting for run in runs])
    width = curves.bucket_width(runs)
    thinned = (
        f"Curves are drawn by buckets of {width} steps: mean, with a band from the lowest to the "
        "highest value."
        if width > 1
        else "Every step is drawn."
    )
    drawn = functools.partial(distributions.figures, runs, bounds)
    every = "Of all trained tokens of all steps. The log ratio is ln t - ln p under any reward."
    where = "Where in a completion extremes sit, and where the models are sure and agree."
    earned = "What a token earns if the teacher gives it probability t and the student p."
    decay = "Whether extremes decay as the student learns."
    heatmap = heatmaps.position_and_step(runs)
    found: list[Section] = [
        ("Evaluation", "", evaluations.evaluation_figures(runs)),
        ("Training", thinned, curves.training(runs, bounds)),
        ("Distribution of rewards", every, drawn(distributions.DISTRIBUTIONS)),
        ("Position in the completion", where, drawn(distributions.BY_POSITION)),
        ("Persistence", decay, drawn(distributions.PERSISTENCE)),
        ("Rewards by position and step", "Each run has colours of its own range.", heatmap),
        ("The reward as a function", earned, functions),
        ("Time", "", curves.phases(runs)),
    ]
    return [section for section in found if section[2]], notes


def render(
    runs: Sequence[RecordedRun],
    sections_: Sequence[Section],
    notes: Sequence[str],
    refresh: float | None = None,
) -> str:
    """Renders the page as HTML; text of runs is escaped wherever it stands.

    refresh: seconds after which the page loads itself again, or None.
    """
    styles = line_styles([run.reward_setting for run in runs])
    environment = Environment(
        loader=PackageLoader("poweropd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["together"] = tables.together
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    scripts = [Markup(text) for text in (_bundle(), _resource("page.js"))]  # ours, not the runs'
    shown = [sample for run in runs for sample in samples.samples(run)]
    return environment.get_template("report.html").render(
        title="poweropd report: " + ", ".join(run.name for run in runs),
        runs=list(zip(runs, styles, strict=True)),
        repeated_colours=len(set(styles)) < len(styles),
        refresh=refresh,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S"),
        smoothing=any(f.smooth for _, _, figures in sections_ for f in figures),
        notes=[*tables.comparison_notes(runs), *notes],
        summary=tables.summary_table(runs),
        changes=evaluations.change_table(runs),
        differences=tables.differences_table(runs) if len(runs) > 1 else None,
        settings=tables.settings_table(runs),
        environment=tables.environment_table(runs),
        sections=sections_,
        samples=shown,
        strongest=[(run.name, samples.scale(run)) for run in runs],
        levels=range(-samples.LEVELS, samples.LEVELS + 1),
        specs={f.key: f.page_spec() for _, _, figures in sections_ for f in figures},
        style=Markup(_resource("style.css")),
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
    )


@functools.cache
def _bundle() -> str:
    """Returns Vega, Vega-Lite and vega-embed, as vl-convert carries them."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace(
        "</script", "<\\/script"
    )


def _resource(name: str) -> str:
    return resources.files("poweropd.report").joinpath("templates", name).read_text("utf-8")


def _hash(script: str) -> str:
    """Returns the name of a script in a content security policy, by which no other may run."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def write_report(paths: Sequence[Path], out: Path, png: Path | None) -> list[Path]:
    """Writes the page of runs and, into the folder `png`, its figures; returns all paths.

    paths: run directories, and folders of run directories. Raises UsageError for anything else.
    """
    return write_page(read_runs(run_directories(paths)), out, png)


def write_page(
    runs: Sequence[RecordedRun], out: Path, png: Path | None, refresh: float | None = None
) -> list[Path]:
    """Writes the page of runs that are read already, and its figures; returns all paths."""
    made, notes = sections(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(runs, made, notes, refresh))
    written = [out]
    if png is not None:
        png.mkdir(parents=True, exist_ok=True)
        for figure in (figure for _, _, figures in made for figure in figures):
            written.append(png / f"{figure.key}.png")
            write_atomically(written[-1], figure.png())
    return written
