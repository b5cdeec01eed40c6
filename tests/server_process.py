"""A `gearcpp serve` process for the tests: started on a free port, asked over a real socket, stopped by SIGINT."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

from gearcpp.model_files import bundled_model

PATIENCE = 120.0  # seconds after which something that should happen is taken to have failed


class Server:
    """A running server."""

    def __init__(self, url: str, log: Path, pid: int = 0) -> None:
        self.url = url
        self.pid = pid
        self._log = log

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """The official client, without retries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=PATIENCE)

    def metrics(self) -> dict[str, float]:
        """The sum of each metric over its labels, and each request count by path and status."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=PATIENCE) as response:
            lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
        values: dict[str, float] = {}
        for line in lines:
            name, _, value = line.rpartition(" ")
            for key in {name, name.partition("{")[0]}:
                values[key] = values.get(key, 0.0) + float(value)
        return values

    def wait(self, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """The first metrics that meet a condition."""
        deadline = time.monotonic() + PATIENCE
        while not condition(values := self.metrics()):
            assert time.monotonic() < deadline, f"it did not come to pass: {values}"
            time.sleep(0.02)
        return values

    @property
    def log(self) -> str:
        """What the server wrote to stderr."""
        return self._log.read_text()


@contextmanager
def serve(*arguments: str | Path) -> Iterator[Server]:
    """`gearcpp serve` with these arguments, of the bundled model if they name none. When it is stopped it must end by itself."""
    model = () if {"-m", "--config"} & {*map(str, arguments)} else ("-m", str(bundled_model()))
    command = [sys.executable, "-m", "gearcpp", "serve", "--port", "0", "-t", "1", *model, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
        try:
            server = Server(_address(process, log), log, process.pid)
            yield server
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) in (0, 130), log.read_text()
            assert "Traceback" not in server.log, server.log
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        text = log.read_text()
        if match := re.search(r"listening on (\S+)/v1", text):
            return match[1]
        assert process.poll() is None, text
        time.sleep(0.05)
    raise AssertionError(log.read_text())
