"""Prints a plan in the terminal, at most 80 columns wide."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from poweropd.models.flops import UpdateFlops
from poweropd.plan.command import Plan
from poweropd.plan.estimate import USABLE, CostEstimate
from poweropd.plan.memory import GIB, PHASES
from poweropd.terminal import make_console

WIDTH = 80
UNSHARED = {"none": "both models", "fsdp2": "the teacher, and the copy that samples"}
STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "not checked": "dim"}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints checks, models, FLOPs, memory, whether the run fits, its cost and its first prompt."""
    console = console or make_console()
    if console.width > WIDTH:
        console.width = WIDTH
    own = plan.estimates[0]
    tables = [checks_table(plan), models_table(plan), flops_table(own), memory_table(own)]
    if len(plan.estimates) > 1:
        tables.append(objectives_table(plan))
    for table in tables:
        console.print(table)
    for line in [*fit(plan), *cost(plan), *plan.inspected.first_prompt]:
        console.print(line, highlight=False)


def _plan_table(
    title: str, header: Sequence[str], cells: Iterable[Sequence[str | Text]], numbers: bool = True
) -> Table:
    """Returns a table whose first column is left-aligned, and whose others are if not numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(header[0], overflow="fold" if numbers else "ellipsis")
    for name in header[1:]:
        table.add_column(name, justify="right" if numbers else "left")
    for line in cells:
        table.add_row(*line)
    return table


def checks_table(plan: Plan) -> Table:
    cells = [
        (check.name, Text(check.status, STYLES[check.status]), check.detail)
        for check in plan.inspected.checks
    ]
    return _plan_table("Checks", ["check", "status", "detail"], cells, numbers=False)


def models_table(plan: Plan) -> Table:
    cells = []
    for role, model in plan.inspected.models.items():
        g = model.geometry
        heads = f"{g.heads}/{g.kv_heads}x{g.head_dim}"
        billions = g.parameters >= 1e7
        count = f"{g.parameters / (1e9 if billions else 1e6):.2f} {'B' if billions else 'M'}"
        shape = [str(g.layers), str(g.hidden), heads, count]
        cells.append([f"{role}\n{model.name}", *shape, model.source])
    header = ["model", "layers", "hidden", "heads", "parameters", "from"]
    return _plan_table("Models", header, cells)


@dataclass(frozen=True)
class FlopsUnit:
    """The unit in which FLOPs are shown."""

    name: str
    size: float

    @classmethod
    def of(cls, own: CostEstimate) -> "FlopsUnit":
        return cls("TFLOPs", 1e12) if own.paper.total >= 1e11 else cls("MFLOPs", 1e6)

    def show(self, value: float) -> str:
        return f"{value / self.size:.1f}"

    def paper_total(self, paper: UpdateFlops) -> float:
        """Returns the paper's total: it adds parts rounded to a tenth, so its tables add up."""
        parts = (paper.bodies, paper.teacher_head, paper.student_head)
        return sum(round(part / self.size, 1) for part in parts) * self.size


def flops_table(own: CostEstimate) -> Table:
    """Returns the table of FLOPs, as the paper counts them and as they are done."""
    paper, true, unit = own.paper, own.true, FlopsUnit.of(own)
    total = unit.paper_total(paper)
    figures = [
        ("teacher, forward", paper.teacher_body, true.teacher_body),
        ("student, forward and backward", paper.student_body, true.student_body),
        ("without heads (the paper's sampled)", paper.bodies, true.bodies),
        ("teacher's head", paper.teacher_head, true.teacher_head),
        ("student's head", paper.student_head, true.student_head),
        ("both heads", paper.heads, true.heads),
        ("with both (the paper's full-vocabulary)", total, true.total),
    ]
    cells = [[name, unit.show(a), unit.show(b)] for name, a, b in figures]
    cells.insert(1, ["student, forward", unit.show(paper.student_body / 3), ""])
    cells.append(["saved by leaving the heads out", f"{paper.heads / total:.1%}", "none"])
    return _plan_table(f"{unit.name} of an update", ["", "the paper's", "true"], cells)


def _gib(value: float) -> str:
    """Formats bytes as GiB with two decimals, or with two digits if it is little."""
    gib = value / GIB
    return f"{gib:.2f}" if gib >= 0.1 else f"{gib:.2g}"


def _on_gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def memory_table(own: CostEstimate) -> Table:
    found = own.memory
    cells: list[list[str | Text]] = [
        [part.name, *(_gib(part.bytes) if phase in part.phases else "" for phase in PHASES)]
        for part in found.parts
        if part.bytes
    ]
    held = ["held", *(_gib(found.held(p)) for p in PHASES)]
    cells.append([Text(cell, "bold") for cell in held])
    return _plan_table(f"GiB on each of {_on_gpus(own.gpus)}", ["part", *PHASES], cells)


def objectives_table(plan: Plan) -> Table:
    unit = FlopsUnit.of(plan.estimates[0])
    cells = []
    for each in plan.estimates:
        paper = unit.paper_total(each.paper) if each.kind == "full_vocab" else each.paper.bodies
        seconds = "?" if each.step_seconds is None else f"{each.step_seconds:.2f}"
        flops = [unit.show(paper), unit.show(each.true.total)]
        cells.append([each.kind, *flops, seconds, _gib(each.memory.peak)])
    header = ["objective", f"{unit.name}, paper's", f"{unit.name}, true", "s / step", "peak GiB"]
    return _plan_table("Objectives", header, cells)


def fit(plan: Plan) -> list[str]:
    """Says whether the run fits on the GPUs, and which settings would help."""
    memory = plan.estimates[0].memory
    size, usable = _gib(plan.gpu_bytes), _gib(plan.gpu_bytes * USABLE)
    peak = f"Peak {_gib(memory.peak)} GiB, in {memory.peak_phase}"
    if plan.gpus_needed is None:
        unshared = UNSHARED[plan.config.train.sharding]
        lines = [
            f"{peak}: more than {usable} of {size} GiB.",
            f"More GPUs do not help: each holds {unshared}; completions are shared.",
        ]
    else:
        needed = f"GPUs needed: {plan.gpus_needed}"
        lines = [f"{peak}; of {size} GiB, {usable} count as usable. {needed}."]
    if plan.gpus_needed != 1:
        for advice in plan.advice:
            where = "one GPU" if advice.gpus == 1 else f"each of {advice.gpus} GPUs"
            lines.append(f"  {advice.override}: {_gib(advice.peak_bytes)} GiB on {where}")
    return lines


def cost(plan: Plan) -> list[str]:
    """Says how much time and how many GPU-hours the run takes, and on which assumptions."""
    own, work, rate = plan.estimates[0], plan.workload, plan.throughput
    steps, rollout = plan.config.train.steps, own.seconds["rollout"]
    lines = [
        f"A step: {work.completions} prompts of {work.prompt} tokens ({plan.prompt_source}) and "
        f"completions of {work.completion}.",
        f"Scoring and update: {own.seconds['score and update']:.2f} s, {rate.source}.",
    ]
    if rollout is None:
        return [*lines, "Rollouts: not known; give --tokens-per-second or --measured RUN."]
    return [
        *lines,
        f"Rollouts: {rollout:.2f} s at {rate.rollout:.0f} tokens/s on each GPU.",
        f"{own.step_seconds:.2f} s per step; {steps} steps: {own.gpu_hours(steps):.1f} GPU-hours "
        f"on {_on_gpus(own.gpus)}, evaluation not counted.",
    ]
