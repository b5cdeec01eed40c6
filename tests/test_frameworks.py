"""Frameworks that run llama-cpp-python, with gearcpp.Llama in its place: docs/python.md says which. Those that are not installed are skipped."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from chat_models import write_chat_model

import gearcpp
from gearcpp import Llama

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}}


def need(module: str) -> Any:
    """A module, or a skip that names it."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{module} is not installed")
    return importlib.import_module(module)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "chat.gguf")


@pytest.fixture(autouse=True)
def in_the_parents_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(llama_cpp, "Llama", gearcpp.Llama)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def test_langchain(chat_model: Path) -> None:
    need("langchain_community")
    from langchain_community.chat_models import ChatLlamaCpp
    from langchain_community.embeddings import LlamaCppEmbeddings
    from langchain_community.llms import LlamaCpp

    given = {"model_path": str(chat_model), "n_ctx": 512, "n_threads": 1, "verbose": False}
    with pytest.warns(UserWarning, match="f16_kv"):
        chat = ChatLlamaCpp(max_tokens=4, temperature=0, **given)
    assert isinstance(chat.client, Llama) and chat.client.n_threads_batch == 1
    assert chat.invoke("One").content
    assert "".join(str(piece.content) for piece in chat.stream("One"))
    assert chat.bind_tools([TOOL], tool_choice=TOOL).invoke("One").tool_calls is not None
    with pytest.warns(UserWarning, match="f16_kv"):
        text = LlamaCpp(max_tokens=4, grammar='root ::= "yes" | "no"', **given)
    assert isinstance(text.client, Llama)
    assert text.invoke("One") in ("yes", "no") and text.get_num_tokens("One") > 0
    with pytest.warns(UserWarning, match="device"):
        embeddings = LlamaCppEmbeddings(n_batch=64, **given)
    assert len(embeddings.embed_query("One")) == gearcpp.read_model_info(chat_model).n_embd


def test_llama_index(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = need("llama_index.llms.llama_cpp.base")
    monkeypatch.setattr(module, "Llama", gearcpp.Llama)
    llm = module.LlamaCPP(model_path=str(chat_model), context_window=512, max_new_tokens=4, model_kwargs={"n_threads": 1}, verbose=False)
    assert isinstance(llm.complete("One").text, str)
    assert "".join(piece.delta for piece in llm.stream_complete("One"))
    message = importlib.import_module("llama_index.core.llms").ChatMessage(role="user", content="One")
    assert isinstance(llm.chat([message]).message.content, str)


def test_haystack(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "haystack_integrations.components.generators.llama_cpp"
    need(name)
    given = {"model": str(chat_model), "n_ctx": 512, "n_batch": 64, "model_kwargs": {"n_threads": 1, "verbose": False}}
    message = importlib.import_module("haystack.dataclasses").ChatMessage.from_user("One")
    module = importlib.import_module(f"{name}.chat.chat_generator")
    monkeypatch.setattr(module, "Llama", gearcpp.Llama)
    chat = module.LlamaCppChatGenerator(generation_kwargs={"max_tokens": 4}, **given)
    assert chat.run([message])["replies"][0].text
    assert isinstance(chat._model, Llama)
    chat.close()


def test_llm(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = need("llm_llama_cpp")
    monkeypatch.setattr(module, "Llama", gearcpp.Llama)
    model = module.LlamaModel("chat", str(chat_model))
    assert model.prompt("One", n_ctx=512, max_tokens=4).text()


def test_guidance(chat_model: Path) -> None:
    guidance = need("guidance")
    llm = Llama(chat_model, n_ctx=512, n_threads=1, logits_all=True, verbose=False)
    for _ in range(2):  # the second goes back to a prefix, by llama_memory_seq_rm
        program = guidance.models.LlamaCpp(llm, echo=False) + "One " + guidance.select(["two", "three"], name="next")
        assert program["next"] in ("two", "three")
    llm.close()


def test_outlines(chat_model: Path) -> None:
    outlines = need("outlines")
    need("numba")  # outlines_core needs it for llama.cpp, and does not say so
    from typing import Literal

    llm = Llama(chat_model, n_ctx=512, n_threads=1, verbose=False)
    assert outlines.from_llamacpp(llm)("One", Literal["two", "three"], max_tokens=8) in ("two", "three")
    llm.close()


def test_instructor(chat_model: Path) -> None:
    instructor = need("instructor")
    from pydantic import BaseModel

    class Look(BaseModel):
        x: int

    llm = Llama(chat_model, n_ctx=2048, n_threads=1, verbose=False)
    create = instructor.patch(create=llm.create_chat_completion_openai_v1, mode=instructor.Mode.JSON_SCHEMA)
    answer = create(messages=[{"role": "user", "content": "One"}], response_model=Look, max_tokens=64, temperature=0, max_retries=1)
    assert isinstance(answer.x, int)
    llm.close()


def test_the_skips_are_for_want_of_a_module() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"no_such_module\.part is not installed"):
        need("no_such_module.part")
    assert need("json") is sys.modules["json"]
