"""How the next token of one sequence is chosen, and what the model thought of it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._internals import LlamaSampler

from gearcpp.errors import ConfigError

if TYPE_CHECKING:
    from gearcpp.runtime.llama import Llama

Logits = npt.NDArray[np.float32]
# A logits processor of llama-cpp-python: (tokens so far, logits) -> logits.
Processor = Callable[[npt.NDArray[np.intc], Logits], Logits]

MOST_LOGPROBS = 20  # alternatives to a token that can be asked for, as in OpenAI's API


@dataclass(frozen=True)
class SamplerParams:
    """Parameters of the sampler chain, by the names of OpenAI's API and llama-cpp-python."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1


class Sampler:
    """A sampler chain of its own for each sequence, in the order of llama-cpp-python's.

    Args:
        llm: the model.
        sampling: parameters of the chain.
        seed: the same seed, prompt and parameters give the same tokens as long as the logits are the same.
        logit_bias: what to add to the logit of a token.
        grammar: a llama_cpp.LlamaGrammar that the text must follow, or None.
        processors: functions that change the logits before the chain sees them.

    Raises:
        ConfigError: llama.cpp does not understand the grammar, or a biased token does not exist.
    """

    def __init__(
        self,
        llm: Llama,
        sampling: SamplerParams,
        *,
        seed: int,
        logit_bias: Mapping[int, float] | None = None,
        grammar: Any = None,
        processors: Sequence[Processor] = (),
    ) -> None:
        self._n_vocab = llm.n_vocab()
        self._processors = list(processors)
        self._chain = chain = LlamaSampler()
        s = sampling
        if logit_bias:
            if unknown := [token for token in logit_bias if not 0 <= token < self._n_vocab]:
                raise ConfigError(f"logit_bias names token {unknown[0]}; this model has tokens 0 to {self._n_vocab - 1}")
            chain.add_logit_bias(self._n_vocab, dict(logit_bias))
        chain.add_penalties(self._n_vocab, llm.last_n_tokens_size, s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
        if grammar is not None:
            self._add_grammar(llm, grammar)
        if s.temperature <= 0:
            chain.add_greedy()
        elif s.mirostat_mode == 1:
            chain.add_mirostat(self._n_vocab, seed, s.mirostat_tau, s.mirostat_eta, 100)
        elif s.mirostat_mode == 2:
            chain.add_mirostat_v2(seed, s.mirostat_tau, s.mirostat_eta)
        else:
            chain.add_top_k(s.top_k)
            chain.add_typical(s.typical_p)
            chain.add_top_p(s.top_p)
            chain.add_min_p(s.min_p)
            chain.add_temp(s.temperature)
            chain.add_dist(seed)

    def _add_grammar(self, llm: Llama, grammar: Any) -> None:
        """LlamaSampler.add_grammar would put a null pointer into the chain when llama.cpp cannot read the grammar."""
        vocab = llama_cpp.llama_model_get_vocab(llm.model)
        sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar._grammar.encode("utf-8"), grammar._root.encode("utf-8"))
        if not sampler:
            raise ConfigError("the grammar cannot be read: it must be GBNF with a rule named root")
        llama_cpp.llama_sampler_chain_add(self._chain.sampler, sampler)

    def sample(self, context: Any, index: int, tokens: Sequence[int]) -> int:
        """The next token, after the one at ``index`` of the batch just decoded; ``tokens`` are those so far."""
        if self._processors:
            row = logits_of(context, index, self._n_vocab)
            so_far = np.array(tokens, np.intc)
            for processor in self._processors:
                row[:] = processor(so_far, row)
        return int(llama_cpp.llama_sampler_sample(self._chain.sampler, context, index))

    def close(self) -> None:
        """Free the chain. May be called twice."""
        self._chain.close()


def logits_of(context: Any, index: int, n_vocab: int) -> Logits:
    """llama.cpp's own row of logits [n_vocab] for a token of the batch just decoded; valid until the next one."""
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, index), (n_vocab,))


def top_logprobs(logits: Logits, token: int, n: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of a token, and the n likeliest tokens with theirs, likeliest first."""
    shifted = logits.astype(np.float64) - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    best = np.argpartition(-logprobs, n)[:n] if n < len(logprobs) else np.arange(len(logprobs))
    best = best[np.argsort(-logprobs[best], kind="stable")]
    return float(logprobs[token]), [(int(i), float(logprobs[i])) for i in best]


def token_bytes(vocab: Any, token: int) -> bytes:
    """What a token stands for; nothing for control tokens. Llama.detokenize would lose tokens of more than 32 bytes."""
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, False)
        if n >= 0:
            return buffer.raw[:n]
        size = -n
