"""What is asked for is done or refused: arguments, messages, sampling parameters and files, as programs for llama-cpp-python give them."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from chat_models import write_chat_model
from llama_cpp import LlamaGrammar, LogitsProcessorList
from models import write_lora

import gearcpp
from gearcpp import BusyError, ConfigError, DataError, GearError, Llama
from gearcpp.runtime.asked import check_sampling, chosen_tools, plain_messages, plain_response_format

RandomModel = Callable[..., Path]
SMALL = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}}
OTHER = {"type": "function", "function": {"name": "listen", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "chat.gguf")


# ---------------------------------------------------------------------------------------------------------------------------------------------
# In the parent's place
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_arguments_of_the_past_are_taken_with_one_warning(random_model: RandomModel) -> None:
    with pytest.warns(UserWarning, match="n_parts, f16_kv") as caught:
        llm = Llama(str(random_model()), n_parts=-1, f16_kv=True, **SMALL)
    assert len([w for w in caught if "ignored" in str(w.message)]) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pickle.loads(pickle.dumps(llm)).close()
    llm.close()


def test_unknown_arguments_are_errors_in_one_line_unless_it_is_lenient(random_model: RandomModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'n_bacth' \(did you mean 'n_batch'"):
        Llama(str(random_model()), n_bacth=5, **SMALL)
    with pytest.raises(ConfigError, match="lenient") as error:
        Llama(str(random_model()), colour="red", **SMALL)
    assert len(str(error.value)) < 150
    monkeypatch.setattr(Llama, "lenient", True)
    with pytest.warns(UserWarning, match="colour"):
        Llama(str(random_model()), colour="red", **SMALL).close()
    monkeypatch.setattr(Llama, "lenient", False)
    monkeypatch.setenv("GEARCPP_LENIENT", "1")
    with pytest.warns(UserWarning, match="colour"):
        Llama(str(random_model()), colour="red", **SMALL).close()


def test_an_unknown_argument_that_is_none_asks_for_nothing(random_model: RandomModel) -> None:
    """As LangChain's LlamaCppEmbeddings gives ``device``."""
    with pytest.warns(UserWarning, match="device"):
        Llama(str(random_model()), device=None, **SMALL).close()
    with pytest.raises(ConfigError, match="'device'"):
        Llama(str(random_model()), device="cuda", **SMALL)


def test_another_base_of_rope_is_a_warning(random_model: RandomModel) -> None:
    """LangChain's ChatLlamaCpp gives 10000 for every model."""
    path = random_model()
    own = gearcpp.read_model_info(path).rope_freq_base
    with pytest.warns(UserWarning, match=f"rope_freq_base=5 takes the place of the model's own {own:g}"):
        Llama(path, rope_freq_base=5.0, **SMALL).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for base in (0, own):
            Llama(path, rope_freq_base=base, **SMALL).close()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_paths_are_paths(random_model: RandomModel, tmp_path: Path) -> None:
    path = random_model()
    lora = write_lora(tmp_path / "lora.gguf")
    llm = Llama(path, lora_path=lora, **SMALL)
    llm.eval([5, 6, 7])
    assert llm.model_path == str(path)
    llm.close()


def test_a_lora_that_cannot_be_used_is_an_error(random_model: RandomModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no LoRA file"):
        Llama(random_model(), lora_path="no-such-file.gguf", **SMALL)
    damaged = tmp_path / "lora.gguf"
    damaged.write_bytes(b"GGUF" + bytes(60))
    for kv_type in ("gear", "f16"):
        with pytest.raises(GearError, match="LoRA"):
            Llama(random_model(), kv_type=kv_type, lora_path=str(damaged), **SMALL)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_scale": 0.5}, "lora_scale"),
        ({"lora_base": "x.gguf"}, "lora_base"),
        ({"n_ctx": 2**31}, f"from 0 to {2**31 - 256}"),
        ({"n_threads": -2}, "n_threads"),
        ({"chat_format": "chatlm"}, "did you mean .*chatml"),
        ({"pooling_type": 1}, "embedding=True"),
        ({"spm_infill": True}, "spm_infill"),
    ],
)
def test_arguments_that_nothing_could_follow(random_model: RandomModel, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Llama(random_model(), **{**SMALL, **given})


def test_without_a_seed_objects_answer_differently_and_with_one_alike(random_model: RandomModel) -> None:
    def answer(**seed: Any) -> Any:
        llm = Llama(random_model(), kv_type="f16", flash_attn=True, **SMALL, **seed)
        text = llm.create_completion([5, 6, 7], max_tokens=24, temperature=1.5, top_k=0, min_p=0.0)["choices"][0]["text"]
        llm.close()
        return text

    assert len({answer() for _ in range(3)}) == 3
    assert len({answer(seed=-1) for _ in range(2)}) == 2
    for seed in (0, 7):
        assert answer(seed=seed) == answer(seed=seed)
    assert answer(seed=0) != answer(seed=7)


def test_no_warnings_of_llama_cpp_unless_verbose(random_model: RandomModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = random_model()
    Llama(path, lora_path=write_lora(tmp_path / "lora.gguf"), **SMALL).close()
    Llama(random_model("gemma3"), swa_full=True, **SMALL).close()
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repeat_penalty": "x"},
        {"repeat_penalty": 0},
        {"mirostat_mode": 3},
        {"tfs_z": 0.5},
    ],
)
def test_sampling_parameters_out_of_range(chat_model: Path, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        check_sampling(wrong)
    llm = Llama(chat_model, **SMALL)
    with pytest.raises(ConfigError, match=name):
        llm.create_completion("One", max_tokens=1, **wrong)
    with pytest.raises(ConfigError, match=name):
        llm.create_chat_completion([{"role": "user", "content": "One"}], max_tokens=1, **wrong)
    with pytest.raises(ConfigError, match="suffix"):
        llm("One", suffix="two")
    llm.close()


def test_content_in_parts_and_the_role_developer() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain_messages([{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]) == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "a\nb"},
    ]
    call = {"role": "assistant", "tool_calls": []}
    assert plain_messages([call, {"role": "assistant", "content": None}]) == [call, {"role": "assistant", "content": None}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hello", "at least one"),
        ([1], "messages.0 must be an object"),
        ([{"role": "wizard", "content": "x"}], "messages.0.role must be one of"),
        ([{"role": "user"}], "messages.0.content is missing"),
        ([{"role": "user", "content": 5}], "messages.0.content must be"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text must be a text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "images"),
        ([{"role": "user", "content": ["x"]}], "messages.0.content.0"),
    ],
)
def test_messages_that_no_template_takes(messages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        plain_messages(messages)
    assert len(str(error.value)) < 160


def test_tools_are_chosen_or_refused(chat_model: Path) -> None:
    named = {"type": "function", "function": {"name": "look"}}
    assert chosen_tools([TOOL], "required") == ([TOOL], named)
    assert chosen_tools([TOOL, OTHER], named) == ([TOOL, OTHER], named)
    assert chosen_tools([TOOL], "none") == (None, None)
    assert chosen_tools([TOOL], "auto") == ([TOOL], "auto")
    for tools, choice in (([TOOL, OTHER], "required"), (None, "required"), ([OTHER], named), ([TOOL], "maybe"), ([TOOL], {})):
        with pytest.raises(ConfigError, match="tool_choice"):
            chosen_tools(tools, choice)
    llm = Llama(chat_model, **SMALL)
    answer = llm.create_chat_completion([{"role": "user", "content": "One"}], tools=[TOOL], tool_choice="required", max_tokens=8, temperature=0)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "look" and call["function"]["arguments"].startswith("{")
    llm.close()


def test_response_formats_are_followed_or_refused() -> None:
    schema = {"type": "object"}
    assert plain_response_format({"type": "json_schema", "json_schema": {"schema": schema}}) == {"type": "json_object", "schema": schema}
    assert plain_response_format({"type": "text"}) == {"type": "text"} and plain_response_format(None) is None
    for wrong in ({"type": "xml"}, {"type": "json_schema"}, "json", {}):
        with pytest.raises(ConfigError, match="response_format"):
            plain_response_format(wrong)


def test_an_empty_text_to_embed(random_model: RandomModel) -> None:
    """models.py's vocabulary of bytes puts no token before a text if it is told not to."""
    llm = Llama(random_model(), kv_type="f16", embedding=True, kv_overrides={"tokenizer.ggml.add_bos_token": False}, **SMALL)
    assert llm.embed("hello")
    for given, number in (("", 0), (["hello", ""], 1)):
        with pytest.raises(ConfigError, match=f"text {number} to embed is empty"):
            llm.embed(given)
    with pytest.raises(ConfigError, match="nothing to embed"):
        llm.embed([])
    with pytest.warns(UserWarning, match="only the first 256 count"):
        llm.embed("x" * 300)
    llm.close()


def test_chat_templates_that_refuse_are_damaged_or_missing(tmp_path: Path, random_model: RandomModel) -> None:
    message = [{"role": "system", "content": "One"}]
    refuses = write_chat_model(tmp_path / "refuses.gguf", "{{ raise_exception('System role not supported') }}")
    llm = Llama(refuses, **SMALL)
    with pytest.raises(ValueError, match="System role not supported"):
        llm.create_chat_completion(message, max_tokens=1)
    llm.close()
    with pytest.raises(DataError, match=r"the chat template of damaged.gguf cannot be read: unexpected end of template"):
        Llama(write_chat_model(tmp_path / "damaged.gguf", "{% for m in messages"), **SMALL)
    llm = Llama(random_model(), **SMALL)
    with pytest.warns(UserWarning, match="has no chat template"):
        llm.create_chat_completion(message, max_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it was said once
        llm.create_chat_completion(message, max_tokens=1)
        named = Llama(random_model(), chat_format="chatml", **SMALL)
        named.create_chat_completion(message, max_tokens=1)
    named.close()
    llm.close()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# What constrains an answer
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_grammars_that_llama_cpp_cannot_read_are_errors(chat_model: Path) -> None:
    """The parent crashes on the first, and takes any JSON for the schemas."""
    llm = Llama(chat_model, **SMALL)
    for wrong, message in ((LlamaGrammar.from_string("root ::= other"), "cannot read the grammar"), ('root ::= "a"', "must be a llama_cpp.LlamaGrammar")):
        with pytest.raises(ConfigError, match=message):
            llm("One", max_tokens=1, grammar=wrong)
        llm.eval([5])
        with pytest.raises(ConfigError, match=message):
            llm.sample(grammar=wrong)
    message = [{"role": "user", "content": "One"}]
    for schema in ({"type": "nonsense"}, {"$ref": "#/definitions/none"}):
        with pytest.raises(ConfigError, match="no grammar can be made of the schema of response_format"):
            llm.create_chat_completion(message, max_tokens=1, response_format={"type": "json_object", "schema": schema})
        tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
        with pytest.raises(ConfigError, match="no grammar can be made of the schema of the tool 'look'"):
            llm.create_chat_completion(message, max_tokens=1, tools=[tool], tool_choice="required")
    with pytest.raises(ConfigError, match="one grammar, but there are several: response_format, the tool 'look'"):
        llm.create_chat_completion(message, max_tokens=1, tools=[TOOL], tool_choice="required", response_format={"type": "json_object"})
    ends = llm("One", max_tokens=16, grammar=LlamaGrammar.from_string('root ::= "{" "}"'))["choices"][0]
    assert (ends["text"], ends["finish_reason"]) == ("{}", "stop")
    llm.close()


def test_an_error_of_a_logits_processor_is_raised(chat_model: Path) -> None:
    """Through C it would be printed, and the answer would go on without the processor."""
    llm = Llama(chat_model, **SMALL)

    def fails(input_ids: Any, logits: Any) -> Any:
        raise ZeroDivisionError("a processor")

    def five(input_ids: Any, logits: Any) -> Any:
        logits[:] = -1e9
        logits[70] = 0
        return logits

    for wrong in (LogitsProcessorList([fails]), LogitsProcessorList([five, fails])):
        with pytest.raises(ZeroDivisionError, match="a processor"):
            llm("One", max_tokens=4, logits_processor=wrong)
        llm.eval([5])
        with pytest.raises(ZeroDivisionError, match="a processor"):
            llm.sample(logits_processor=wrong)
    tokens = llm.generate([5, 6], logits_processor=LogitsProcessorList([five]), temp=0)
    assert [next(tokens) for _ in range(3)] == [70] * 3
    tokens.close()
    assert llm.sample(logits_processor=LogitsProcessorList([five]), temp=0) == 70  # not with the sampler of the answer before
    llm.close()


def test_biases_and_logits_processors_both_count(chat_model: Path) -> None:
    """The parent uses neither where both are given."""
    llm = Llama(chat_model, logits_all=True, **SMALL)

    def only_two(input_ids: Any, logits: Any) -> Any:
        kept = logits.copy()
        kept[:] = -1e9
        kept[[70, 71]] = 0, 1
        return kept

    def token(**given: Any) -> int:
        llm("One", max_tokens=1, temperature=0, **given)
        return llm._turns.tokens[-1]

    both = LogitsProcessorList([only_two])
    assert token(logits_processor=both) == 71
    assert token(logits_processor=both, logit_bias={"70": 5}) == 70
    assert token(logit_bias={72: 1e6}) == 72
    assert len(both) == 1
    llm.create_chat_completion([{"role": "user", "content": "One"}], max_tokens=1, temperature=0, logit_bias={70: 5}, logits_processor=both)
    assert llm._turns.tokens[-1] == 70
    for wrong in ({-1: 5}, {llm.n_vocab(): 5}, {"a": 5}, {70: "b"}, {70: float("nan")}, [70]):
        with pytest.raises(ConfigError, match="logit_bias"):
            token(logit_bias=wrong)
    for wrong_sampling in ({"temp": -1}, {"tfs_z": 0.5}, {"penalize_nl": False}):
        (name,) = wrong_sampling
        with pytest.raises(ConfigError, match=name):
            llm.generate([5], **wrong_sampling)
        llm.eval([5])
        with pytest.raises(ConfigError, match=name):
            llm.sample(**wrong_sampling)
    llm.close()


def test_log_probabilities_are_given_or_refused(chat_model: Path) -> None:
    llm = Llama(chat_model, logits_all=True, **SMALL)
    message = [{"role": "user", "content": "One"}]
    for top in (None, 0, 2):
        answer = llm.create_chat_completion(message, max_tokens=2, logprobs=True, top_logprobs=top, temperature=0)
        (first, *_) = answer["choices"][0]["logprobs"]["content"]
        assert first["logprob"] < 0 and len(first["top_logprobs"]) >= (top or 0)
    assert llm.create_chat_completion(message, max_tokens=2)["choices"][0]["logprobs"] is None
    for wrong in ({"top_logprobs": 2}, {"logprobs": True, "top_logprobs": -1}, {"logprobs": True, "top_logprobs": "2"}):
        with pytest.raises(ConfigError, match="top_logprobs"):
            llm.create_chat_completion(message, max_tokens=2, **wrong)
    llm.close()


@pytest.mark.parametrize("bos", [True, False])
def test_log_probabilities_of_an_echoed_prompt_are_those_of_its_tokens(chat_model: Path, bos: bool) -> None:
    """Without BOS the parent gives each token what was predicted after it."""
    llm = Llama(chat_model, logits_all=True, kv_overrides={"tokenizer.ggml.add_bos_token": bos}, **SMALL)
    logprobs = llm("One two", max_tokens=3, echo=True, logprobs=2, temperature=0)["choices"][0]["logprobs"]
    tokens = [int(token) for token in llm.input_ids[: llm.n_tokens]] + llm._turns.tokens[-1:]
    rows = llama_cpp.Llama.logits_to_logprobs(llm.scores[: len(tokens)])
    wanted = [rows[i - 1][token] for i, token in enumerate(tokens) if i][int(bos) :]  # the first token that is shown has none
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(wanted)
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(wanted) + 1
    for value, token, top in list(zip(logprobs["token_logprobs"], logprobs["tokens"], logprobs["top_logprobs"], strict=True))[1:]:
        assert top[token] == pytest.approx(value) and max(top.values()) <= 0
    llm.close()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Several answers of one Llama
# ---------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", ["gear", "f16"])
def test_threads_that_share_a_llama_wait_for_each_other(chat_model: Path, kv_type: str) -> None:
    llm = Llama(chat_model, kv_type=kv_type, flash_attn=True, **{**SMALL, "n_ctx": 512})
    prompts = [f"{word} and some words" for word in ("One", "Two", "Three", "Four")] * 2

    def answer(prompt: str) -> str:
        return llm(prompt, max_tokens=12, temperature=0)["choices"][0]["text"]

    def alone(prompt: str) -> str:
        llm.reset()
        return answer(prompt)

    def fresh(prompt: str) -> str:
        with llm._turns.answer():
            return alone(prompt)

    wanted = [alone(prompt) for prompt in prompts]
    assert len(set(wanted)) == 4
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(fresh, prompts)) == wanted
        assert all(threads.map(answer, prompts))
    llm.close()


def test_an_answer_that_another_one_overtakes_ends_with_an_error(chat_model: Path) -> None:
    llm = Llama(chat_model, **SMALL)
    early = llm.generate([5, 6, 7], temp=0)
    next(early)
    whole = llm("Two", max_tokens=8, temperature=0)["choices"][0]["text"]
    with pytest.raises(BusyError, match="another answer was begun"):
        next(early)
    llm.reset()
    assert llm("Two", max_tokens=8, temperature=0)["choices"][0]["text"] == whole
    abandoned = llm("One", max_tokens=8, stream=True)
    next(abandoned)
    abandoned.close()
    tokens = llm.generate([5, 6, 7], temp=0)
    assert next(tokens) is not None
    with pytest.raises(ConfigError, match="logits_all"):  # the parent's process ends here
        tokens.send([8])
    llm.close()
