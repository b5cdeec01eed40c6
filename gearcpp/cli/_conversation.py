"""A conversation with one model: the messages, what of them the KV cache holds, and the answer as a stream of text.

It knows neither a terminal nor a command line. What the cache holds is `Llama.input_ids[: Llama.n_tokens]`; a new prompt keeps what both have in common at
their start and evaluates the rest.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from gearcpp.errors import ConfigError, GearError, UnsupportedError

if TYPE_CHECKING:
    from gearcpp import Llama

PLAIN_ANSWER = 256  # tokens of an answer from a model that has no chat template, which seldom ends by itself


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the keyword arguments of `llama_cpp.Llama.generate`."""

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0


@dataclass
class Timing:
    """Tokens and seconds of one answer."""

    n_prompt: int = 0
    prompt_seconds: float = 0.0
    n_generated: int = 0
    generation_seconds: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens a second."""
        return self.n_prompt / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_rate(self) -> float:
        """Generated tokens a second."""
        return self.n_generated / self.generation_seconds if self.generation_seconds else 0.0


@dataclass
class Dialogue:
    """What was said and what of it is in the context: all that a saved conversation needs beside the KV cache.

    Attributes:
        messages: role and content of each, oldest first, the system prompt among them.
        text: what the chat template made of the messages, the last answer included; "" without a template.
        tokens: the context, oldest first; after a shift without what was dropped.
        prompt: tokens before the last answer.
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as JSON can hold them."""
        return asdict(self)


class Conversation:
    """Turns of a user and a model.

    Args:
        llm: the model, whose KV cache this conversation owns.
        system: system prompt, or None.
        sampling: how tokens are chosen.
        seed: of the sampling; the same seed and messages give the same answers.
        n_predict: most tokens of an answer, -1 for no limit; None: no limit, or `PLAIN_ANSWER` without a chat template.
        plain: continue text even if the model has a chat template.
        stopped: asked between tokens, and within a long prompt, whether the answer should end here.
        on_shift: told how many of the oldest tokens a full context has just lost.
    """

    def __init__(
        self,
        llm: Llama,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        n_predict: int | None = None,
        plain: bool = False,
        stopped: Callable[[], bool] = lambda: False,
        on_shift: Callable[[int], None] = lambda n: None,
    ) -> None:
        import llama_cpp

        self.llm = llm
        self.system = system
        self.sampling = sampling or Sampling()
        self.stopped = stopped
        self.on_shift = on_shift
        self.timing = Timing()
        self._vocab = llama_cpp.llama_model_get_vocab(llm.model)
        self._template = None if plain or not llm.has_chat_template else _chat_template(llm)
        self.seed = seed
        self._random = random.Random(seed)
        self.n_predict = n_predict if n_predict is not None else -1 if self._template else PLAIN_ANSWER
        self.dialogue = self._start()
        self._n_keep = self._count_kept()

    @property
    def has_template(self) -> bool:
        """Whether messages go through a chat template; otherwise the model continues the text as it stands."""
        return self._template is not None

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.dialogue = self._start()

    def ask(self, text: str) -> Iterator[str]:
        """The answer to the user's next message, piece by piece."""
        before = self.dialogue
        messages = [*before.messages, {"role": "user", "content": text}]
        if self._template:
            rendered = self._template(messages)
            # What the cache holds was sampled token by token: only the text after it is tokenized, for the same text can be cut into other tokens.
            # A template that changes earlier messages (dropping thoughts, say) makes another text, which is then tokenized as a whole.
            continues = bool(before.text) and rendered.startswith(before.text)
            tokens = before.tokens + self._tokenize(rendered[len(before.text) :]) if continues else self._tokenize_start(rendered)
        else:
            rendered = ""
            is_new_line = not before.messages or before.messages[-1]["content"].endswith("\n")
            tokens = before.tokens + self._tokenize(text if is_new_line else "\n" + text, special=False)
        return self._answer(Dialogue(messages, rendered, tokens, list(tokens)))

    def regenerate(self) -> Iterator[str]:
        """Another answer to the user's last message.

        Raises:
            ConfigError: there was no answer yet.
        """
        last = self.dialogue
        if not last.messages or last.messages[-1]["role"] != "assistant":
            raise ConfigError("there is no answer yet to make again")
        text = last.text[: len(last.text) - len(last.messages[-1]["content"])]
        return self._answer(Dialogue(last.messages[:-1], text, list(last.prompt), last.prompt))

    def _start(self) -> Dialogue:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        return Dialogue(messages, "", [] if self._template else self._tokenize_start(self.system or "", special=False))

    def _count_kept(self) -> int:
        """Tokens that a shift must keep: what any two conversations under this system prompt have in common."""
        if not self._template:
            kept = len(self.dialogue.tokens)
        else:
            one, other = (self._tokenize_start(self._template([*self.dialogue.messages, {"role": "user", "content": word}])) for word in ("a", "1"))
            kept = common_prefix(one, other)
        if kept > self.llm.n_ctx() // 2:
            raise ConfigError(f"the system prompt takes {kept} of the context's {self.llm.n_ctx()} tokens: use a larger -c")
        return kept

    def _answer(self, dialogue: Dialogue) -> Iterator[str]:
        """Evaluate the dialogue's tokens, then yield what the model says; the dialogue holds it afterwards, however this ends."""
        self.dialogue = dialogue
        self.timing = timing = Timing()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        said = ""
        try:
            if not self._evaluate(dialogue):
                return
            start = time.perf_counter()
            for token in self._sample(dialogue):
                timing.n_generated += 1
                timing.generation_seconds = time.perf_counter() - start
                if piece := decoder.decode(self._piece(token)):
                    said += piece
                    yield piece
            if piece := decoder.decode(b"", final=True):
                said += piece
                yield piece
        finally:
            dialogue.messages = [*dialogue.messages, {"role": "assistant", "content": said}]
            dialogue.text += said

    def _sample(self, dialogue: Dialogue) -> Iterator[int]:
        """Tokens until the model ends, the limit is reached, or it is told to stop. Each is in dialogue.tokens before it is yielded."""
        n_left = self.n_predict
        while n_left != 0:
            self.llm.set_seed(self._random.getrandbits(31))
            for token in self.llm.generate(dialogue.tokens, **asdict(self.sampling)):
                if self.stopped() or self._is_end(token):
                    return
                n_left -= 1
                dialogue.tokens.append(token)
                yield token
                if n_left == 0 or len(dialogue.tokens) >= self.llm.n_ctx():
                    break
            if n_left != 0 and not self._evaluate(dialogue):
                return

    def _evaluate(self, dialogue: Dialogue) -> bool:
        """Make the cache hold the dialogue's tokens, and the logits be those after the last one. False when told to stop on the way."""
        start = time.perf_counter()
        dialogue.tokens = self._make_room(dialogue.tokens)
        n_cached = min(common_prefix(self.llm.input_ids[: self.llm.n_tokens].tolist(), dialogue.tokens), len(dialogue.tokens) - 1)
        self._truncate(n_cached)
        rest = dialogue.tokens[self.llm.n_tokens :]
        with _abort_when(self.llm, self.stopped):
            for first in range(0, len(rest), self.llm.n_batch):
                try:
                    self.llm.eval(rest[first : first + self.llm.n_batch])
                except Exception:
                    if self.stopped():  # the abort callback made llama.cpp fail
                        return False
                    raise
        self.timing.n_prompt += len(rest)
        self.timing.prompt_seconds += time.perf_counter() - start
        return not self.stopped()

    def _make_room(self, tokens: list[int]) -> list[int]:
        """The tokens without the oldest half, as often as it takes for them and one more to fit; in the cache the rest moves up."""
        while len(tokens) >= self.llm.n_ctx():
            n_drop = (len(tokens) - self._n_keep) // 2
            end = self._n_keep + n_drop
            if common_prefix(self.llm.input_ids[: self.llm.n_tokens].tolist(), tokens) > end:
                self._truncate(common_prefix(self.llm.input_ids[: self.llm.n_tokens].tolist(), tokens))
                with contextlib.suppress(UnsupportedError):  # then what is left is evaluated again
                    self.llm.shift_context(self._n_keep, n_drop)
            tokens = tokens[: self._n_keep] + tokens[end:]
            self.on_shift(n_drop)
        return tokens

    def _truncate(self, n_tokens: int) -> None:
        """Drop what the cache holds after its first n_tokens; all of it, where the model's memory cannot be cut (recurrent models)."""
        if n_tokens == self.llm.n_tokens:
            return
        if not self.llm._ctx.kv_cache_seq_rm(0, n_tokens, -1):
            self.llm.reset()
        else:
            self.llm.n_tokens = n_tokens

    def _tokenize(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
        return self.llm.tokenize(text.encode("utf-8", "replace"), add_bos=add_bos, special=special)

    def _tokenize_start(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text at the start of the context. Many templates write the BOS token themselves; it must not come twice."""
        bos = _text_of(self.llm, self.llm.token_bos())
        return self._tokenize(text, add_bos=not (special and bos and text.startswith(bos)), special=special)

    def _is_end(self, token: int) -> bool:
        import llama_cpp

        return llama_cpp.llama_vocab_is_eog(self._vocab, token)

    def _piece(self, token: int) -> bytes:
        """Bytes of a token. Not by `Llama.detokenize`, which loses tokens of more than 32 bytes."""
        import llama_cpp

        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many elements two sequences have in common from their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _chat_template(llm: Llama) -> Callable[[list[dict[str, str]]], str]:
    """The model's own template as a function of the messages; its result ends where the answer begins."""
    from jinja2 import TemplateError
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    def render(messages: list[dict[str, str]]) -> str:
        try:
            formatter = Jinja2ChatFormatter(llm.metadata["tokenizer.chat_template"], _text_of(llm, llm.token_eos()), _text_of(llm, llm.token_bos()))
            return formatter(messages=messages).prompt  # type: ignore[arg-type]  # its TypedDicts are those of OpenAI's API
        except (TemplateError, ValueError, TypeError) as error:
            hint = "; try without -sys" if messages[0]["role"] == "system" else ""
            raise GearError(f"the model's chat template refuses this conversation: {error}{hint}") from error

    return render


def _text_of(llm: Llama, token: int) -> str:
    """A special token as templates write it; "" for one that the vocabulary does not have."""
    return llm._model.token_get_text(token) if token != -1 else ""


@contextlib.contextmanager
def _abort_when(llm: Llama, stopped: Callable[[], bool]) -> Iterator[None]:
    """Let llama.cpp ask, between the operations of a step, whether to give up: a long prompt would otherwise not be interrupted for minutes.

    The callback is Python, called some hundred times a step; that is nothing beside a prompt, but would show in generation.
    """
    import llama_cpp

    callback = llama_cpp.ggml_abort_callback(lambda _: stopped())
    llama_cpp.llama_set_abort_callback(llm.ctx, callback, None)
    try:
        yield
    finally:
        llama_cpp.llama_set_abort_callback(llm.ctx, llama_cpp.ggml_abort_callback(), None)
