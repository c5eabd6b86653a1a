"""The processes that compare answers, or run tools: killable, and free of the caller's imports.

A worker must load neither torch nor the caller's script. Forking would copy a process full of
threads, so workers are forked from a server that only ever imported the comparison; on Windows
they are spawned. Both would run the caller's main module again in each worker, so it is hidden
while a worker starts: a training script without a main guard can grade, too.
"""

import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.process import BaseProcess
from types import ModuleType

from pebble import ProcessPool

from poweropd.grading.rules import Rule, Verdict

if sys.platform == "win32":
    from multiprocessing.context import SpawnContext as _Context
    from multiprocessing.context import SpawnProcess as _Process
    from multiprocessing.popen_spawn_win32 import Popen
else:
    from multiprocessing.context import ForkServerContext as _Context
    from multiprocessing.context import ForkServerProcess as _Process
    from multiprocessing.popen_forkserver import Popen

_WARM = "poweropd.grading.warm"
#: Address space of one worker; huge powers end in MemoryError instead of taking the machine down.
_MEMORY_BYTES = 4 * 2**30
_LAUNCH = threading.Lock()


def compare_in_worker(gold: str, answer: str, rule: Rule) -> Verdict:
    """Calls `comparison.compare`, but can be imported without loading sympy in the caller."""
    from poweropd.grading import comparison

    return comparison.compare(gold, answer, rule)


def search_in_worker(pattern: str, group: int, text: str) -> str | None:
    """Returns what the group holds in the last match of a pattern that has it; None without one.

    Group 0 is the whole match, of which the first is enough.
    """
    warnings.simplefilter("ignore")
    found = None
    for match in re.finditer(pattern, text):
        if match.group(group) is not None:
            found = match.group(group)
            if group == 0:
                break
    return found


def worker_pool(workers: int, prepare: Callable[..., None] | None = None) -> ProcessPool:
    """Returns a pool of warm workers, each of which calls `prepare` once; theirs is grading."""
    context = _CleanContext()
    if sys.platform != "win32":
        context.set_forkserver_preload([_WARM])
    return ProcessPool(max_workers=workers, initializer=prepare or _prepare, context=context)


def _prepare() -> None:
    """Prepares a worker that grades: limits its memory, loads math-verify, keeps it silent."""
    limit_memory()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import_module(_WARM)


def limit_memory() -> None:
    """Limits the address space of this process, so that it fails before the machine does."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, _MEMORY_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Hides the main module, which a worker would otherwise find and run again as it starts."""
    with _LAUNCH:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


class _CleanProcess(_Process):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Popen:
        with _main_module_hidden():
            return _Process._Popen(process_obj)


class _CleanContext(_Context):
    Process = _CleanProcess
