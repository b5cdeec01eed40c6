"""examples/ray_serve.py on one machine: two replicas answer, both of them, streams included."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from server_process import PATIENCE, Server

from gearcpp.model_files import bundled_model

pytest.importorskip("ray.serve", reason="Ray is not installed: pip install 'ray[serve]'")

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_serve.py"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["-m", bundled_model(), "-c", 1024, "--parallel", 2, "--threads", 1, "--replicas", 2, "--port", port]
    log = tmp_path / "log"
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, str(EXAMPLE), *map(str, arguments)], stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 2 * PATIENCE
        while "replicas behind" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield Server(f"http://127.0.0.1:{port}", log)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()


def test_two_replicas_answer(server: Server) -> None:
    client = server.client()
    whole = client.completions.create(model="x", prompt="Once upon a time", max_tokens=20, temperature=0)
    assert whole.usage and whole.usage.completion_tokens == 20
    chunks = list(client.completions.create(model="x", prompt="Once upon a time", max_tokens=20, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        client.completions.create(model="x", prompt="word " * 2000, stream=True)
    most, deadline = 0.0, time.monotonic() + PATIENCE
    while (steps := server.metrics()["llamacpp:n_decode_total"]) >= most:  # of one replica it never falls
        assert time.monotonic() < deadline
        client.completions.create(model="x", prompt="Hm", max_tokens=1)
        most = max(most, steps)
