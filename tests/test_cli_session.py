"""gearcpp.cli._session: a conversation survives the disk, and nothing else does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_models import write_chat_model
from models import Shape

from gearcpp import DataError, GearError, Llama
from gearcpp.cli._conversation import Conversation, Sampling
from gearcpp.cli._session import load_session, save_session

GREEDY = Sampling(temp=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return write_chat_model(folder / "chat.gguf")


@pytest.fixture(scope="module", params=["gear3", "f16"])
def llm(model: Path, request: pytest.FixtureRequest) -> Iterator[Llama]:
    llm = Llama(str(model), kv_type=request.param, flash_attn=True, n_ctx=512, n_batch=64, verbose=False)
    yield llm
    llm.close()


@pytest.fixture
def conversation(llm: Llama) -> Conversation:
    conversation = Conversation(llm, system="Be brief.", sampling=GREEDY, n_predict=20)
    "".join(conversation.ask("A question of some length, " * 8))
    return conversation


def test_a_loaded_conversation_goes_on_as_if_nothing_had_happened(llm: Llama, conversation: Conversation, folder: Path) -> None:
    path = folder / "one.gear"
    n_bytes = save_session(path, llm, conversation.dialogue)
    assert path.stat().st_size == n_bytes
    cached = llm.input_ids[: llm.n_tokens].tolist()

    llm.reset()
    other = Conversation(llm, system="Be brief.", sampling=GREEDY, n_predict=20)
    "".join(other.ask("Something else"))
    other.dialogue = load_session(path, llm)
    assert other.dialogue == conversation.dialogue
    assert llm.input_ids[: llm.n_tokens].tolist() == cached
    n_new = len(llm.tokenize(b"\nuser: Two\nassistant: ", add_bos=False))
    assert len("".join(other.ask("Two"))) > 0
    assert other.timing.n_prompt == n_new + len(conversation.dialogue.tokens) - len(cached)
    assert other.dialogue.messages[: len(conversation.dialogue.messages)] == conversation.dialogue.messages


def test_regenerate_works_after_loading(model: Path, folder: Path) -> None:
    llm = Llama(str(model), kv_type="f16", flash_attn=True, n_ctx=512, n_batch=64, verbose=False)  # exact: the next logits are those before
    try:
        conversation = Conversation(llm, sampling=GREEDY, n_predict=20)
        said = "".join(conversation.ask("One"))
        save_session(folder / "two.gear", llm, conversation.dialogue)
        conversation.dialogue = load_session(folder / "two.gear", llm)
        assert "".join(conversation.regenerate()) == said
    finally:
        llm.close()


def test_damaged_files_are_refused_and_change_nothing(llm: Llama, conversation: Conversation, folder: Path) -> None:
    """All kinds of damage: test_sessions.py."""
    path = folder / "damaged.gear"
    save_session(path, llm, conversation.dialogue)
    data = path.read_bytes()
    cached = llm.input_ids[: llm.n_tokens].tolist()
    middle = len(data) // 2
    for content, reason in (
        (b"", "not a gearcpp session"),
        (data[:30], "cut off"),
        (data[:-1], "cut off"),
        (data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], "damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            load_session(path, llm)
    llm.save_session(path)
    with pytest.raises(DataError, match="holds a context, but no conversation"):
        load_session(path, llm)
    llm.save_session(path, {"dialogue": {"said": 1}})
    with pytest.raises(DataError, match="holds a context, but no conversation"):
        load_session(path, llm)
    assert llm.input_ids[: llm.n_tokens].tolist() == cached


def test_a_missing_file_is_named(llm: Llama, folder: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.gear: No such file"):
        load_session(folder / "absent.gear", llm)


def test_sessions_of_another_model_or_cache_are_refused(llm: Llama, conversation: Conversation, model: Path, folder: Path) -> None:
    path = folder / "mine.gear"
    save_session(path, llm, conversation.dialogue)
    stranger = write_chat_model(folder / "stranger.gguf", shape=Shape(n_layer=1, seed=2))
    for other_model, other_kv, n_ctx, reason in (
        (stranger, llm.kv_type, 512, r"another model \(chat\.gguf\)"),
        (model, "gear2", 512, f"kv_type='{llm.kv_type.name}'"),
        (model, llm.kv_type, 256, "room for 256"),
    ):
        other = Llama(str(other_model), kv_type=other_kv, flash_attn=True, n_ctx=n_ctx, n_batch=64, verbose=False)
        try:
            with pytest.raises(DataError, match=reason):
                load_session(path, other)
        finally:
            other.close()


def test_a_failed_save_keeps_the_old_file(llm: Llama, conversation: Conversation, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "kept.gear"
    save_session(path, llm, conversation.dialogue)
    before, names = path.read_bytes(), sorted(os.listdir(folder))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GearError, match=r"kept\.gear: No space left"):
        save_session(path, llm, conversation.dialogue)
    assert path.read_bytes() == before
    assert sorted(os.listdir(folder)) == names
    with pytest.raises(GearError, match="No such file or directory"):
        save_session(folder / "absent" / "a.gear", llm, conversation.dialogue)
