"""`gearcpp bench`: who runs when, what is computed from the times, and what comes out. Times themselves are never judged."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearcpp import ConfigError, GearConfig, OutOfMemoryError, native, normalize_kv_type, read_model_info
from gearcpp.cli import main
from gearcpp.cli.bench import _memory, _op, _report, _shapes, _steps
from gearcpp.cli.bench._steps import Plan, Result, Runner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shape") / "books-1.gguf"
    _shapes.write_gguf(path, "books:1", _shapes.parse_shape("books:1")[1])
    return path


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `gearcpp bench`."""
    with pytest.raises(SystemExit) as left:
        main(["bench", *arguments])
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_their_models() -> None:
    name, shape = _shapes.parse_shape("llama-8b:4")
    assert name == "llama-8b:4" and shape.n_layer == 4
    n_weights = {key: sum(max(rows, 1) * columns for _, rows, columns in _shapes._tensors(s)) for key, s in _shapes.SHAPES.items()}
    assert n_weights["llama-8b"] == 8_030_261_248  # Llama 3 8B and Llama 3.2 1B as published
    assert n_weights["llama-1b"] == 1_235_814_400
    assert n_weights["qwen3-8b-like"] == 8_190_735_360


@pytest.mark.parametrize("text", ["llama-9b", "books:0", "books:x", "books:-1", ""])
def test_unknown_shapes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="one of llama-8b, llama-1b, qwen3-8b-like, books"):
        _shapes.parse_shape(text)


@pytest.mark.parametrize("name", ["books:2", "qwen3-8b-like:1"])
def test_a_shape_becomes_a_model_once(cache_home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"books": _shapes.SHAPES["books"], "qwen3-8b-like": _shapes.Shape("qwen3", 36, 128, 256, 4, 2, 64, 512, 4096, 1e6)}
    monkeypatch.setattr(_shapes, "SHAPES", small)
    label, path = _shapes.named_model(name)
    assert label == name
    assert path.parent == cache_home / "gearcpp" / "shapes"
    info = read_model_info(path)
    shape = _shapes.parse_shape(name)[1]
    assert (info.arch, info.n_layer, info.n_embd, info.n_head) == (shape.arch, shape.n_layer, shape.n_embd, shape.n_head)
    assert {(layer.n_head_kv, layer.d_head_k, layer.d_head_v) for layer in info.layers} == {(2, 64, 64)}
    written = path.stat().st_mtime_ns
    assert _shapes.named_model(name) == (name, path) and path.stat().st_mtime_ns == written
    assert list(path.parent.iterdir()) == [path]
    runner = Runner(path, normalize_kv_type("f16"), Plan([8], [1], [0], n_threads=1))
    try:
        assert runner.seconds(8, 0) > 0
    finally:
        runner.close()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Turns and ratios
# ---------------------------------------------------------------------------------------------------------------------------------------------


class Clock:
    """Runners without a model: they write down who ran, and take as long as they are told."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds_of, self.turns = seconds, []
        self.turns: list[tuple[str, int, int, int]] = []

    def runner(self, name: str) -> Runner:
        clock = self

        class Fake:
            kv = normalize_kv_type(name)
            depth = 0

            class llm:
                @staticmethod
                def kv_stats() -> dict[str, dict[str, int]]:
                    return {"total": {"bytes": 10, "bytes_f16": 40}}

            def fill(self, depth: int) -> None:
                self.depth = depth

            def seconds(self, n_prompt: int, n_gen: int) -> float:
                clock.turns.append((name, n_prompt, n_gen, self.depth))
                return clock.seconds_of[name] * (n_prompt or n_gen) * (1 + self.depth)

        return Fake()  # type: ignore[return-value]


def test_types_take_turns_forwards_and_backwards() -> None:
    clock = Clock({"f16": 2.0, "gear": 1.0, "q8_0": 4.0})
    results = _steps._run_group([clock.runner(name) for name in ("f16", "gear", "q8_0")], Plan([8], [0], [3, 0], repetitions=3))
    assert [turn[0] for turn in clock.turns[:9]] == ["f16", "gear", "q8_0", "q8_0", "gear", "f16", "f16", "gear", "q8_0"]
    assert [turn[3] for turn in clock.turns] == [0] * 9 + [3] * 9
    assert [(r.kv_type, r.n_depth, r.ratio) for r in results] == [
        ("f16", 0, 1.0),
        ("gear", 0, 2.0),
        ("q8_0", 0, 0.5),
        ("f16", 3, 1.0),
        ("gear", 3, 2.0),
        ("q8_0", 3, 0.5),
    ]
    _steps._add_attention_share(results)
    assert [r.attention_share for r in results] == [None, None, None, 0.75, 0.75, 0.75]
    assert results[1].rates == [1.0, 1.0, 1.0] and results[1].test == "pp8" and results[4].test == "pp8 @ d3"


def test_every_group_is_led_by_the_baseline() -> None:
    types = [normalize_kv_type(name) for name in ("gear", "f16", "q8_0", "gear2")]

    def names(n_resident: int) -> list[list[str]]:
        return [[kv.name for kv in group] for group in _steps.groups(types, types[1], n_resident)]

    assert names(2) == [["f16", "gear"], ["f16", "q8_0"], ["f16", "gear2"]]
    assert names(3) == [["f16", "gear", "q8_0"], ["f16", "gear2"]]
    assert names(4) == [["f16", "gear", "q8_0", "gear2"]]
    assert [[kv.name for kv in group] for group in _steps.groups(types[:1], types[0], 2)] == [["gear"]]


def test_two_models_must_fit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan([8], [], [0])
    monkeypatch.setattr(native, "available_memory", lambda: 10**9)
    with pytest.raises(OutOfMemoryError, match=r"two models with a context of 256 need 1\.0 GiB, 0\.9 GiB are free"):
        _steps._n_resident(model, 2, plan)
    assert _steps._n_resident(model, 1, plan) == 2
    monkeypatch.setattr(native, "available_memory", lambda: 2 * 10**9)
    assert _steps._n_resident(model, 6, plan) == 3


@pytest.mark.parametrize("kv", ["f16", "gear2"])
def test_a_runner_goes_to_any_depth_and_back(model: Path, kv: str) -> None:
    runner = Runner(model, normalize_kv_type(kv), Plan([32], [4], [300], n_threads=1, n_ubatch=64))
    try:
        assert runner.llm.kv_type.name == kv
        for depth in (300, 100, 0, 40):
            runner.fill(depth)
            assert runner.seconds(32, 0) > 0 and runner.seconds(0, 4) > 0
            assert last_position(runner) == depth - 1
    finally:
        runner.close()


def last_position(runner: Runner) -> int:
    import llama_cpp

    return int(llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(runner.llm.ctx), 0))


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------------------------------

QUICK = ["-p", "8", "-n", "2", "-d", "0,40", "-r", "2", "-t", "1"]


@pytest.fixture(scope="module")
def records(model: Path) -> Iterator[list[dict[str, object]]]:
    capture = pytest.MonkeyPatch()
    written: list[str] = []
    capture.setattr("typer.echo", lambda text, nl=True: written.append(text))
    with pytest.raises(SystemExit) as left:
        main(["bench", "-m", str(model), "--kv", "gear,f16,gear,q8_0", "-o", "json", *QUICK])
    capture.undo()
    assert not left.value.code
    yield json.loads("".join(written))


def test_json_has_every_test_of_every_type_once(records: list[dict[str, object]]) -> None:
    assert [(r["kv_type"], r["test"]) for r in records] == [
        (kv_type, test) for test in ("pp8", "tg2", "pp8 @ d40", "tg2 @ d40") for kv_type in ("f16", "gear", "q8_0")
    ]
    for record in records:
        assert record["baseline"] == "f16" and record["n_ctx"] == 256 and record["model"] == "books-1"
        assert len(record["seconds"]) == len(record["ratios"]) == 2  # type: ignore[arg-type]
        assert record["lowest_ratio"] <= record["median_ratio"] <= record["highest_ratio"]  # type: ignore[operator]
        assert record["peak_rss"] > 10**7  # type: ignore[operator]
        assert record["kv_bytes_f16"] == 256 * 2 * 2 * 64 * 2  # cells, K and V, heads, channels, bytes
    assert {r["ratios"] == [1.0, 1.0] for r in records if r["kv_type"] == "f16"} == {True}
    assert {r["kv_bytes"] for r in records if r["kv_type"] == "q8_0"} == {256 * 2 * 2 * 64 * 34 // 32}


def test_markdown_csv_and_plot(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = tmp_path / "plot.svg"
    code, out, err = run(capsys, "-m", str(model), "--kv", "f16,q8_0", *QUICK, "--no-rss", "--plot", str(drawn))
    assert code == 0 and drawn.read_text().lstrip().startswith("<?xml")
    assert "| q8_0 |" in out and out.count("\n| ") == 10 and "1.00 (1.00-1.00)" in out
    assert "measuring tg2 @ d40: f16, q8_0" in err
    code, out, _ = run(capsys, "-m", str(model), "--kv", "q4_0", *QUICK, "--no-rss", "-o", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["kv_type"], row["baseline"], row["peak_rss"]) for row in rows] == [("q4_0", "q4_0", "")] * 4
    assert all(len(row["samples_ts"].split()) == 2 for row in rows)


def test_peak_memory_is_of_a_process_of_its_own(model: Path) -> None:
    ballast = b"x" * 2**29  # what the parent holds must not count
    peak = _memory.peak_rss(model, normalize_kv_type("gear"), Plan([8], [], [0], n_threads=1))
    assert 2**24 < peak < len(ballast)


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["-p", "0", "-n", "0"], 2, "there is nothing to measure"),
        (["-p", "many"], 2, "'many' is not a comma-separated list"),
        (["-d", "-1"], 2, "'-1' is not a comma-separated list"),
        (["--kv", "f16,gaer"], 2, "did you mean 'gear'"),
        (["--shape", "books:1"], 2, "--shape makes a model"),
        (["--op", "--kv", "f16", "-d", "64"], 2, "give at least one preset"),
        (["--op", "--kv", "gear"], 2, "a depth with -d"),
        (["--plot", "/absent/p.png"], 1, "there is no folder /absent"),
        (["-o", "xml"], 2, "xml"),
    ],
)
def test_mistakes(model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, reason: str) -> None:
    left, out, err = run(capsys, "-m", str(model), *arguments)
    assert (left, out) == (code, "")
    assert reason in " ".join(err.replace("│", " ").split())


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The op alone
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_the_op_counts_the_bytes_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_op, "_BANDWIDTH_BYTES", 2**20)
    config = GearConfig(n_tail=0, n_sink=0, tile=64, bits_k=3)
    heads = _op.Heads(n_head=4, n_head_kv=2, d_head=64)
    found = _op.run([normalize_kv_type(config), normalize_kv_type("f16")], heads, [0, 256], repetitions=2, n_threads=1)
    assert [m.op for m in found] == ["attend exact", "attend", "pack"]
    tiles = sum(native.tile_describe(config, side, 64)["bytes"] for side in ("k", "v")) * 2 * 256 // 64
    rows = 2 * 256 * 2 * 64 * 2  # K and V, cells, heads, channels, bytes
    assert [m.n_bytes for m in found] == [rows, tiles, rows + tiles]
    assert all(m.seconds > 0 and m.bandwidth > 0 and m.n_cell == 256 for m in found)
    text = _op.report(found, heads, "md")
    assert text.count("\n| ") == 5 and "4 query and 2 KV heads of 64" in text
    first = json.loads(_op.report(found, heads, "json"))[0]
    assert first["bandwidth_share"] == pytest.approx(first["bytes_per_second"] / first["bandwidth"])


def test_heads_come_from_a_model_or_a_shape(model: Path) -> None:
    assert _op.heads_of_model(model) == _op.heads_of(_shapes.SHAPES["books"]) == _op.Heads(4, 2, 64)


def test_a_result_is_named_as_llama_bench_names_it() -> None:
    assert Result("f16", 512, 0, 0).test == "pp512"
    assert Result("f16", 0, 128, 4096).test == "tg128 @ d4096"
    assert _report.cpu_name()
