"""The processes that compare answers: warm, clean of the caller's imports, and killable.

A worker must load neither torch nor the caller's script. Forking would copy a process full of
threads, so workers are forked from a server that only ever imported the comparison; on Windows
they are spawned. Both would run the caller's main module again in each worker, so it is hidden
while a worker starts: a training script without a main guard can grade, too.
"""

import logging
import multiprocessing
import multiprocessing.context
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

from pebble import ProcessPool

from poweropd.grading.rules import Rule, Verdict

_WARM = "poweropd.grading.warm"
#: Address space of one worker; huge powers end in MemoryError instead of taking the machine down.
_MEMORY_BYTES = 4 * 2**30
_LAUNCH = threading.Lock()


def compare_in_worker(gold: str, answer: str, rule: Rule) -> Verdict:
    """`comparison.compare`, importable without loading sympy in the caller's process."""
    from poweropd.grading import comparison

    return comparison.compare(gold, answer, rule)


def worker_pool(workers: int) -> ProcessPool:
    """A pool of warm grading workers."""
    return ProcessPool(max_workers=workers, initializer=_prepare, context=_context())


def _prepare() -> None:
    """Runs once in each worker: limits its memory, loads math-verify, and keeps it silent."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, _MEMORY_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    __import__(_WARM)


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """A worker's start reads where the main module came from, to run it again: show none."""
    with _LAUNCH:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


if sys.platform == "win32":

    class _CleanProcess(multiprocessing.context.SpawnProcess):
        @staticmethod
        def _Popen(process_obj: BaseProcess) -> Any:
            with _main_module_hidden():
                return multiprocessing.context.SpawnProcess._Popen(process_obj)

    class _CleanContext(multiprocessing.context.SpawnContext):
        Process = _CleanProcess

    def _context() -> multiprocessing.context.BaseContext:
        return _CleanContext()

else:

    class _CleanProcess(multiprocessing.context.ForkServerProcess):
        @staticmethod
        def _Popen(process_obj: BaseProcess) -> Any:
            with _main_module_hidden():
                return multiprocessing.context.ForkServerProcess._Popen(process_obj)

    class _CleanContext(multiprocessing.context.ForkServerContext):
        Process = _CleanProcess

    def _context() -> multiprocessing.context.BaseContext:
        context = _CleanContext()
        context.set_forkserver_preload([_WARM])
        return context
