"""gearcpp.Llama as an object: its arguments, how it is made and closed, its errors, and that llama-cpp-python's API works through it."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from models import Shape, write_lora

from gearcpp import ClosedError, CodecError, ConfigError, DataError, GearConfig, Llama, OutOfMemoryError, UnsupportedError
from gearcpp.cache.device import GearDevice
from gearcpp.cache.kv_type import normalize_kv_type
from gearcpp.runtime.arguments import parent_arguments

# A cache that packs soon: so small ones, as tests have, are not all exact.
SMALL = GearConfig(tile=64, n_tail=32)

RandomModel = Callable[..., Path]


def load(path: Path, kv_type: Any = SMALL, **arguments: Any) -> Llama:
    return Llama(str(path), kv_type=kv_type, **{"n_ctx": 512, "n_batch": 64, "n_threads": 2, "verbose": False, **arguments})


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------------------------------


def arguments_for(kv_type: Any, n_ctx_train: int = 4096, **given: Any) -> dict[str, Any]:
    return parent_arguments(normalize_kv_type(kv_type), given, n_ctx_train)


def test_gear_needs_flash_attention_and_all_layers() -> None:
    arguments = arguments_for("gear", n_ctx=512)
    assert (arguments["flash_attn"], arguments["offload_kqv"], arguments["n_gpu_layers"]) == (True, True, -1)
    assert arguments_for("gear", flash_attn=True, offload_kqv=True, split_mode=1, main_gpu=0, tensor_split=None, type_k=None)["flash_attn"]


@pytest.mark.parametrize(
    "contradiction",
    [
        {"flash_attn": False},
        {"offload_kqv": False},
        {"split_mode": llama_cpp.LLAMA_SPLIT_MODE_NONE},
        {"split_mode": llama_cpp.LLAMA_SPLIT_MODE_ROW},
        {"main_gpu": 1},
        {"tensor_split": [0.5, 0.5]},
        {"type_k": llama_cpp.GGML_TYPE_F16},
        {"type_v": llama_cpp.GGML_TYPE_Q8_0},
    ],
)
def test_arguments_that_would_lose_the_cache(contradiction: dict[str, Any]) -> None:
    (name,) = contradiction
    with pytest.raises(ConfigError, match=name):
        arguments_for("gear", **contradiction)


def test_a_gpu_build_keeps_gear_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments_for("gear", n_gpu_layers=20)["n_gpu_layers"] == -1  # ignored, as on any CPU build
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)
    assert arguments_for("gear", n_gpu_layers=0)["n_gpu_layers"] == -1
    with pytest.raises(UnsupportedError, match="n_gpu_layers"):
        arguments_for("gear", n_gpu_layers=20)
    assert arguments_for("f16", n_gpu_layers=20)["n_gpu_layers"] == 20


def test_llamas_own_types_pass_through() -> None:
    assert "flash_attn" not in arguments_for("f16")
    assert arguments_for("f16", flash_attn=True, type_k=1)["flash_attn"]
    arguments = arguments_for(("q8_0", "q4_0"))
    assert (arguments["type_k"], arguments["type_v"], arguments["flash_attn"]) == (8, 2, True)
    assert "flash_attn" not in arguments_for(("q8_0", "f16"))
    with pytest.raises(ConfigError, match="quantized V"):
        arguments_for("q8_0", flash_attn=False)
    with pytest.raises(ConfigError, match="type_v contradicts kv_type='q8_0'"):
        arguments_for("q8_0", type_k=8, type_v=2)


@pytest.mark.parametrize(("n_ctx", "rounded"), [(1, 256), (256, 256), (257, 512), (0, 4096), (5000, 5120)])
def test_context_is_rounded_as_llama_does(n_ctx: int, rounded: int) -> None:
    assert arguments_for("gear", n_ctx=n_ctx)["n_ctx"] == rounded


@pytest.mark.parametrize("bad", [{"n_ctx": -1}, {"n_ctx": "4096"}, {"n_ctx": 2**40}, {"n_batch": 0}, {"n_ubatch": 0}, {"n_ubatch": 1.5}])
def test_sizes_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        arguments_for("gear", **bad)


def test_our_llama_in_the_parents_place(random_model: RandomModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What programs that were written for the parent are made to use."""
    monkeypatch.setattr(llama_cpp, "Llama", Llama)
    llm = llama_cpp.Llama(str(random_model()), n_ctx=256, verbose=False)
    assert llm.kv_type.name == "gear"


def test_misspelt_arguments(random_model: RandomModel) -> None:
    with pytest.raises(ConfigError, match=r"'flash_atn' \(did you mean 'flash_attn'\?\)"):
        load(random_model(), flash_atn=True)
    with pytest.raises(ConfigError, match=r"set gearcpp\.Llama\.lenient = True"):
        load(random_model(), zzz=1)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Errors of loading
# ---------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", [SMALL, "f16"])
def test_a_truncated_model(kv_type: Any, random_model: RandomModel, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(random_model().read_bytes()[:-1000])
    with pytest.raises(DataError, match="not within the file bounds"):
        load(cut, kv_type)
    with pytest.raises(DataError, match="there is no file"):
        load(tmp_path / "absent.gguf", kv_type)


@pytest.mark.parametrize("kv_type", ["gear", "f16"])
def test_a_context_that_does_not_fit_into_memory(kv_type: str, random_model: RandomModel) -> None:
    with pytest.raises(OutOfMemoryError, match="n_ctx"):
        load(random_model(), kv_type, n_ctx=2**30)
    load(random_model(), kv_type).close()  # the failure left nothing behind


def test_heads_that_cannot_be_packed(random_model: RandomModel) -> None:
    odd = random_model("llama", Shape(d_head=40))
    with pytest.raises(UnsupportedError, match="kv_type='f16'"):
        load(odd)
    load(odd, "f16").close()


def test_a_cache_outside_of_the_store_is_noticed(random_model: RandomModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last check of a construction: whatever made llama.cpp put a layer elsewhere, it is named."""
    stores = GearDevice.stats
    monkeypatch.setattr(GearDevice, "stats", lambda self: [store for store in stores(self) if (store["il"], store["side"]) != (1, 0)])
    with pytest.raises(UnsupportedError, match="layers 1 outside of GEAR"):
        load(random_model())
    monkeypatch.setattr(GearDevice, "stats", lambda self: [])
    with pytest.raises(UnsupportedError, match="layers 0, 1 outside of GEAR"):
        load(random_model())
    monkeypatch.setattr(GearDevice, "stats", lambda self: [{**store, "kind": 2} for store in stores(self)])
    with pytest.raises(UnsupportedError, match="nothing of this model's KV cache could be compressed"):
        load(random_model())


def test_failed_constructions_leave_no_noise() -> None:
    """The parent's __del__ would complain about an object that never got far."""
    code = """
import gearcpp
for arguments in ({"kv_type": "x"}, {}):
    try:
        gearcpp.Llama("/absent.gguf", **arguments)
    except gearcpp.GearError as error:
        print(type(error).__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout.split(), result.stderr) == (["ConfigError", "DataError"], "")


def test_importing_the_package_is_light() -> None:
    code = "import sys, gearcpp; print([m for m in ('torch', 'llama_cpp', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Made, closed, made again
# ---------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", [SMALL, "f16"])
def test_use_after_close(kv_type: Any, random_model: RandomModel) -> None:
    llm = load(random_model(), kv_type)
    text = llm("abc", max_tokens=4)["choices"][0]["text"]
    assert isinstance(text, str)
    llm.close()
    llm.close()
    uses: list[Callable[[], Any]] = [
        lambda: llm("abc"),
        lambda: llm.eval([1, 2]),
        lambda: llm.tokenize(b"abc"),
        lambda: llm.detokenize([5]),
        lambda: llm.create_chat_completion([{"role": "user", "content": "hi"}]),
        lambda: llm.sample(),
        llm.save_state,
        llm.kv_stats,
        llm.n_ctx,
        llm.n_vocab,
        lambda: llm.shift_context(0, 1),
        lambda: llm.ctx,
        lambda: llm.model,
    ]
    for use in uses:
        with pytest.raises(ClosedError):
            use()


def test_a_hundred_loads(random_model: RandomModel) -> None:
    """The device goes after the model: the wrong order crashes now and then."""
    for _ in range(100):
        load(random_model(), n_ctx=256).close()


def test_samplers_are_freed_without_a_collection(random_model: RandomModel, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, samplers = load(random_model()), []
    make = llm._init_sampler

    def init_sampler(**arguments: Any) -> Any:
        sampler = make(**arguments)
        samplers.append(weakref.ref(sampler))
        return sampler

    monkeypatch.setattr(llm, "_init_sampler", init_sampler)
    gc.disable()
    try:
        llm.eval([1, 5, 9])
        for _ in range(3):
            llm.sample(temp=0.8)
        assert [sampler() for sampler in samplers] == [None] * 3
        for first in (5, 6):
            tokens = llm.generate([1, first], temp=0)
            assert len([next(tokens) for _ in range(4)]) == 4
            tokens.close()
        assert [sampler() for sampler in samplers] == [None] * 5  # the parent keeps the last one, and `sample` would go on with it
        llm.close()
        assert samplers[-1]() is None
    finally:
        gc.enable()


def test_pickling_takes_the_users_own_arguments(random_model: RandomModel) -> None:
    llm = load(random_model(), {"bits_k": 3, "tile": 64, "n_tail": 32}, n_ctx=500, seed=7)
    prompt = llm.tokenize(b"one two three")
    again = pickle.loads(pickle.dumps(llm))
    assert again.kv_type == llm.kv_type
    assert again.n_ctx() == llm.n_ctx() == 512
    for a, b, _ in zip(llm.generate(prompt, temp=0.0), again.generate(prompt, temp=0.0), range(8), strict=False):
        assert a == b
    llm.close()
    pickle.loads(pickle.dumps(llm)).close()  # also of a closed one


# ---------------------------------------------------------------------------------------------------------------------------------------------
# llama-cpp-python's API
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_bundled_model_writes_text(bundled_model: Path) -> None:
    llm = Llama(str(bundled_model), n_ctx=1024, verbose=False)
    assert not llm.has_chat_template
    answer = llm("Once upon a time", max_tokens=8, temperature=0)["choices"][0]["text"]
    plain = Llama(str(bundled_model), kv_type="f16", flash_attn=True, n_ctx=1024, verbose=False)
    assert answer == plain("Once upon a time", max_tokens=8, temperature=0)["choices"][0]["text"] != ""
    streamed = "".join(part["choices"][0]["text"] for part in llm("Once upon a time", max_tokens=8, temperature=0, stream=True))
    assert streamed == answer
    chat = llm.create_chat_completion([{"role": "user", "content": "Hello"}], max_tokens=4)
    assert chat["usage"]["completion_tokens"] <= 4


def test_context_zero_is_the_models_own(random_model: RandomModel) -> None:
    assert load(random_model("llama", Shape(n_ctx=777)), n_ctx=0).n_ctx() == 1024


def test_vocabulary_only(random_model: RandomModel) -> None:
    llm = load(random_model(), vocab_only=True)
    assert llm.tokenize(b"a", add_bos=False) == [3 + ord("a")]
    assert llm.kv_stats()["layers"] == []


def test_embeddings(random_model: RandomModel) -> None:
    text = "an embedding of some words, long enough for tiles to be packed: " * 3
    gear = np.array(load(random_model(), embedding=True, n_batch=256, n_ubatch=256).embed(text))
    plain = np.array(load(random_model(), "f16", flash_attn=True, embedding=True, n_batch=256, n_ubatch=256).embed(text))
    assert gear.shape == plain.shape
    assert np.abs(gear - plain).max() < 0.05 * np.abs(plain).max()


def test_lora(random_model: RandomModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEARCPP_SMALL_CACHE", "store")  # all rows exact, yet in GEAR's store
    adapter = str(write_lora(tmp_path / "lora.gguf"))
    tokens = [1, *range(3, 250)]
    logits = []
    for kv_type, arguments in ((SMALL.replace(n_tail=512), {}), ("f16", {"flash_attn": True})):
        for lora_path in (adapter, None):
            llm = load(random_model(), kv_type, logits_all=True, lora_path=lora_path, **arguments)
            llm.eval(tokens)
            logits.append(llm.scores[200:248].copy())
            llm.close()
    gear, gear_without, plain, plain_without = logits
    scale = np.abs(plain).max()
    assert np.abs(gear - plain).max() < 0.02 * scale < np.abs(plain - plain_without).max()
    assert np.abs(gear_without - plain_without).max() < 0.02 * scale


def test_logits_of_all_tokens(random_model: RandomModel) -> None:
    llm = load(random_model(), logits_all=True)
    completion = llm("abcabc", max_tokens=3, logprobs=2, temperature=0)
    assert len(completion["choices"][0]["logprobs"]["token_logprobs"]) == 3


def test_draft_models_work_past_a_batch(random_model: RandomModel) -> None:
    """The parent has room for the logits of n_batch tokens only, and fails after that."""
    prompt = b"abcdefgh" * 20
    plain = load(random_model(), n_batch=32)
    drafting = load(random_model(), n_batch=32, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4))
    tokens = plain.tokenize(prompt)
    expected = [token for token, _ in zip(plain.generate(tokens, temp=0.0), range(40), strict=False)]
    assert [token for token, _ in zip(drafting.generate(tokens, temp=0.0), range(40), strict=False)] == expected


def test_from_pretrained(random_model: RandomModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Hub:
        def ls(self, repo_id: str, recursive: bool) -> list[str]:
            return [f"{repo_id}/model-q8_0.gguf", f"{repo_id}/readme.md"]

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **_: str(random_model()))
    llm = Llama.from_pretrained("someone/model", "*q8_0.gguf", kv_type="gear3", n_ctx=256, verbose=False)
    assert isinstance(llm, Llama)
    assert llm.kv_type.name == "gear3"


def test_two_caches_in_two_threads(random_model: RandomModel) -> None:
    """Different kv_types in one process, loaded and run at the same time, each as if it were alone."""
    types = {"gear3": SMALL.replace(bits_k=3, bits_v=3), "gear6": SMALL.replace(bits_k=6, bits_v=6), "f16": "f16", "q8_0": "q8_0"}

    def run(kv_type: Any) -> list[int]:
        llm = load(random_model(), kv_type, n_threads=1)
        tokens = [token for token, _ in zip(llm.generate(llm.tokenize(b"xyz" * 60), temp=0.0), range(60), strict=False)]
        llm.close()
        return tokens

    alone = {name: run(kv_type) for name, kv_type in types.items()}
    together: dict[str, list[int]] = {}
    threads = [threading.Thread(target=lambda n=name, t=kv_type: together.__setitem__(n, run(t))) for name, kv_type in types.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Codecs in Python
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_a_codec_in_python(random_model: RandomModel) -> None:
    calls: list[tuple[int, str, int]] = []

    def identity(il: int, side: str, head: int, x: np.ndarray, written: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, float]:
        assert x.shape == (64, 64)
        assert written.shape == (64,)
        assert written.any()
        assert (np.diff(cells) == 1).all()
        calls.append((il, side, head))
        return x, x.size * 2

    tokens = [1, *range(3, 250)]
    llm = load(random_model(), codec=identity, logits_all=True)
    llm.eval(tokens)
    plain = load(random_model(), "f16", flash_attn=True, logits_all=True)
    plain.eval(tokens)
    assert set(calls) == {(il, side, head) for il in range(2) for side in "kv" for head in range(2)}
    assert np.abs(llm.scores[:248] - plain.scores[:248]).max() < 0.02 * np.abs(plain.scores[:248]).max()
    assert llm.kv_stats()["total"]["n_packed"] > 0


def test_a_failing_codec_stops_the_decode(random_model: RandomModel) -> None:
    def failing(*_: Any) -> Any:
        raise ZeroDivisionError("no such number")

    llm = load(random_model(), codec=failing)
    with pytest.raises(CodecError, match="no such number") as caught:
        llm.eval([1, *range(3, 250)])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ConfigError, match="codec"):
        load(random_model(), "f16", codec=failing)
