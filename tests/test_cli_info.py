"""`gearcpp info`, `gearcpp plugin-path`, and where models come from."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gearcpp import PRESETS, AbiError, ConfigError, DataError, GearError, native
from gearcpp.cli import info, main
from gearcpp.cli._model import choose_files, default_threads, resolve_model
from gearcpp.model_files import assistant_model, bundled_model, find_model, model_argument, real_models


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0), capsys.readouterr().out


def test_info_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["abi"] == {"passed": True, "reason": ""}
    assert facts["ggml"] and facts["simd"]["current"] in facts["simd"]["available"]
    assert "CPU" in [device["name"] for device in facts["devices"]]
    assert all(0 < device["bytes_total"] < 2**50 for device in facts["devices"] if device["name"] == "CPU")
    assert list(facts["presets"]) == list(PRESETS)
    for name, preset in facts["presets"].items():
        assert preset["config"] == PRESETS[name].to_dict()
        for d_head, bits in preset["bits_per_element"].items():
            assert bits["k"] == native.bits_per_element(PRESETS[name], "k", int(d_head))
            assert bits["v"] == native.bits_per_element(PRESETS[name], "v", int(d_head))
            assert bits["mean"] == (bits["k"] + bits["v"]) / 2


def test_info_for_people_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "info")
    assert code == 0
    assert "ABI proof         passed" in out and str(native.library_path()) in out
    row = next(line.split() for line in out.splitlines() if line.startswith("gear3 "))
    expected = [native.bits_per_element(PRESETS["gear3"], side, d) for d in info.HEAD_SIZES for side in ("k", "v")]
    assert row[1:] == [f"{x:.3f}" for x in (*expected[:2], sum(expected[:2]) / 2, *expected[2:], sum(expected[2:]) / 2)]


def test_info_tells_of_a_failed_proof(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, str]:
        raise AbiError("ggml 9.9.9 is laid out differently")

    monkeypatch.setattr(native, "versions", fail)
    assert json.loads(run(capsys, "info", "--json")[1])["abi"] == {"passed": False, "reason": "ggml 9.9.9 is laid out differently"}
    assert "ABI proof         failed: ggml 9.9.9 is laid out differently" in run(capsys, "info")[1]


def test_plugin_path_is_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "plugin-path")
    assert code == 0 and Path(out.strip()).is_file()


def test_help_fits_and_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "--help")
    assert code == 0
    for command in ("chat", "generate", "info", "plugin-path", "bench"):
        assert command in out
        assert run(capsys, command, "--help")[0] == 0
    assert len(out.splitlines()) < 40
    assert run(capsys, "--version")[1].startswith("gearcpp ")


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_without_the_extra_the_bundled_model_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gearcpp.model_files.ASSISTANT_PACKAGE", "no_such_package")
    assert assistant_model() is None
    assert resolve_model(None, None) == bundled_model()
    assert bundled_model().read_bytes()[:4] == b"GGUF"
    assert resolve_model(Path("mine.gguf"), None) == Path("mine.gguf")
    with pytest.raises(ConfigError, match="two models"):
        resolve_model(Path("mine.gguf"), "a/b")


def test_the_model_of_the_extra_comes_first_and_its_package_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs what is not there')")
    (package / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("gearcpp.model_files.ASSISTANT_PACKAGE", package.name)
    assert resolve_model(None, None) == package / "small.gguf"
    assert resolve_model(Path("mine.gguf"), None) == Path("mine.gguf")


def test_real_models_are_those_of_the_folder_and_of_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gearcpp.model_files.assistant_model", lambda: Path("extra.gguf"))
    monkeypatch.delenv("GEARCPP_MODELS", raising=False)
    assert real_models() == {"smollm2-135m": Path("extra.gguf")}
    (tmp_path / "Large-1B.gguf").write_bytes(b"GGUF, and more")
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    (tmp_path / "notes.txt").write_bytes(b"")
    assert list(real_models(tmp_path)) == ["smollm2-135m", "small", "large-1b"]
    monkeypatch.setenv("GEARCPP_MODELS", str(tmp_path))
    assert find_model("large-1b") == find_model("LARGE-1B") == model_argument("large-1b") == tmp_path / "Large-1B.gguf"
    assert model_argument(str(tmp_path / "small.gguf")) == tmp_path / "small.gguf"
    (tmp_path / "smollm2-135m.gguf").write_bytes(b"GGUF")
    assert find_model("smollm2-135m") == tmp_path / "smollm2-135m.gguf"
    with pytest.raises(DataError, match=r"no model llama here \(there is small, .*set GEARCPP_MODELS to a folder"):
        find_model("llama")
    with pytest.raises(argparse.ArgumentTypeError, match="no model llama here"):
        model_argument("llama")
    monkeypatch.setenv("GEARCPP_MODELS", "no/such/folder")
    with pytest.raises(DataError, match="there is no folder no/such/folder"):
        real_models()


FILES = [
    "README.md",
    "m-Q8_0.gguf",
    "m-Q4_K_M.gguf",
    "m-IQ4_XS.gguf",
    "mmproj-f16.gguf",
    "big/m-F16-00001-of-00002.gguf",
    "big/m-F16-00002-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("quant", "chosen"),
    [
        (None, ["m-Q4_K_M.gguf"]),
        ("q8_0", ["m-Q8_0.gguf"]),
        ("Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("F16", ["big/m-F16-00001-of-00002.gguf", "big/m-F16-00002-of-00002.gguf"]),
    ],
)
def test_choose_files(quant: str | None, chosen: list[str]) -> None:
    assert choose_files(FILES, quant, "a/b") == chosen


def test_choose_files_without_a_match() -> None:
    assert choose_files(["x-Q5_0.gguf", "a-Q6_K.gguf"], None, "a/b") == ["a-Q6_K.gguf"]
    with pytest.raises(ConfigError, match=r"a/b has no Q2_K; it has big/m-F16-00001-of-00002\.gguf, "):
        choose_files(FILES, "Q2_K", "a/b")
    with pytest.raises(ConfigError, match="holds no GGUF file"):
        choose_files(["README.md", "mmproj-f16.gguf"], None, "a/b")


class Hub(BaseHTTPRequestHandler):
    """As much of Hugging Face as downloading a file needs."""

    content = b"GGUF" + bytes(1000)
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/some/model"):
            body = json.dumps({"id": "some/model", "sha": self.commit, "siblings": [{"rfilename": name} for name in FILES]}).encode()
            self.answer(200, body, {"Content-Type": "application/json"})
        elif self.path.startswith("/some/model/resolve/"):
            self.answer(200, self.content, {"ETag": '"etag"', "X-Repo-Commit": self.commit})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def download(name: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    """`download` in a process of its own, for huggingface_hub reads its settings when it is imported."""
    code = "import sys; from gearcpp.cli._model import download; from gearcpp.errors import GearError\n"
    code += "try: print(download(sys.argv[1]))\nexcept GearError as error: sys.exit(f'{type(error).__name__}: {error}')"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and not key.lower().endswith("_proxy")}
    return subprocess.run(
        [sys.executable, "-c", code, name],
        env={**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_download_fetches_once_and_then_works_without_a_network(hub: str, tmp_path: Path) -> None:
    done = download("some/model", hub, tmp_path)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.name == "m-Q4_K_M.gguf" and path.read_bytes() == Hub.content
    offline = download("some/model", "http://127.0.0.1:9", tmp_path)
    assert (offline.returncode, offline.stdout) == (0, done.stdout), offline.stderr
    absent = download("some/model:Q8_0", "http://127.0.0.1:9", tmp_path)
    assert absent.returncode == 1 and "some/model has no Q8_0; it has m-Q4_K_M.gguf" in absent.stderr


def test_download_failures_say_what_to_do(hub: str, tmp_path: Path) -> None:
    unreachable = download("some/model", "http://127.0.0.1:9", tmp_path)
    assert unreachable.returncode == 1
    assert "GearError: cannot fetch some/model from Hugging Face" in unreachable.stderr and "give a file with -m" in unreachable.stderr
    unknown = download("some/absence", hub, tmp_path)
    assert unknown.returncode == 1 and "GearError: there is no repository some/absence on Hugging Face" in unknown.stderr


def test_errors_have_the_exit_codes_of_their_kind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failures: list[tuple[Exception, int, str]] = [
        (GearError("one\ntwo"), 1, "error: one two"),
        (ConfigError("[bold]not markup"), 2, "error: [bold]not markup"),
        (ValueError("odd"), 1, "unexpected ValueError: odd (a defect; -v shows where)"),
        (KeyboardInterrupt(), 130, ""),  # type: ignore[list-item]
    ]
    for failure, code, line in failures:

        def fail(failure: BaseException = failure) -> None:
            raise failure

        monkeypatch.setattr(info, "collect", fail)
        with pytest.raises(SystemExit) as left:
            main(["info"])
        assert left.value.code == code
        assert capsys.readouterr().err.strip() == line


def test_threads_are_cores() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
