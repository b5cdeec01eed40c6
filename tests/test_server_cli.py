"""How `gearcpp serve` is started: settings that are wrong, and configuration files."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import PATIENCE, serve

from gearcpp.cli._model import bundled_model
from gearcpp.errors import ConfigError, DataError
from gearcpp.server.settings import GearModelSettings, GearServerSettings, checked, read_config


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
    code, line = fail("--config", tmp_path / "absent.json")
    assert code == 1 and "cannot read" in line


def test_without_the_extra_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['fastapi'] = None; from gearcpp.cli import main; main(['serve'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert done.stderr == "error: the server's packages are missing (fastapi): pip install 'gearcpp[server]'\n"


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


def test_settings_that_would_do_nothing_or_harm_are_refused() -> None:
    for name, value in (("logits_all", True), ("cache", True), ("rpc_servers", "a:1"), ("draft_model", "x"), ("clip_model_path", "x")):
        with pytest.raises(ConfigError, match=name):
            GearModelSettings(model="m.gguf", **{name: value}).llama_arguments()
    with pytest.raises(ConfigError, match="interrupt_requests"):
        GearServerSettings(interrupt_requests=True).check()
    with pytest.raises(ConfigError, match="ssl_keyfile and ssl_certfile go together"):
        GearServerSettings(ssl_keyfile="x").check()
    with pytest.raises(ConfigError, match="parallel"):
        checked(GearModelSettings, {"model": "m.gguf", "parallel": 0})


def test_only_what_was_set_reaches_llama() -> None:
    arguments = GearModelSettings(model="m.gguf", n_ctx=512, kv_type=["q8_0", "q4_0"]).llama_arguments()
    assert arguments == {"n_ctx": 512, "kv_type": ("q8_0", "q4_0"), "verbose": False}


def test_the_environment_is_read_under_our_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "0.0.0.0")
    monkeypatch.setenv("GEARCPP_MAX_QUEUE", "5")
    settings = GearServerSettings()
    assert settings.host == "127.0.0.1" and settings.max_queue == 5
