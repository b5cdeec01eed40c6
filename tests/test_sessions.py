"""Llama.save_session and load_session, and packed states: the same context again, or a reason why not."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from models import N_VOCAB, Shape
from session_files import END, EXTRA, LEARNED, NOTE, STATE, TENSOR, put_together, take_apart, with_note

from gearcpp import ClosedError, CodecError, DataError, GearConfig, GearError, GearState, Llama
from gearcpp.runtime import sessions

RandomModel = Callable[..., Path]
SMALL = GearConfig(tile=64, n_tail=32, bits_k=6, bits_v=6)
NEAR = 0.15  # as in test_llama_state.py: what a six-bit cache may differ from f16, relative to the largest logit


def load(path: Path, kv_type: Any = SMALL, **arguments: Any) -> Llama:
    return Llama(str(path), kv_type=kv_type, **{"n_ctx": 1024, "n_batch": 64, "n_threads": 2, "flash_attn": True, "verbose": False, **arguments})


def logits(llm: Llama) -> np.ndarray:
    return np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),)).copy()


def next_logits(llm: Llama, token: int = 7) -> np.ndarray:
    """Logits after one more token, which is taken back."""
    llm.eval([token])
    llm.n_tokens -= 1
    return logits(llm)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(a).max())


@pytest.fixture
def tokens(random: np.random.Generator) -> list[int]:
    return [1, *random.integers(3, N_VOCAB, 699).tolist()]


@pytest.fixture
def llm(random_model: RandomModel, tokens: list[int]) -> Iterator[Llama]:
    llm = load(random_model(), seed=5)
    llm.eval(tokens)
    yield llm
    llm.close()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The same again
# ---------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kv_type",
    [
        SMALL,
        SMALL.replace(bits_v=16),
        SMALL.replace(bits_k=3, bits_v=2, rotate_k=False, clip_k=0.9, n_sink=0, n_tail=0),
        SMALL.replace(rank_k=2, rank_v=2, sparsity=0.05, center_v=False, scale_bits=16),
        "gear3",  # tiles of 256, of which two are full
        "f16",
        "q8_0",
    ],
    ids=["six bits", "f16 values", "not rotated, no tail", "rank and outliers", "gear3", "f16", "q8_0"],
)
def test_a_restored_context_goes_on_with_the_same_logits(kv_type: Any, random_model: RandomModel, tokens: list[int], tmp_path: Path) -> None:
    llm, other = load(random_model(), kv_type, seed=5), load(random_model(), kv_type)
    llm.eval(tokens)
    n_bytes = llm.save_session(tmp_path / "s", {"data": [1, "two"]})
    assert (tmp_path / "s").stat().st_size == n_bytes
    other.eval(tokens[::-1])
    assert other.load_session(tmp_path / "s") == {"data": [1, "two"]}
    assert (other.n_tokens, other._seed) == (700, 5)
    assert other.input_ids[:700].tolist() == tokens
    stats, others = llm.kv_stats()["total"], other.kv_stats()["total"]
    assert (stats["n_written"], stats["n_packed"]) == (others["n_written"], others["n_packed"])
    for token in tokens[:100]:  # long enough for more tiles to be packed
        for each in (llm, other):
            each.eval([token])
        np.testing.assert_array_equal(logits(llm), logits(other))
    assert llm.kv_stats()["total"]["n_packed"] == other.kv_stats()["total"]["n_packed"]


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
@pytest.mark.parametrize(("kv_type", "kinds", "near"), [("gear", {"gear", "f16: window too small to gain"}, 1e-2), (SMALL, {"gear"}, NEAR)])
def test_models_with_sliding_windows(
    family: str,
    kv_type: Any,
    kinds: set[str],
    near: float,
    random_model: RandomModel,
    tokens: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cells of a window come back in another order, and tiles are packed anew. Of f16 that changes the order of sums, and so what q rounds to later."""
    if kinds == {"gear"}:
        monkeypatch.setenv("GEARCPP_SMALL_CACHE", "store")  # windows of so few cells do not gain
    llm, other = load(random_model(family), kv_type, swa_full=False), load(random_model(family), kv_type, swa_full=False)
    llm.eval(tokens)
    llm.save_session(tmp_path / "s")
    other.load_session(tmp_path / "s")
    assert {layer["kind"] for layer in other.kv_stats()["layers"]} == kinds
    for token in tokens[:20]:
        for each in (llm, other):
            each.eval([token])
        assert distance(logits(llm), logits(other)) < near


def test_f16_without_flash_attention(random_model: RandomModel, tokens: list[int], tmp_path: Path) -> None:
    llm, other = load(random_model(), "f16", flash_attn=False), load(random_model(), "f16", flash_attn=False)
    llm.eval(tokens)
    llm.save_session(tmp_path / "s")
    other.load_session(tmp_path / "s")
    np.testing.assert_array_equal(next_logits(llm), next_logits(other))
    with pytest.raises(DataError, match="other settings: flash_attn_type"):
        load(random_model(), "f16").load_session(tmp_path / "s")


def test_contexts_of_another_length_and_batch(llm: Llama, random_model: RandomModel, tmp_path: Path) -> None:
    llm.save_session(tmp_path / "s")
    expected = next_logits(llm)
    for arguments in ({"n_ctx": 2048}, {"n_ctx": 768}, {"n_batch": 256}):
        other = load(random_model(), **arguments)
        other.load_session(tmp_path / "s")
        np.testing.assert_allclose(next_logits(other), expected, atol=1e-4)  # n_kv is padded differently, which changes the order of sums
    plain = load(random_model(), n_batch=1000, n_ubatch=1000)  # a cache that its own steps would fill: it stays f16, and takes the rows
    plain.load_session(tmp_path / "s")
    assert {layer["kind"] for layer in plain.kv_stats()["layers"]} == {"f16: context too small to gain"}
    assert distance(expected, next_logits(plain)) < NEAR
    plain.save_session(tmp_path / "plain")  # and back again
    llm.load_session(tmp_path / "plain")
    assert distance(expected, next_logits(llm)) < NEAR


def test_logits_are_kept_when_all_are(random_model: RandomModel, tokens: list[int], tmp_path: Path) -> None:
    llm = load(random_model(), logits_all=True)
    llm.eval(tokens)
    expected = llm.scores[:700].copy()
    with_logits = llm.save_session(tmp_path / "s")
    llm.scores[:] = 0
    llm.load_session(tmp_path / "s")
    np.testing.assert_array_equal(llm.scores[:700], expected)

    without = load(random_model())
    without.load_session(tmp_path / "s")
    assert without.save_session(tmp_path / "t") < with_logits - expected.nbytes
    llm.load_session(tmp_path / "t")
    assert not llm.scores[:700].any()


def test_an_empty_context(random_model: RandomModel, llm: Llama, tmp_path: Path) -> None:
    load(random_model()).save_session(tmp_path / "s")
    assert llm.load_session(tmp_path / "s") is None
    assert llm.n_tokens == 0
    fresh = load(random_model())
    np.testing.assert_array_equal(next_logits(llm), next_logits(fresh))


LARGE_HEADS = {
    "heads of 64": ("llama", Shape()),
    "heads of 512": ("llama", Shape(n_head=2, n_head_kv=1, d_head=512)),
    "K of 576, turned in part, and V of 512": ("minicpm3", Shape(n_layer=1, n_head=2, n_head_kv=2, d_head=576, d_head_v=512)),
    "latent attention": ("deepseek2", Shape(n_head_kv=1, d_head=576, d_head_v=512)),
}


@pytest.mark.parametrize("heads", LARGE_HEADS)
def test_a_context_that_lost_its_middle(heads: str, random_model: RandomModel, tokens: list[int], tmp_path: Path) -> None:
    """llama.cpp closes the gap, so tokens after it change their cells and are packed anew."""
    path = random_model(*LARGE_HEADS[heads])
    llm, other, twin = load(path), load(path), load(path, "f16")
    for each in (llm, twin):
        each.eval(tokens)
        each.shift_context(150, 101)
    llm.save_session(tmp_path / "s")
    other.load_session(tmp_path / "s")
    assert other.input_ids[: other.n_tokens].tolist() == tokens[:150] + tokens[251:]
    assert distance(next_logits(llm), next_logits(other)) < NEAR
    assert distance(next_logits(twin), next_logits(other)) < NEAR
    other.save_session(tmp_path / "t")  # there is no gap any more
    again = load(path)
    again.load_session(tmp_path / "t")
    np.testing.assert_array_equal(next_logits(again), next_logits(other))


def test_sessions_are_several_times_smaller_than_llama_cpps_states(random_model: RandomModel, random: np.random.Generator, tmp_path: Path) -> None:
    """Counted in bytes, heads of 128, 4000 tokens: 164 exact rows (tail, sinks, the tile half filled), the others packed; 131 KiB of queries' moments."""
    shape = Shape(n_layer=4, n_head=2, d_head=128, n_embd=64, n_ff=32)
    tokens = random.integers(3, N_VOCAB, 4000).tolist()
    for kv_type, smaller in (("gear", 3.1), ("gear3", 3.8), ("gear2", 4.8)):
        llm = load(random_model("llama", shape), kv_type, n_ctx=4096, n_batch=512)
        llm.eval(tokens)
        n_state = llama_cpp.llama_state_get_size(llm.ctx)
        assert n_state > 4 * 4000 * 2 * 2 * 128 * 2
        assert llm.save_session(tmp_path / "s") < n_state / smaller
        assert llm.kv_stats()["total"]["n_exact"] == 4 * 2 * 164


MEMORY = """
import gc, sys
import numpy as np
from gearcpp import Llama
import llama_cpp

def status(name):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name))) * 1024

llm = Llama(sys.argv[1], kv_type="gear", n_ctx=4096, n_batch=512, verbose=False)
llm.eval(np.random.default_rng(0).integers(3, 200, 4000).tolist())
llm.save_session(sys.argv[2])
for call in (llm.save_session, llm.load_session):
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = status("VmRSS")
    call(sys.argv[2])
    print((status("VmHWM") - before) / llama_cpp.llama_state_get_size(llm.ctx))
"""


def test_neither_saving_nor_loading_makes_a_copy_of_the_cache(random_model: RandomModel, tmp_path: Path) -> None:
    """The most that the process ever had resident meanwhile, as a share of llama.cpp's state (63 MiB)."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("only Linux says how much memory a process has had resident since a moment")
    model = random_model("llama", Shape(n_layer=4, n_head=8, n_head_kv=8, d_head=128, n_embd=64, n_ff=32))
    done = subprocess.run([sys.executable, "-c", MEMORY, str(model), str(tmp_path / "s")], capture_output=True, text=True, check=True)
    shares = [float(line) for line in done.stdout.split()]
    assert len(shares) == 2 and max(shares) < 0.1, shares


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Not the same
# ---------------------------------------------------------------------------------------------------------------------------------------------


def refuses(llm: Llama, path: Path, reason: str) -> None:
    """Loading fails with the reason and the file's name."""
    with pytest.raises(DataError, match=reason) as failure:
        llm.load_session(path)
    assert str(path) in str(failure.value) and "empty now" not in str(failure.value)


@contextmanager
def unchanged(llm: Llama) -> Iterator[None]:
    """The context is after it what it was before."""
    n_tokens, expected = llm.n_tokens, next_logits(llm)
    yield
    assert llm.n_tokens == n_tokens
    np.testing.assert_array_equal(next_logits(llm), expected)


def test_truncated_files(llm: Llama, random: np.random.Generator, tmp_path: Path) -> None:
    path = tmp_path / "s"
    llm.save_session(path)
    data = path.read_bytes()
    with unchanged(llm):
        for n in [*range(50), *random.integers(50, len(data) - 1, 100).tolist(), *range(len(data) - 40, len(data))]:
            path.write_bytes(data[:n])
            refuses(llm, path, "cut off|not a gearcpp session|damaged")
        path.write_bytes(data + b"\0")
        refuses(llm, path, "something follows its end")


def test_flipped_bits(llm: Llama, random: np.random.Generator, tmp_path: Path) -> None:
    path = tmp_path / "s"
    llm.save_session(path)
    data = path.read_bytes()
    with unchanged(llm):
        for at in [*range(60), *random.integers(60, len(data), 200).tolist()]:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << int(random.integers(8))]) + data[at + 1 :])
            refuses(llm, path, "cut off|not a gearcpp session|damaged|inconsistent")


def test_files_that_something_else_wrote(llm: Llama, tmp_path: Path) -> None:
    """All checksums are right in these."""
    path = tmp_path / "s"
    llm.save_session(path)
    data = path.read_bytes()
    note, state, *rest, end = take_apart(data)
    assert (note[0], state[0], end[0], {kind for kind, _ in rest}) == (NOTE, STATE, END, {TENSOR, LEARNED})
    tensors, learned = [part for part in rest if part[0] == TENSOR], rest[1]  # behind the first K
    assert learned[0] == LEARNED and rest[0][0] == TENSOR
    assert put_together(take_apart(data)) == data
    k = tensors[0][1]
    forged = {
        "version 2, and this gearcpp reads version 1": put_together([note, state, *tensors, end], version=2),
        "not a gearcpp session": put_together([note, state, *tensors, end], magic=b"GEARCHAT"),
        "does not begin with a note": put_together([state, note, *tensors, end]),
        "it has no state": put_together([note, end]),
        "in the wrong place": put_together([note, *tensors, state, end]),
        "has gaps": put_together([note, state, *tensors[1:], end]),
        "is not one that this gearcpp understands": with_note(data, b"[]"),
        "was written by something else": with_note(data, b"\xff{"),
        "it was written by something": with_note(data, {"tokens": [1, -1]}),
        "written by something else": with_note(data, {"owner": {}}),
        "vocabulary of 259": with_note(data, {"tokens": [1, 259]}),
        "room for 1024": with_note(data, {"tokens": [1] * 1025}),
        "longer than its contents": put_together([note, state, (TENSOR, k + b"\0"), *tensors[1:], end]),
        "a section ends before": put_together([note, state, (TENSOR, k[:-1]), *tensors[1:], end]),
        "out of range": put_together([note, state, (TENSOR, k[:8] + b"\xff\xff\xff\x7f" + k[12:]), *tensors[1:], end]),
        "its shape is out of range": put_together([note, state, (TENSOR, k[:8] + struct.pack("<2i", 1 << 16, 1 << 16) + k[16:]), *tensors[1:], end]),
        "another cache configuration": put_together([note, state, (TENSOR, k[:48] + b"\0" + k[49:]), *tensors[1:], end]),
        "not as long as its parts": put_together([note, (STATE, state[1][:-1]), *tensors, end]),
        "section is in the wrong place": put_together([note, state, learned, *tensors, end]),
        "a section is in the wrong place": put_together([note, state, state, *tensors, end]),
        "rows lie outside of its state": put_together([note, (STATE, b"\0" * 16), *tensors, end]),
    }
    with unchanged(llm):
        for reason, content in forged.items():
            path.write_bytes(content)
            refuses(llm, path, reason)


def test_what_it_learned_is_of_another_cache(llm: Llama, tmp_path: Path) -> None:
    """Known only when the stores are filled, so the context is empty then, and goes on. Without it, as sessions before 0.2.0 are, it loads."""
    path = tmp_path / "s"
    llm.save_session(path)
    note, state, *rest, end = take_apart(path.read_bytes())
    bad = bytes.fromhex("0000c07f")  # NaN
    for learned in (rest[1][1][:-2], bad + rest[1][1][4:], rest[1][1][:20] + bad + rest[1][1][24:]):
        path.write_bytes(put_together([note, state, rest[0], (LEARNED, learned), *rest[2:], end]))
        with pytest.raises(DataError, match="what it learned of layer 0"):
            llm.load_session(path)
        assert llm.n_tokens == 0
    path.write_bytes(put_together([note, state, *(part for part in rest if part[0] == TENSOR), end]))
    llm.load_session(path)
    assert llm.n_tokens > 0


def test_tokens_that_the_cache_does_not_hold(llm: Llama, tmp_path: Path) -> None:
    """A header from a longer session: known only when llama.cpp has taken the state, so the context is empty then, and goes on."""
    path = tmp_path / "s"
    llm.save_session(path)
    path.write_bytes(with_note(path.read_bytes(), {"tokens": [1] * 1000}))
    with pytest.raises(DataError, match="put together from different sessions; the context is empty now"):
        llm.load_session(path)
    assert llm.n_tokens == 0
    llm.eval([5, 6, 7])


def test_logits_of_another_size(random_model: RandomModel, tmp_path: Path) -> None:
    llm = load(random_model(), logits_all=True)
    llm.eval([1, 2, 3])
    llm.save_session(tmp_path / "s")
    *sections, _, end = take_apart((tmp_path / "s").read_bytes())
    (tmp_path / "s").write_bytes(put_together([*sections, (EXTRA, b"12345"), end]))
    with pytest.raises(DataError, match="5 bytes of logits"):
        llm.load_session(tmp_path / "s")
    assert llm.n_tokens == 3


def test_sessions_of_others(llm: Llama, random_model: RandomModel, tmp_path: Path) -> None:
    path = tmp_path / "s"
    llm.save_session(path)

    def codec(*arguments: Any) -> tuple[Any, float]:
        return arguments[3], 1.0

    others = [
        ("another model", load(random_model("llama", Shape(seed=2)))),
        ("another model .* LoRA or kv_overrides", load(random_model(), kv_overrides={"llama.rope.freq_base": 5000.0})),
        ("was saved with kv_type='gear\\(", load(random_model(), SMALL.replace(bits_k=4))),
        ("was saved with kv_type=.* and this context has 'f16'", load(random_model(), "f16")),
        ("was saved with kv_type", load(random_model(), SMALL.replace(n_tail=33))),
        ("was saved with kv_type", load(random_model(), codec=codec)),
        ("other settings: rope_freq_scale=0.0", load(random_model(), rope_freq_scale=0.5)),
        ("holds 700 tokens; this context has room for 512", load(random_model(), n_ctx=512)),
    ]
    for reason, other in others:
        other.eval([1, 2, 3])
        with unchanged(other):
            refuses(other, path, reason)
        other.close()
    quantized = load(random_model(), "q8_0")
    quantized.eval([1, 2])
    quantized.save_session(path)
    refuses(llm, path, "was saved with kv_type='q8_0'")


def test_another_release_of_llama_cpp(llm: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.save_session(tmp_path / "s")
    monkeypatch.setattr(llm, "_owner", {**llm._session_owner(), "llama_state": 99})
    refuses(llm, tmp_path / "s", "whose states the installed .* cannot read")


def test_what_fails_late_leaves_an_empty_context(llm: Llama, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.save_session(tmp_path / "s")
    expected = next_logits(llm)
    calls = {
        "does not take its state": lambda *_: 0,
        "did not take back what it saved": lambda _, __, n: n,  # and did nothing
    }
    for reason, call in calls.items():
        with monkeypatch.context() as patch:
            patch.setattr(llama_cpp, "llama_state_set_data", call)
            with pytest.raises(DataError, match=f"{reason}.*; the context is empty now"):
                llm.load_session(tmp_path / "s")
        assert llm.n_tokens == 0
        llm.load_session(tmp_path / "s")
        np.testing.assert_array_equal(next_logits(llm), expected)


def test_a_read_that_fails(llm: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the file is checked, and later while tiles come back."""
    llm.save_session(tmp_path / "s")
    expected, pread = next_logits(llm), os.pread
    n_read, fails_at = 0, 0

    def failing(descriptor: int, n: int, offset: int) -> bytes:
        nonlocal n_read
        n_read += 1
        if n_read == fails_at:
            raise OSError(5, "Input/output error")
        return pread(descriptor, n, offset)

    monkeypatch.setattr(os, "pread", failing)
    llm.load_session(tmp_path / "s")
    n_all = n_read
    for at in (1, n_all // 4, n_all - 1):
        n_read, fails_at = 0, at
        with pytest.raises(DataError, match="Input/output error"):
            llm.load_session(tmp_path / "s")
        assert llm.n_tokens in (0, 700)
    assert llm.n_tokens == 0
    fails_at = 0
    llm.load_session(tmp_path / "s")
    np.testing.assert_array_equal(next_logits(llm), expected)


def test_a_codec_that_fails_while_tiles_are_packed(random_model: RandomModel, tokens: list[int], tmp_path: Path) -> None:
    fails = False

    def codec(*arguments: Any) -> tuple[Any, float]:
        if fails:
            raise ZeroDivisionError
        return arguments[3], 1.0

    llm = load(random_model(), codec=codec)
    llm.eval(tokens[:200])
    fails = True
    with pytest.raises(CodecError, match="the codec failed"):
        llm.save_session(tmp_path / "s")
    assert os.listdir(tmp_path) == []
    fails = False
    llm.save_session(tmp_path / "s")
    other = load(random_model(), codec=codec)
    other.load_session(tmp_path / "s")
    np.testing.assert_array_equal(next_logits(llm), next_logits(other))


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_or_written(llm: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"cannot read .*absent: No such file"):
        llm.load_session(tmp_path / "absent")
    with pytest.raises(DataError, match="Is a directory"):
        llm.load_session(tmp_path)
    with pytest.raises(GearError, match=r"cannot save to .*: No such file or directory"):
        llm.save_session(tmp_path / "absent" / "s")
    with pytest.raises(TypeError, match="not JSON serializable"):
        llm.save_session(tmp_path / "s", {1, 2})

    llm.save_session(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # as if the disk were full
    try:
        with pytest.raises(GearError, match=r"cannot save to .*s: File too large"):
            llm.save_session(tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.save_session(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before
    assert os.listdir(tmp_path) == ["s"]


KILLED = """
import os, sys, time
from gearcpp import GearConfig, Llama
llm = Llama(sys.argv[1], kv_type=GearConfig(tile=64, n_tail=32), n_ctx=1024, n_batch=64, seed=1, verbose=False)
llm.eval(list(range(3, 203)))
if sys.argv[3] == "wait":
    def fsync(_):  # everything is written, nothing is renamed
        print("written", flush=True)
        time.sleep(1000)
    os.fsync = fsync
llm.save_session(sys.argv[2])
"""


def test_a_killed_save_leaves_the_old_file(random_model: RandomModel, tmp_path: Path) -> None:
    path = tmp_path / "s[1]*"
    command = [sys.executable, "-c", KILLED, str(random_model()), str(path)]
    subprocess.run([*command, "now"], check=True)
    before = path.read_bytes()
    with subprocess.Popen([*command, "wait"], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"written\n"
        names = os.listdir(tmp_path)
        assert len(names) == 2
        subprocess.run([*command, "now"], check=True)  # another process that saves meanwhile leaves the unfinished file alone
        assert sorted(os.listdir(tmp_path)) == sorted(names)
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == before
    subprocess.run([*command, "now"], check=True)
    assert os.listdir(tmp_path) == [path.name]  # and what was left behind is gone


def test_the_fingerprint_sees_metadata_weights_and_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = bytes(range(256)) * 2**14  # 4 MiB, of which all is sampled
    seen = set()
    for changed in (data, data[:-1], b"x" + data[1:], data[:-1] + b"x"):
        path.write_bytes(changed)
        seen.add(sessions.file_fingerprint(path))
    assert len(seen) == 4


def test_after_close(llm: Llama, tmp_path: Path) -> None:
    llm.save_session(tmp_path / "s")
    llm.close()
    for call in (lambda: llm.save_session(tmp_path / "s"), lambda: llm.load_session(tmp_path / "s"), lambda: llm.save_state(packed=True)):
        with pytest.raises(ClosedError):
            call()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Packed states
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_packed_states(llm: Llama, random_model: RandomModel, tokens: list[int]) -> None:
    state = llm.save_state(packed=True)
    expected = next_logits(llm)
    assert isinstance(state, GearState)
    assert (state.n_tokens, state.seed, state.llama_state_size) == (700, 5, len(state.llama_state))
    assert state.input_ids.tolist() == tokens
    assert state.llama_state_size < llm.save_state().llama_state_size / 1.8  # six bits, and a tail and a half tile of 700 tokens
    llm.reset()
    llm.eval([9, 8, 7])
    llm.load_state(pickle.loads(pickle.dumps(state)))
    np.testing.assert_array_equal(next_logits(llm), expected)

    with pytest.raises(DataError, match="the state cannot be loaded: it was saved with kv_type"):
        load(random_model(), "f16").load_state(state)
    state.llama_state = state.llama_state[:-1]
    with pytest.raises(DataError, match="the state cannot be loaded: it is cut off"):
        llm.load_state(state)
    np.testing.assert_array_equal(next_logits(llm), expected)
    with pytest.raises(DataError, match="not a gearcpp session"):
        GearState(b"something else")


def test_random_damage_of_what_checksums_do_not_see(llm: Llama, tokens: list[int], random: np.random.Generator) -> None:
    """Tables with random bytes under checksums that are right: refused, or loaded; never a crash, and the context goes on working."""
    state = llm.save_state(packed=True)
    whole, n_refused = state.llama_state, 0
    for _ in range(300):
        parts = take_apart(whole)
        i = int(random.integers(2, len(parts) - 1))
        payload = bytearray(parts[i][1])
        for _ in range(int(random.integers(1, 4))):
            payload[int(random.integers(0, min(len(payload), 700)))] = int(random.integers(256))
        parts[i] = (parts[i][0], bytes(payload))
        state.llama_state = put_together(parts)
        try:
            llm.load_state(state)
        except DataError:
            n_refused += 1
    assert n_refused > 100
    llm.reset()
    state.llama_state = whole
    llm.load_state(state)
    llm.eval(tokens[:100])
    assert np.isfinite(logits(llm)).all()
