"""Training on two nodes: two network namespaces with a cable between them, and torchrun in each."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from test_trainer import metrics

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        shutil.which("ip") is None or os.geteuid() != 0,
        reason="network namespaces need the command ip, and root",
    ),
]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
RECIPE = Path(__file__).parent.parent / "recipes" / "embedded.yaml"
PORT = 29555
SECONDS = 60  # within which the other node ends when one is killed
PATIENCE = 480  # a busy machine with two cores is slow, and slow is not wrong
OVERRIDES = (
    *("train.sharding=fsdp2", "model.dtype=float32", "train.prompts_per_step=4"),
    *("rollout.max_new_tokens=16", "checkpoint.every=2", "evaluate=null", "data.holdout=0"),
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two namespaces, each with an address of its own and nothing else to talk to."""
    names = [f"poweropd-{os.getpid()}-{number}" for number in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
        cable = ("link", "add", "cable", "netns", names[0], "type", "veth")
        ip(*cable, "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            kill_node(name)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(node: int, names: list[str], run: Path, steps: int) -> "subprocess.Popen[str]":
    """Starts one node's share of a run, in a process group of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    where = [f"--node-rank={node}", f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}"]
    train = ["-m", "poweropd", "train", str(RECIPE), *OVERRIDES]
    own = [f"run.dir={run}", f"train.steps={steps}"]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "cable",
    }
    with (run.parent / f"node{node}.log").open("w") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", names[node], *torchrun, *where, *train, *own],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )


def kill_node(name: str) -> None:
    """Kills everything that runs in a namespace, as the end of a machine does."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
    for pid in pids.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def trained(names: list[str], run: Path, steps: int) -> None:
    """Runs both nodes to their end."""
    processes = [start(node, names, run, steps) for node in (0, 1)]
    logs = [run.parent / f"node{node}.log" for node in (0, 1)]
    ended = wait_until(lambda: all(process.poll() is not None for process in processes), PATIENCE)
    said = "\n".join(log.read_text() for log in logs)
    assert ended, f"not at its end after {PATIENCE} s:\n{said}"
    assert [process.returncode for process in processes] == [0, 0], said


def one_process(run: Path, steps: int) -> None:
    config = [*OVERRIDES, f"run.dir={run}", f"train.steps={steps}"]
    command = [sys.executable, "-m", "poweropd", "train", str(RECIPE)]
    subprocess.run([*command, *config], check=True, capture_output=True, timeout=PATIENCE)


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.1)
    return holds()


def test_two_nodes_train_as_one_process_and_survive_the_death_of_one(
    nodes: list[str], tmp_path: Path
) -> None:
    two, one, killed = (tmp_path / name for name in ("two", "one", "killed"))
    one_process(one, 4)
    trained(nodes, two, 4)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)

    processes = [start(node, nodes, killed, 16) for node in (0, 1)]
    saved = killed / "checkpoints"
    assert wait_until(lambda: saved.is_dir() and len(metrics(killed)) > 2, PATIENCE)
    kill_node(nodes[1])
    processes[1].wait()
    try:
        assert processes[0].wait(SECONDS) != 0
    finally:
        kill_node(nodes[0])
    said = (tmp_path / "node0.log").read_text()
    assert "another process of this run has ended" in said
    assert "the same command on all nodes" in said
    trained(nodes, killed, 16)
    assert len(metrics(killed)) == 16
