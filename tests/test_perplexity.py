"""gearcpp.evaluation: fidelity and perplexity; the formulas on numbers checked by hand, the rules of chunking, and the command on small models."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from models import Shape

import gearcpp.evaluation.fidelity
from gearcpp import CodecError, ConfigError, DataError, Llama
from gearcpp.cli import main
from gearcpp.evaluation.fidelity import Tally, compare, kl_divergence, log_softmax
from gearcpp.evaluation.perplexity import F16, REFERENCE, Measurement, Settings, packed_shares, parse_cache, parse_caches, plan_passes, split_chunks
from gearcpp.evaluation.text import read_text

TEXT = " ".join(f"Chapter {i}. It was a dark night, and the {i % 7} ships lay still in the harbour." for i in range(400))

# ---------------------------------------------------------------------------------------------------------------------------------------------
# The formulas
# ---------------------------------------------------------------------------------------------------------------------------------------------


def log(*rows: tuple[float, ...]) -> np.ndarray:
    return np.log(np.array(rows, np.float64))


def test_log_softmax_by_hand() -> None:
    # exp(0) : exp(ln 3) = 1 : 3; adding a constant to all logits changes nothing.
    logits = np.array([[0.0, math.log(3)], [1000.0, 1000.0 + math.log(3)]], np.float32)
    assert np.exp(log_softmax(logits)) == pytest.approx(np.array([[0.25, 0.75]] * 2), abs=1e-5)


def test_kl_divergence_by_hand() -> None:
    p, q = log((0.5, 0.5), (0.25, 0.75)), log((0.25, 0.75), (0.25, 0.75))
    # 1/2 ln(0.5 / 0.25) + 1/2 ln(0.5 / 0.75) = 1/2 ln(4/3)
    assert kl_divergence(p, q) == pytest.approx([0.5 * math.log(4 / 3), 0.0])


def test_kl_divergence_of_identical_rows_is_zero(random: np.random.Generator) -> None:
    log_p = log_softmax(random.standard_normal((50, 300)).astype(np.float32) * 5)
    assert (kl_divergence(log_p, log_p) == 0).all()


def test_a_token_that_f16_excludes_adds_nothing() -> None:
    log_p = log_softmax(np.array([[0.0, 0.0, -np.inf]], np.float32))
    assert kl_divergence(log_p, log_softmax(np.zeros((1, 3), np.float32))) == pytest.approx([math.log(1.5)])


def test_divergences_near_1e_9_are_resolved(random: np.random.Generator) -> None:
    """For a small change d of the logits, KL(p || q) = Var_p(d) / 2 to first order."""
    logits = random.standard_normal((20, 1000))
    change = 1e-4 * random.standard_normal(logits.shape)
    log_p, log_q = log_softmax(logits), log_softmax(logits + change)
    p = np.exp(log_p)
    variance = (p * change**2).sum(1) - (p * change).sum(1) ** 2
    assert kl_divergence(log_p, log_q) == pytest.approx(variance / 2, rel=1e-2)


def test_summary_by_hand() -> None:
    """Two tokens: one that the cache leaves alone, and one whose probabilities it swaps."""
    tally = Tally()
    tally.add(log((0.5, 0.5), (0.2, 0.8)), log((0.5, 0.5), (0.8, 0.2)), np.array([0, 1], np.int32))
    summary = tally.summary()
    kld = 0.2 * math.log(0.2 / 0.8) + 0.8 * math.log(0.8 / 0.2)
    nll = [math.log(2), math.log(5)]
    # Of two numbers a and b the standard error of the mean is |a - b| / 2.
    assert summary.n_tokens == 2
    assert summary.ppl == pytest.approx(math.sqrt(10))
    assert summary.ppl_se == pytest.approx(math.sqrt(10) * (nll[1] - nll[0]) / 2)
    assert summary.ln_ppl_ratio == pytest.approx((math.log(0.8) - math.log(0.2)) / 2)
    assert summary.ln_ppl_ratio_se == pytest.approx(math.log(4) / 2)
    assert (summary.kld_mean, summary.kld_se, summary.kld_median) == pytest.approx((kld / 2, kld / 2, kld / 2))
    assert (summary.kld_99, summary.kld_999, summary.kld_max) == pytest.approx((0.99 * kld, 0.999 * kld, kld))
    assert summary.delta_p_rms == pytest.approx(math.sqrt(0.36 / 2))
    assert summary.delta_p_rms_se == pytest.approx(0.5 / math.sqrt(0.18) * 0.18)
    assert (summary.same_top, summary.same_top_se) == pytest.approx((0.5, 0.5))


def test_summary_of_nothing_and_of_one_token_has_no_errors() -> None:
    tally = Tally()
    assert tally.summary().to_dict()["ppl"] is None
    tally.add(log((0.5, 0.5)), log((0.5, 0.5)), np.array([0], np.int32))
    assert tally.summary().ppl == pytest.approx(2)
    assert tally.summary().to_dict()["ppl_se"] is None


def test_blocks_change_nothing(random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    f16, other = random.standard_normal((2, 37, 50)).astype(np.float32)
    targets = random.integers(0, 50, 37).astype(np.int32)
    whole, blocks = ((Tally(), Tally()) for _ in range(2))
    compare(f16, [other], targets, whole[0], whole[1:])
    monkeypatch.setattr(gearcpp.evaluation.fidelity, "BLOCK_ELEMENTS", 4 * 50)
    compare(f16, [other], targets, blocks[0], blocks[1:])
    for a, b in zip(whole, blocks, strict=True):
        for name in ("nll", "nll_f16", "kld", "delta_p", "same_top"):
            assert (a.column(name) == b.column(name)).all()
    assert whole[1].summary().kld_mean > 0.1


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Chunks
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_the_second_half_of_a_chunk_is_scored_but_for_its_last_position() -> None:
    assert list(Settings(n_ctx=16).scored) == [8, 9, 10, 11, 12, 13, 14]


def test_chunks_do_not_overlap_and_begin_with_bos() -> None:
    tokens = np.arange(100, 155, dtype=np.int32)
    chunks = split_chunks(tokens, Settings(n_ctx=16), bos=7)
    assert chunks.tolist() == [[7, *range(101 + start, 116 + start)] for start in (0, 16, 32)]
    assert tokens[0] == 100


def test_without_bos_the_text_keeps_its_tokens() -> None:
    tokens = np.arange(40, dtype=np.int32)
    assert split_chunks(tokens, Settings(n_ctx=16, n_chunks=1), bos=None).tolist() == [list(range(16))]


def test_a_text_that_is_too_short_says_how_short() -> None:
    tokens = np.arange(31, dtype=np.int32)
    assert split_chunks(tokens, Settings(n_ctx=16), bos=None).shape == (1, 16)
    with pytest.raises(DataError, match="31 tokens, too few for two chunks of 16"):
        split_chunks(tokens, Settings(n_ctx=16, like_llama=True), bos=None)
    with pytest.raises(DataError, match="31 tokens, too few for a chunk of 32"):
        split_chunks(tokens, Settings(n_ctx=32), bos=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b" \n", "empty"), (b"caf\xe9", "not UTF-8 text: byte 3 is 0xe9"), (None, "No such file")],
)
def test_texts_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_text(file)


def test_only_the_last_newline_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a\n\n")
    assert read_text(tmp_path / "text") == b"a\n"


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Cache types
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_cache_names() -> None:
    assert parse_cache(" q8_0 ").kv_type.type_k == "q8_0"
    assert parse_cache("q8_0/q4_0").kv_type.type_v == "q4_0"
    spec = parse_cache("gear3+tail256", seed=5)
    assert spec.kv_type.gear
    assert (spec.label, spec.kv_type.gear.n_tail, spec.kv_type.gear.seed, spec.kv_type.gear.bits_k) == ("gear3+tail256", 256, 5, 3)


@pytest.mark.parametrize("name", ["sim:kivi2", "sim:kivi2+tail64", "q4_0+tail64"])
def test_names_of_reference_methods(name: str) -> None:
    pytest.importorskip("torch", reason="the reference methods need PyTorch")
    spec = parse_cache(name)
    assert spec.kv_type.method and spec.kv_type.gear
    assert spec.label == spec.kv_type.name == name
    assert spec.kv_type.gear.n_tail == (64 if "tail" in name else 128)


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ("gear5", "unknown kv_type 'gear5'"),
        ("f16,q8_0,q8_0", "q8_0 is listed twice"),
        (" , ", "no cache type"),
        ("gear+tail99999999999", "n_tail must be"),
    ],
)
def test_cache_lists_that_make_no_sense(kv: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_caches(kv, Settings())


def test_an_ubatch_longer_than_a_tile_is_refused() -> None:
    with pytest.raises(ConfigError, match="use -ub 256 or less"):
        parse_caches("gear4", Settings(n_ubatch=512))
    assert [spec.label for spec in parse_caches("q8_0", Settings(n_ubatch=512))] == ["f16, -ub 255", "q8_0"]


def test_f16_against_itself_is_a_row_and_runs_with_the_first_gear_type() -> None:
    specs = parse_caches("gear4,f16,q8_0,gear3,q4_0", Settings())
    assert [spec.label for spec in specs] == ["f16, -ub 63", "gear4", "q8_0", "gear3", "q4_0"]
    passes = [[spec.label for spec in together] for together in plan_passes(specs)]
    assert passes == [["f16, -ub 63", "q8_0", "q4_0", "gear4"], ["gear3"]]
    passes = [[spec.label for spec in together] for together in plan_passes(parse_caches("gear4,gear3,q8_0,gear2,gear-l", Settings()), 3)]
    assert passes == [["f16, -ub 63", "q8_0", "gear4", "gear3"], ["gear2", "gear-l"]]
    assert parse_caches("f16", Settings()) == []
    assert plan_passes([]) == [[]]
    assert [spec.label for spec in parse_caches("f16,q8_0", Settings(like_llama=True))] == ["q8_0"]


def test_packed_share_counts_what_each_query_sees() -> None:
    # 2 stores with 100 rows each, of which 60 and 40 are packed; the query before the last one sees a row less in each.
    stats = {"total": {"n_written": 200, "n_packed": 100}, "layers": [{}, {}]}
    assert packed_shares(parse_cache("gear").kv_type, stats, np.array([0, 1])) == pytest.approx([100 / 200, 100 / 198])
    assert packed_shares(parse_cache("q8_0").kv_type, stats, np.array([0, 1])) == [1.0, 1.0]
    assert packed_shares(F16, stats, np.array([0, 1])) == []


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_f16_perplexity_equals_the_one_from_llama_cpp_python(bundled_model: Path) -> None:
    settings = Settings(n_ctx=256, n_ubatch=256, n_chunks=2, n_threads=1, like_llama=True)
    measurement = Measurement(bundled_model, TEXT.encode(), "f16", settings)
    assert [step.n_done for step in measurement.run()] == [0, 256, 512]
    (row,) = measurement.rows()

    llm = Llama(str(bundled_model), kv_type="f16", flash_attn=True, n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False)
    nll = []
    for chunk in measurement.chunks:
        llm.reset()
        llm.eval(chunk.tolist())
        scores = llm.scores[:256].astype(np.float64)
        for position in range(128, 255):
            nll.append(np.log(np.exp(scores[position]).sum()) - scores[position, chunk[position + 1]])
    llm.close()
    assert row.summary.n_tokens == len(nll) == 254
    assert row.summary.ppl == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)
    assert row.summary.ppl_se == pytest.approx(row.summary.ppl * np.std(nll, ddof=1) / math.sqrt(254), rel=1e-6)


def test_caches_are_ranked_as_their_bits_say(bundled_model: Path) -> None:
    settings = Settings(n_ctx=1024, n_ubatch=128, n_chunks=1, n_threads=1)
    measurement = Measurement(bundled_model, TEXT.encode(), "f16,q8_0,q4_0,gear4,gear2", settings)
    steps = list(measurement.run())
    assert steps[-1].n_done == steps[-1].n_total == 2 * 1024
    assert measurement.is_complete
    rows = {row.label: row for row in measurement.rows()}
    assert list(rows) == ["f16", "f16, -ub 63", "q8_0", "q4_0", "gear4", "gear2"]
    kld = {label: row.summary.kld_mean for label, row in rows.items()}
    assert kld["f16"] == 0
    # The weights are Q8_0, and so are activations: that alone turns rounding of the last bit into about 1e-4.
    assert 0 < kld["f16, -ub 63"] < kld["q4_0"] / 5
    assert 0 < kld["q8_0"] < kld["q4_0"] / 5 < 0.01
    assert 0 < kld["gear4"] < kld["gear2"] < 0.02
    assert all(row.summary.n_tokens == 511 for row in rows.values())
    assert [rows[label].bits_per_element for label in ("f16", "q8_0", "q4_0")] == [16, 8.5, 4.5]
    assert 2 < rows["gear2"].bits_per_element < rows["gear4"].bits_per_element < 5
    assert (rows["q8_0"].packed_share, rows["f16"].packed_share) == (1.0, None)
    share = rows["gear4"].packed_share
    # At least the tail, the sinks and the newest ubatch are exact; 512 to 1023 rows are visible.
    assert share and 0.2 < share < 1 - 132 / 1023
    assert (rows["gear4"].n_tail, rows["gear4"].n_sink) == (128, 4)


def test_a_reference_method_runs_in_the_place_of_the_codec(bundled_model: Path) -> None:
    pytest.importorskip("torch", reason="the reference methods need PyTorch")
    settings = Settings(n_ctx=1024, n_chunks=1, n_threads=1)
    measurement = Measurement(bundled_model, TEXT.encode(), "q4_0,q4_0+tail128,sim:q8_0-plain", settings)
    for _ in measurement.run():
        pass
    rows = {row.label: row for row in measurement.rows()}
    assert rows["q4_0+tail128"].bits_per_element == pytest.approx(4.5)
    assert rows["sim:q8_0-plain"].bits_per_element == pytest.approx(8.5)
    kld = {label: row.summary.kld_mean for label, row in rows.items()}
    assert 0 < kld["sim:q8_0-plain"] < kld["q4_0+tail128"] < kld["q4_0"] / 3


def test_a_method_that_fails_or_is_interrupted_ends_the_run(bundled_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="the reference methods need PyTorch")
    for cause, raised in ((ZeroDivisionError("a mistake"), CodecError), (KeyboardInterrupt(), KeyboardInterrupt)):
        measurement = Measurement(bundled_model, TEXT.encode(), "sim:kivi2", Settings(n_ctx=1024, n_chunks=1, n_threads=1))

        def fail(*_: object, cause: BaseException = cause) -> None:
            raise cause

        monkeypatch.setattr("gearcpp.cache.python_codec.MethodCodec.__call__", fail)
        with pytest.raises(raised) as caught:
            list(measurement.run())
        assert cause in (caught.value, caught.value.__cause__)


def test_calibrated_methods_read_another_text_first(random_model: Callable[..., Path], text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="the reference methods need PyTorch")
    options = ["-m", random_model(), "--kv", "sim:cq-4c4b+tail64,sim:kvquant4", "-c", 1024, "--chunks", 1, "-t", 1]
    assert run(text_file, *options, "--calibrate", text_file, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert any(re.fullmatch(r"calibrated on \d+ tokens of each head, out of \d+ chunks of 2048 of text.txt", note) for note in record["notes"])
    rows = {row["kv"]: row for row in record["rows"]}
    # One code of 4 bits for 4 channels; 4 bits, 32 for each of the outliers, of V the smallest and the largest of a token, and its range.
    assert rows["sim:cq-4c4b+tail64"]["bits_per_element"] == pytest.approx(1.0)
    assert rows["sim:kvquant4"]["bits_per_element"] == pytest.approx(4 + (0.32 + 2 * 32 / 64 + 32 / 64) / 2, abs=0.1)
    assert 0 < rows["sim:kvquant4"]["kld_mean"] < rows["sim:cq-4c4b+tail64"]["kld_mean"]


def test_calibration_is_asked_for_where_it_is_needed_and_refused_where_not(bundled_model: Path, text_file: Path) -> None:
    pytest.importorskip("torch", reason="the reference methods need PyTorch")
    with pytest.raises(ConfigError, match=r"kvquant3.*--calibrate TEXT_FILE"):
        Measurement(bundled_model, TEXT.encode(), "sim:kvquant3")
    with pytest.raises(ConfigError, match="no cache type wants one"):
        Measurement(bundled_model, TEXT.encode(), "gear,sim:kivi2", calibration=text_file)
    with pytest.raises(ConfigError, match="unknown method 'kivo2'"):  # before the text is read
        Measurement(bundled_model, TEXT.encode(), "sim:kvquant3,sim:kivo2", calibration=text_file / "missing")


def test_a_run_in_which_nothing_is_packed_is_an_error(bundled_model: Path) -> None:
    measurement = Measurement(bundled_model, TEXT.encode(), "gear4", Settings(n_ctx=128, n_ubatch=64, n_threads=1))
    with pytest.raises(ConfigError, match=r"gear4: in chunks of 128 tokens nothing .* is ever packed.*use -c 4096"):
        list(measurement.run())


def test_what_was_measured_before_a_stop_is_kept(bundled_model: Path) -> None:
    measurement = Measurement(bundled_model, TEXT.encode(), "q8_0", Settings(n_ctx=256, n_ubatch=64, n_chunks=2, n_threads=1))
    steps = measurement.run()
    while next(steps).n_done < 256 + 192:
        pass
    steps.close()
    # The first chunk, and of the second one the positions 128 to 191.
    assert [row.summary.n_tokens for row in measurement.rows()] == [127 + 64] * 3
    assert not measurement.is_complete


def test_notes_tell_what_weakens_the_figures(random_model: Callable[..., Path]) -> None:
    model = random_model(shape=Shape(n_layer=1, n_ctx=128))
    measurement = Measurement(model, TEXT.encode(), "f16", Settings(n_ctx=256, n_chunks=1))
    assert any("longer than the 128 that the model was trained on" in note for note in measurement.notes)
    assert any("127 tokens are scored" in note for note in measurement.notes)


def test_bos_stands_first_where_the_model_wants_it(random_model: Callable[..., Path]) -> None:
    # Of this vocabulary a space takes three tokens, so the text has more tokens than bytes.
    model = random_model(shape=Shape(n_layer=1))
    llm = Llama(str(model), vocab_only=True, verbose=False)
    bos, text = llm.token_bos(), llm.tokenize(TEXT.encode(), add_bos=True)
    llm.close()
    chunks = Measurement(model, TEXT.encode(), "f16", Settings(n_ctx=256)).chunks
    assert (chunks[:, 0] == bos).all()
    assert chunks[1, 1:].tolist() == text[257:512]


def test_a_model_that_asks_for_a_bos_it_does_not_have(random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_cpp.llama_vocab_bos", lambda vocab: -1)
    with pytest.raises(DataError, match="asks for a BOS token and has none"):
        Measurement(random_model(shape=Shape(n_layer=1)), TEXT.encode(), "f16", Settings(n_ctx=256))


def test_what_llama_perplexity_refuses(random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_cpp.llama_vocab_get_add_eos", lambda vocab: True)
    model = random_model(shape=Shape(n_layer=1))
    with pytest.raises(ConfigError, match="llama-perplexity refuses models that end a text with EOS"):
        Measurement(model, TEXT.encode(), "f16", Settings(n_ctx=256, like_llama=True))
    assert Measurement(model, TEXT.encode(), "f16", Settings(n_ctx=256)).n_scored > 0


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    """The exit code of `gearcpp perplexity`."""
    with pytest.raises(SystemExit) as end:
        main(["perplexity", *map(str, arguments)])
    return int(end.value.code or 0)


def test_the_command_end_to_end(bundled_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.csv"
    options = ["-m", bundled_model, "--kv", "f16,q8_0,gear4", "-c", 1024, "--chunks", 1, "-t", 1]
    assert run(text_file, *options, "--json", "--csv", table) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["complete"] and record["n_scored"] == 511
    assert [row["kv"] for row in record["rows"]] == ["f16", "f16, -ub 63", "q8_0", "gear4"]
    with table.open(newline="") as opened:
        lines = list(csv.DictReader(opened))
    assert [line["kv"] for line in lines] == [row["kv"] for row in record["rows"]]
    for line, row in zip(lines, record["rows"], strict=True):
        assert float(line["ppl"]) == row["ppl"]


def test_the_table_is_markdown(bundled_model: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(text_file, "-m", bundled_model, "--kv", "q8_0", "-c", 256, "--chunks", 1, "-t", 1) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert len(lines) == 5 and {line.count("|") for line in lines} == {13}
    assert "127 scored tokens: positions 128 to 254 of 1 chunks of 256" in output.err


def test_the_picture(bundled_model: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    picture = tmp_path / "picture.png"
    assert run(text_file, "-m", bundled_model, "--kv", "q8_0", "-c", 256, "--chunks", 1, "-t", 1, "--plot", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_leaves_what_there_is(bundled_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measure = Measurement.run

    def interrupted(self: Measurement) -> Iterator[object]:
        for step in measure(self):
            yield step
            if step.n_done >= 256:
                raise KeyboardInterrupt

    monkeypatch.setattr(Measurement, "run", interrupted)
    assert run(text_file, "-m", bundled_model, "--kv", "q8_0", "-c", 256, "--chunks", 2, "-t", 1) == 130
    output = capsys.readouterr()
    assert "| q8_0" in output.out
    assert "interrupted: these figures are of a part of the text (of 254 tokens to score: f16 127" in output.err
    assert "Traceback" not in output.err


def test_a_run_that_is_stopped_leaves_what_it_had(bundled_model: Path, text_file: Path, tmp_path: Path) -> None:
    """A line for each chunk where errors go to a file, and the JSON as it stands where output goes to one; SIGTERM ends it as Ctrl-C does."""
    command = [sys.executable, "-m", "gearcpp", "perplexity", text_file, "-m", bundled_model, "--kv", "q8_0", "-c", "256", "-t", "1", "--json"]
    lines, result = tmp_path / "lines", tmp_path / "result.json"
    for kill in (False, True):
        with lines.open("wb") as errors, result.open("wb") as output:
            output.write(b"earlier\n")
            output.flush()
            process = subprocess.Popen([*map(str, command)], stdout=output, stderr=errors)
            end = time.monotonic() + 120
            while "chunk 2 of " not in lines.read_text() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            if kill:
                process.kill()
            else:
                process.terminate()
            code = process.wait(60)
        assert code == (-9 if kill else 130), lines.read_text()
        assert "chunk 1 of " in lines.read_text() and "q8_0 PPL" in lines.read_text()
        head, _, rest = result.read_text().partition("\n")
        record = json.loads(rest)
        assert head == "earlier" and not record["complete"]
        assert {"f16", "q8_0"} <= {row["kv"] for row in record["rows"]}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--kv", "gear4,gaer3"], 2, "unknown kv_type 'gaer3' (did you mean"),
        (["--kv", "sim:kivy2"], 2, "unknown method 'kivy2'"),
        (["-c", "8"], 2, "leaves nothing to score"),
        (["-c", "256", "-ub", "512"], 2, "n_ubatch must be from 1 to n_ctx (256)"),
        (["-c", "100000"], 1, "too few for a chunk of 100000"),
        (["--csv", "no/such/folder.csv"], 1, "there is no folder no/such"),
        (["--plot", "picture.txt"], 2, "its name must end in one of"),
        (["-m", "no-such.gguf"], 1, "there is no file no-such.gguf"),
    ],
)
def test_mistakes_are_one_line(
    bundled_model: Path, text_file: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    if "sim:kivy2" in options:
        pytest.importorskip("torch", reason="the reference methods need PyTorch")
    if "--plot" in options:
        pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    model = [] if "-m" in options else ["-m", bundled_model]
    assert run(text_file, *model, *options) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_text_that_is_not_there(bundled_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("no-such.txt", "-m", bundled_model) == 1
    assert "cannot read no-such.txt" in capsys.readouterr().err


def test_the_reference_row_is_f16() -> None:
    assert REFERENCE.kv_type == F16 and REFERENCE.kv_type.method is None
