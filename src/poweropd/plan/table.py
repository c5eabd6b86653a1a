"""A plan in the terminal, at most 80 columns wide."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from poweropd.models.flops import UpdateFlops
from poweropd.models.geometry import Geometry
from poweropd.plan.command import Plan
from poweropd.plan.estimate import USABLE, CostEstimate
from poweropd.plan.memory import GIB, PHASES

WIDTH = 80
UNSHARED = {"none": "both models", "fsdp2": "the teacher, and the copy that samples"}
STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "not checked": "dim"}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    console = console or Console()
    if console.width > WIDTH:
        console.width = WIDTH
    own = plan.estimates[0]
    tables = [models(plan), flops(own), memory(plan, own)]
    if len(plan.estimates) > 1:
        tables.append(objectives_table(plan))
    for table in [checks(plan), *tables]:
        console.print(table)
    for line in [*fit(plan), *cost(plan, own)]:
        console.print(line, markup=False, highlight=False)


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """The first column left, the others right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(header[0], overflow="fold")
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def checks(plan: Plan) -> Table:
    table = Table(title="Checks", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("check", "status", "detail"):
        table.add_column(name)
    for check in plan.inspected.checks:
        table.add_row(check.name, f"[{STYLES[check.status]}]{check.status}[/]", check.detail)
    return table


def models(plan: Plan) -> Table:
    found = plan.inspected
    pairs = (
        ("student", plan.config.model.student, found.student),
        ("teacher", plan.config.only_teacher.model, found.teacher),
    )
    rows = [[f"{who}\n{name}", *_shape(g), found.sources[who]] for who, name, g in pairs]
    header = ["model", "layers", "hidden", "heads", "parameters", "from"]
    return _table("Models", header, rows)


def _shape(g: Geometry) -> list[str]:
    heads = f"{g.heads}/{g.kv_heads}x{g.head_dim}"
    return [str(g.layers), str(g.hidden), heads, _count(g.parameters)]


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e7 else f"{number / 1e6:.2f} M"


@dataclass(frozen=True)
class Unit:
    """In which FLOPs are shown."""

    name: str
    size: float

    @classmethod
    def of(cls, own: CostEstimate) -> "Unit":
        return cls("TFLOPs", 1e12) if own.paper.total >= 1e11 else cls("MFLOPs", 1e6)

    def show(self, value: float) -> str:
        return f"{value / self.size:.1f}"

    def paper_total(self, paper: UpdateFlops) -> float:
        """The paper adds up what it has rounded to a tenth, so that its sums are seen to hold."""
        parts = (paper.bodies, paper.teacher_head, paper.student_head)
        return sum(round(part / self.size, 1) for part in parts) * self.size


def flops(own: CostEstimate) -> Table:
    paper, true, unit = own.paper, own.true, Unit.of(own)
    total = unit.paper_total(paper)
    rows = [
        ("teacher, forward", paper.teacher_body, true.teacher_body),
        ("student, forward and backward", paper.student_body, true.student_body),
        ("without heads (the paper's sampled)", paper.bodies, true.bodies),
        ("teacher's head", paper.teacher_head, true.teacher_head),
        ("student's head", paper.student_head, true.student_head),
        ("both heads", paper.heads, true.heads),
        ("with both (the paper's full-vocabulary)", total, true.total),
    ]
    cells = [[name, unit.show(a), unit.show(b)] for name, a, b in rows]
    cells.insert(1, ["student, forward", unit.show(paper.student_body / 3), ""])
    cells.append(["saved by leaving the heads out", f"{paper.heads / total:.1%}", "none"])
    return _table(f"{unit.name} of an update", ["", "the paper's", "true"], cells)


def _gib(value: float) -> str:
    """Two decimals, or for what is small two digits."""
    gib = value / GIB
    return f"{gib:.2f}" if gib >= 0.1 else f"{gib:.2g}"


def memory(plan: Plan, own: CostEstimate) -> Table:
    found = own.memory
    rows = [
        [part.name, *(_gib(part.bytes) if phase in part.phases else "" for phase in PHASES)]
        for part in found.parts
        if part.bytes
    ]
    rows.append(["[bold]held[/]", *(f"[bold]{_gib(found.held(p))}[/]" for p in PHASES)])
    title = f"GiB on each of {own.gpus} GPU{'s' if own.gpus > 1 else ''}"
    return _table(title, ["part", *PHASES], rows)


def objectives_table(plan: Plan) -> Table:
    unit = Unit.of(plan.estimates[0])
    rows = []
    for e in plan.estimates:
        paper = unit.paper_total(e.paper) if e.kind == "full_vocab" else e.paper.bodies
        cells = [unit.show(paper), unit.show(e.true.total), _seconds(e.step_seconds)]
        rows.append([e.kind, *cells, _gib(e.memory.peak)])
    header = ["objective", f"{unit.name}, paper's", f"{unit.name}, true", "s / step", "peak GiB"]
    return _table("Objectives", header, rows)


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


def fit(plan: Plan) -> list[str]:
    """Whether the run fits on the GPUs asked about, and what would help."""
    own = plan.estimates[0]
    size, usable = _gib(plan.gpu_bytes), _gib(plan.gpu_bytes * USABLE)
    peak = f"Peak {_gib(own.memory.peak)} GiB, in {own.memory.peak_phase}"
    if plan.gpus_needed is None:
        lines = [
            f"{peak}: more than {usable} of {size} GiB.",
            "More GPUs do not help: each holds "
            f"{UNSHARED[plan.config.train.sharding]}; completions are shared.",
        ]
    else:
        lines = [
            f"{peak}; of {size} GiB, {usable} count as usable. GPUs needed: {plan.gpus_needed}."
        ]
    if plan.gpus_needed != 1:
        lines += [
            f"  {a.override}: {_gib(a.peak_bytes)} GiB on "
            + ("one GPU" if a.gpus == 1 else f"each of {a.gpus} GPUs")
            for a in plan.advice
        ]
    return lines


def cost(plan: Plan, own: CostEstimate) -> list[str]:
    """Time and GPU-hours, with what they rest on."""
    work, rate = plan.workload, plan.throughput
    lines = [
        f"A step: {work.completions} prompts of {work.prompt} tokens ({plan.prompt_source}) and "
        f"completions of {work.completion}.",
        f"Scoring and update: {own.seconds['score and update']:.2f} s, {rate.source}.",
    ]
    rollout, hours = own.seconds["rollout"], own.gpu_hours(plan.config.train.steps)
    if rollout is None or hours is None:
        return [*lines, "Rollouts: not known; give --tokens-per-second or --measured RUN."]
    lines.append(f"Rollouts: {rollout:.2f} s at {rate.rollout:.0f} tokens/s on each GPU.")
    steps = plan.config.train.steps
    return [
        *lines,
        f"{own.step_seconds:.2f} s per step; {steps} steps: {hours:.1f} GPU-hours on {own.gpus} "
        f"GPU{'s' if own.gpus > 1 else ''}, evaluation not counted.",
    ]
