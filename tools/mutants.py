"""Mutation testing by mutmut: changes the code in one place, and asks whether a test fails.

make mutants                             # a sample of each module's mutants
make mutants ARGS='rewards stops --sample 1000'

Each line of MODULES is mutated in a copy of its own below .mutants/. Where there are more mutants
than `--sample`, some are drawn with a fixed seed. Not changed are code outside functions, such as
tables and defaults of fields, functions with a decorator other than staticmethod or classmethod
and, by our choice, the text of errors and of the log. The survivors are in
.mutants/NAME/survivors.diff. All mutants of all modules take hours.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / ".mutants"
SEED = 0

# Name -> modules of src/poweropd, and the tests that judge their mutants. They should be quick: a
# mutant runs those of them that reach its function, up to the first that fails.
MODULES = {
    "rewards": (["rewards/*.py"], ["test_rewards.py"]),
    "stops": (["stops.py"], ["test_stops.py"]),
    "data": (
        ["data/batch.py", "data/rollout.py"],
        ["test_batching.py", "test_update.py", "test_objectives.py"],
    ),
    "prompts": (
        ["data/prompts.py"],
        [
            "test_data.py",
            "test_keys.py::test_prompts_come_in_the_order_that_the_recipe_says",
            "test_keys.py::test_column_system_and_chat_make_the_prompt",
            "test_keys.py::test_a_hub_dataset_is_read_in_its_split",
        ],
    ),
    "kernels": (
        ["kernels/*.py"],
        ["test_kernels.py", "test_kernels_full_vocab.py", "test_kernels_support.py"],
    ),
    "objectives": (["objectives/*.py"], ["test_objectives.py", "test_selection.py"]),
    "update": (
        ["training/update.py"],
        [
            "test_update.py",
            "test_keys.py::test_the_learning_rate_follows_its_schedule_and_warm_up",
            "test_keys.py::test_weight_decay_pulls_towards_zero",
            "test_keys.py::test_clipping_bounds_the_gradient_that_trains",
            "test_keys.py::test_a_micro_batch_keeps_to_its_tokens",
        ],
    ),
    "checkpoint": (
        ["training/checkpoint.py"],
        [
            "test_damage.py::test_a_disk_that_is_full_at_a_checkpoint_leaves_the_one_before",
            "test_damage.py::test_leftovers_of_other_runs_and_kills_are_no_checkpoints",
            "test_damage.py::test_a_run_whose_checkpoints_are_all_damaged_ends_in_one_line",
            "test_damage.py::test_checkpoints_are_what_sha256sum_says",
            "test_keys.py::test_checkpoints_are_written_and_kept_as_often_as_said",
            "test_trainer.py::test_a_resumed_run_ends_as_an_undisturbed_one",
            "test_trainer.py::test_steps_after_the_last_checkpoint_are_done_again",
        ],
    ),
    "teachers": (["teachers/pool.py", "teachers/server.py"], ["test_teachers_server.py"]),
}
# Functions that run while modules are imported, which is before a mutant is chosen.
AT_IMPORT = ("rewards.x__number__", "rewards.x__positive__")
LINKED = ["src", "tests", "tools", "recipes"]
# A line that raises or logs, or that is a part of such a text; what is said is not judged here.
TEXTS = [r"raise \w+", r"logger\.\w+", r"^\s*f?\"[^\"]* [^\"]*\"[,)]*$"]
KILLED, TIMED_OUT = (1, 3), (24, -24, 36, 152, 255)  # exit codes of mutmut
# Behind the other packages: mutmut brings some of them along in versions of its own.
MUTMUT = "import sys; sys.path.append(sys.argv.pop(1)); from mutmut.__main__ import cli; cli()"


def main() -> None:
    """Mutates what the command line names, and prints the score of each module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODULES)}")
    parser.add_argument("--sample", type=int, default=50, help="mutants of each name at most")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in MODULES]
    if unknown:
        parser.error(f"expected some of {', '.join(MODULES)}, got {', '.join(unknown)}")
    lines = [line for name in options.names or MODULES for line in run(name, options.sample)]
    print("\n".join(["module: killed (by the time limit) / tried / all mutants", *lines]))


def run(name: str, size: int) -> list[str]:
    """Runs a sample of the mutants of a line of MODULES; returns the score of each module."""
    folder = prepared(name)
    # Mutants, and the tests that reach them, are found before mutmut looks for the names given.
    mutmut(folder, "run", "--max-children", "1", "no-such-mutant", check=False)
    names = sorted(key for key in results(folder) if not any(part in key for part in AT_IMPORT))
    if not names:
        sys.exit(f"{folder}: mutmut found no mutants, or the tests fail: see its output above")
    chosen = random.Random(SEED).sample(names, min(size, len(names)))
    mutmut(folder, "run", "--max-children", "1", *chosen)
    found = results(folder)
    survivors = sorted(key for key in chosen if found[key] not in KILLED + TIMED_OUT)
    diffs = [mutmut(folder, "show", key, check=False) for key in survivors]
    (folder / "survivors.diff").write_text("\n".join(diffs))
    tried, killed, timed_out = (
        Counter(module(key) for key in chosen if codes is None or found[key] in codes)
        for codes in (None, KILLED + TIMED_OUT, TIMED_OUT)
    )
    everything = Counter(map(module, names))
    return [
        f"{m}: {killed[m]} ({timed_out[m]}) / {tried[m]} / {everything[m]}" for m in sorted(tried)
    ]


def module(key: str) -> str:
    """Returns the module of a mutant such as poweropd.stops.x_targets__mutmut_1."""
    return key.rpartition(".x")[0]


def prepared(name: str) -> Path:
    """Makes a fresh copy of the project in which mutmut changes the modules of one line."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for entry in LINKED:
        (folder / entry).symlink_to(ROOT / entry)
    modules, tests = MODULES[name]
    settings = {
        "source_paths": ["src"],
        "only_mutate": [f"src/poweropd/{module}" for module in modules],
        "do_not_mutate": ["*/kernels/reference.py"],  # the oracle of tests
        "do_not_mutate_patterns": TEXTS,
        "also_copy": ["tools", "recipes"],
        "pytest_add_cli_args_test_selection": [f"tests/{test}" for test in tests],
        # Tests with servers and graders leave threads, which a fork would lose.
        "process_isolation": "forkserver",
        # Of the clock: a busy machine must not pass for a failed test.
        "timeout_constant": 10,
        "timeout_multiplier": 4,
    }
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
    text = (ROOT / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(f"{text}\n[tool.mutmut]\n{''.join(lines)}")
    return folder


def mutmut(folder: Path, *args: str, check: bool = True) -> str:
    """Runs mutmut in a folder; returns what `show` prints."""
    shown = args[0] == "show"
    command = [sys.executable, "-c", MUTMUT, str(ROOT / ".mutmut"), *args]
    done = subprocess.run(command, cwd=folder, check=check, text=True, capture_output=shown)
    return done.stdout if shown else ""


def results(folder: Path) -> dict[str, int | None]:
    """Returns mutmut's exit code of each mutant, None where it has not been tried."""
    found: dict[str, int | None] = {}
    for path in sorted((folder / "mutants").rglob("*.meta")):
        found |= json.loads(path.read_text())["exit_code_by_key"]
    return found


if __name__ == "__main__":
    main()
