"""llama.cpp, given our file, makes the tokens that the original tokenizer makes; and rules that it does not have are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gearcpp.convert import convert_model
from gearcpp.convert.verification import llama_tokens
from samples import DEEPSEEK3_WORDS, GPT2_WORDS, GPT4O_WORDS, LLAMA3_WORDS, NASTY_TEXT, QWEN2_WORDS, TEKKEN_WORDS, byte_level, sentencepiece, write_llama
from tokenizers import Tokenizer

from gearcpp.errors import ConfigError, DataError, UnsupportedError

# Combining marks: llama.cpp's expressions for GPT-4o and Tekken leave them out, so it cuts such scripts in more places.
WITHOUT_MARKS = NASTY_TEXT.replace("हिन्दी ไทย ", "")
SPECIAL_TEXT = "<|im_start|>user\nHi there<|im_end|>\n<tool_call>{1}</tool_call> <|endoftext|>x"
SENTENCEPIECE_SPECIAL_TEXT = "<start_of_turn>user\nHi  there</s>\nyes<s>x"

TOKENIZERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "gpt-2": (byte_level(), "gpt-2", NASTY_TEXT),
    "gpt-2 as an expression": (byte_level(GPT2_WORDS), "gpt-2", NASTY_TEXT),
    "smollm": (byte_level(digits=True), "smollm", NASTY_TEXT),
    "llama-3": (byte_level(LLAMA3_WORDS, whole_words_first=True, bos=True), "llama-bpe", NASTY_TEXT),
    "olmo-2": (byte_level(LLAMA3_WORDS), "dbrx", NASTY_TEXT),
    "qwen-2": (byte_level(QWEN2_WORDS, nfc=True), "qwen2", NASTY_TEXT),
    "deepseek-v3": (byte_level(*DEEPSEEK3_WORDS), "deepseek-v3", NASTY_TEXT),
    "gpt-4o": (byte_level(GPT4O_WORDS), "gpt-4o", WITHOUT_MARKS),
    "tekken": (byte_level(TEKKEN_WORDS, whole_words_first=True, bos=True), "tekken", WITHOUT_MARKS),
    "llama-2": (sentencepiece(), "default", NASTY_TEXT),
    "gemma": (sentencepiece(prefix=False), "default", NASTY_TEXT),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Any]]:
    """(folder, file, conversion) of a small model with one of the tokenizers, made once."""
    made: dict[str, tuple[Path, Path, Any]] = {}

    def get(name: str) -> tuple[Path, Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            write_llama(folder, TOKENIZERS[name][0])
            made[name] = folder, folder / "model.gguf", convert_model(folder, folder / "model.gguf", verify=True)
        return made[name]

    return get


@pytest.mark.parametrize("name", TOKENIZERS)
def test_same_tokens(name: str, converted: Callable[[str], tuple[Path, Path, Any]]) -> None:
    folder, file, conversion = converted(name)
    _, pre, text = TOKENIZERS[name]
    special = SENTENCEPIECE_SPECIAL_TEXT if pre == "default" else SPECIAL_TEXT
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert conversion.metadata["tokenizer.ggml.pre"] == pre
    for sample, ids in zip((text, special), llama_tokens(file, [text, special], add_special=True), strict=True):
        assert ids == original.encode(sample).ids


@pytest.mark.parametrize("name", ["gpt-4o", "tekken", "qwen-2"])
def test_known_differences_are_said(name: str, converted: Callable[[str], tuple[Path, Path, Any]]) -> None:
    *_, conversion = converted(name)
    assert any(("combining marks" in notice) or ("NFC" in notice) for notice in conversion.notices)


def test_metadata_of_special_tokens(converted: Callable[[str], tuple[Path, Path, Any]]) -> None:
    *_, conversion = converted("llama-3")
    metadata = conversion.metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    assert {tokens[index]: types[index] for index in range(4)} == {"<|begin|>": 3, "<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3}
    assert types[tokens.index("<tool_call>")] == 4
    assert tokens[-1].startswith("[PAD") and types[-1] == 5
    assert "messages" in metadata["tokenizer.chat_template"]


def test_sentencepiece_model_without_json_gives_the_same_tokens(tmp_path: Path) -> None:
    """tokenizer.model read by itself splits as the tokenizer.json that was made from it."""
    with_json, without = tmp_path / "json", tmp_path / "model"
    for folder, keep_json in ((with_json, True), (without, False)):
        write_llama(folder, sentencepiece(keep_model=True, keep_json=keep_json))
        convert_model(folder, folder / "model.gguf")
    first, second = (llama_tokens(folder / "model.gguf", [NASTY_TEXT], add_special=True) for folder in (with_json, without))
    assert first == second


def test_end_of_turn_is_found_among_several_ends(tmp_path: Path) -> None:
    write_llama(tmp_path, eos_token_id=[1, 3])
    assert convert_model(tmp_path, tmp_path / "m.gguf", dry_run=True).metadata["tokenizer.ggml.eot_token_id"] == 3


def _change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    path.write_text(json.dumps(tokenizer))


def test_unknown_rules_are_named_and_can_be_forced(tmp_path: Path) -> None:
    write_llama(tmp_path, byte_level(r"\p{L}{1,5}|\s+|[^\s\p{L}]+"))
    with pytest.raises(UnsupportedError, match=r"\\p\{L\}\{1,5\}.*--pre"):
        convert_model(tmp_path, tmp_path / "m.gguf")
    assert convert_model(tmp_path, tmp_path / "m.gguf", pre="qwen2").metadata["tokenizer.ggml.pre"] == "qwen2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(type="WordPiece"), "WordPiece model: only BPE"),
        (lambda t: t["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix = '</w>'"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizes text by Lowercase"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace.*no equivalent"),
    ],
)
def test_other_kinds_are_refused(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    write_llama(tmp_path)
    _change_tokenizer(tmp_path, change)
    with pytest.raises(UnsupportedError, match=message):
        convert_model(tmp_path, tmp_path / "m.gguf")


def test_an_id_out_of_all_bounds(tmp_path: Path) -> None:
    write_llama(tmp_path)
    _change_tokenizer(tmp_path, lambda t: t["model"]["vocab"].update({"far": 10**12}))
    with pytest.raises(DataError, match="has the id 1000000000000"):
        convert_model(tmp_path, tmp_path / "m.gguf")


def test_a_pre_tokenizer_cannot_be_forced_on_sentencepiece(tmp_path: Path) -> None:
    write_llama(tmp_path, sentencepiece())
    with pytest.raises(ConfigError, match="pre is for byte-level tokenizers"):
        convert_model(tmp_path, tmp_path / "m.gguf", pre="qwen2")


def test_incomplete_merges_are_said(tmp_path: Path) -> None:
    """Where a pair that makes a token is no merge, SentencePiece (and llama.cpp) would join it and tokenizers would not."""
    write_llama(tmp_path, sentencepiece())
    _change_tokenizer(tmp_path, lambda t: t["model"]["merges"].remove(["▁", "t"]))
    assert any("'▁' + 't'" in notice for notice in convert_model(tmp_path, tmp_path / "m.gguf").notices)
