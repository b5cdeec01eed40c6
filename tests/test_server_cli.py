"""How `gearcpp serve` is started: settings that are wrong, and configuration files."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
from server_process import PATIENCE, serve

from gearcpp.errors import ConfigError, DataError
from gearcpp.model_files import bundled_model
from gearcpp.server.options import from_command_line
from gearcpp.server.settings import ModelSettings, ServerSettings, read_config


def fail(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and the one line of a server that does not start."""
    done = subprocess.run([sys.executable, "-m", "gearcpp", "serve", *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_what_is_wrong_is_said_before_anything_listens(tmp_path: Path) -> None:
    code, line = fail("--kv", "gear99")
    assert code == 2 and "gear99" in line
    code, line = fail("-m", tmp_path / "absent.gguf")
    assert code == 1 and "absent.gguf" in line
    code, line = fail("-np", "10000")
    assert code == 2 and "parallel must be 1 to" in line
    code, line = fail("--", "--cache-rum", "1")
    assert code == 2 and "cache-rum is not an option" in line and "cache_ram" in line
    code, line = fail("--", "--port", "1")
    assert code == 2 and "an option of gearcpp's" in line
    code, line = fail("--", "--cache-ram", "much")
    assert code == 2 and "cache-ram cannot be 'much'" in line
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(bundled_model().read_bytes()[:500_000])
    code, line = fail("-m", broken)
    assert code == 1 and "broken.gguf" in line
    code, line = fail("--config", tmp_path / "absent.json")
    assert code == 1 and "cannot read" in line


def test_without_the_extra_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['starlette'] = None; from gearcpp.cli import main; main(['serve'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert done.stderr == "error: the server's packages are missing (starlette): pip install 'gearcpp[server]'\n"


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, line = fail("-c", "256", "--port", str(taken.getsockname()[1]))
        assert code == 1 and "cannot listen on 127.0.0.1" in line and "choose another --port" in line


def test_two_models_of_a_configuration_file_are_served_at_once(tmp_path: Path) -> None:
    model = str(bundled_model())
    config = {
        "port": 0,
        "max_queue": 3,
        "models": [
            {"model": model, "model_alias": "a", "kv_type": {"bits_k": 3, "bits_v": 3}, "n_ctx": 512, "n_threads": 1, "parallel": 1},
            {"model": model, "model_alias": "b", "kv_type": ["q8_0", "f16"], "n_ctx": 512, "n_threads": 1},
        ],
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with serve("--config", path) as server:
        assert [model.id for model in server.client().models.list()] == ["a", "b"]
        for name in ("a", "b", "a"):
            assert server.client().completions.create(model=name, prompt="A", max_tokens=2).model == name
        assert 'gearcpp_kv_bytes{model="b"}' in server.metrics()


def test_configuration_files_with_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for content, message in (
        ("models: []", "models"),
        ("models: [{model: m.gguf, kv_typ: gear}]", "kv_typ"),
        ("- 1", "must hold an object"),
        ("port: 70000\nmodels: [{model: m.gguf}]", "port"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_config(path)
    path.write_text("models: [")
    with pytest.raises(DataError, match="is not a configuration"):
        read_config(path)


def test_settings_that_contradict_each_other_or_are_of_another_kind() -> None:
    with pytest.raises(ConfigError, match="ssl_keyfile and ssl_certfile go together"):
        ServerSettings(ssl_keyfile="x")
    with pytest.raises(ConfigError, match="parallel must be at least 1"):
        ModelSettings(model="m.gguf", parallel=0)
    with pytest.raises(ConfigError, match="n_ctx must be a whole number, not '512'"):
        ModelSettings(model="m.gguf", n_ctx="512")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="computed in Python"):
        ModelSettings(model="m.gguf", kv_type="sim:kivi2")


def test_options_of_llama_server() -> None:
    words = ["--cache-ram", "100", "--no-ui", "--temp=0.5", "--seed", "-1", "--swa-full"]
    assert from_command_line(words) == {"cache-ram": "100", "no-ui": True, "temp": "0.5", "seed": "-1", "swa-full": True}
    with pytest.raises(ConfigError, match="'stray' is not an option"):
        from_command_line(["--swa-full", "true", "stray"])


def test_options_reach_llama_cpp() -> None:
    with serve("-c", "512", "-np", "1", "--", "--temp", "0", "--predict", "3", "--no-ui") as server:
        answers = [server.client().completions.create(model="x", prompt="Once upon a time") for _ in range(2)]
        assert answers[0].choices[0].text == answers[1].choices[0].text
        assert answers[0].usage and answers[0].usage.completion_tokens == 3
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(server.url, timeout=PATIENCE)


def test_a_budget_cuts_the_context_of_every_slot(tmp_path: Path) -> None:
    with serve("-c", "4096", "-np", "2", "--kv-budget", "10MiB") as server:
        assert 8 * 2**20 < server.metrics()["gearcpp_kv_bytes"] <= 10 * 2**20
        with urllib.request.urlopen(f"{server.url}/slots", timeout=PATIENCE) as response:
            (n_ctx,) = {slot["n_ctx"] for slot in json.load(response)}
        assert 2048 <= n_ctx < 4096 and f"context {n_ctx} for each of 2 slots" in server.log
        with pytest.raises(openai.BadRequestError, match=f"context size \\({n_ctx} tokens"):
            server.client().completions.create(model="x", prompt="word " * 4000)
    assert fail("--kv-budget", "1MiB", "-c", "4096")[1].startswith("error: kv_budget of 1048576 bytes is too small")
    assert "wants a size" in fail("--kv-budget", "much")[1]


def test_slots_take_memory_by_what_is_in_them() -> None:
    with serve("-c", "4096", "-np", "8") as server:
        empty = server.metrics()
        server.client().completions.create(model="x", prompt="word " * 3500, max_tokens=1)
        full = server.metrics()
    tiles = empty["gearcpp_kv_bytes"] - empty["gearcpp_kv_bytes_used"]
    assert tiles > 0 and 0 < full["gearcpp_kv_bytes_used"] - empty["gearcpp_kv_bytes_used"] < tiles / 8 * 1.01


def test_a_model_whose_process_is_killed_is_told_and_nothing_hangs() -> None:
    with serve("-c", "512", "-np", "1") as server:
        (child,) = {pid for path in Path(f"/proc/{server.pid}/task").glob("*/children") for pid in path.read_text().split()}
        os.kill(int(child), signal.SIGKILL)
        with pytest.raises(openai.InternalServerError, match="the model's process"):
            server.client().completions.create(model="x", prompt="Hm", max_tokens=1)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{server.url}/health", timeout=PATIENCE)
        assert caught.value.code == 503 and "not answering" in json.load(caught.value)["status"]
        assert server.metrics()["gearcpp_kv_bytes"] > 0
