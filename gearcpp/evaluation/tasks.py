"""What a compressed KV cache does to text that a model writes: arithmetic problems, a needle in a haystack, and drift away from f16's answer.

All three write greedily, so that two caches that agree on every token give the same text. Each cache is loaded by itself, one after the other. These are
checks for models that can do the task; on the model that comes with gearcpp they only show that they run.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

from ..cache.kv_type import split_kv_types
from ..errors import ConfigError, DataError
from ..runtime.llama import Llama
from .perplexity import REFERENCE, CacheSpec, parse_cache

N_BATCH = 128  # tokens read at once; they stay exact meanwhile, so a long batch would keep a short prompt from being packed at all
N_SHOTS = 8  # worked examples before a problem of GSM8K, as usual


def parse_specs(kv: str) -> list[CacheSpec]:
    """The caches of a comma-separated list (see `gearcpp.evaluation.perplexity.parse_cache`), f16 in front of them.

    Raises:
        ConfigError: a name is unknown.
    """
    specs = [parse_cache(name) for name in split_kv_types(kv)]
    return [REFERENCE, *(spec for spec in specs if spec.kv_type != REFERENCE.kv_type)]


def load(path: str | os.PathLike[str], spec: CacheSpec, *, n_ctx: int, n_threads: int | None = None, swa_full: bool = False) -> Llama:
    """A model with this cache. Flash attention is on for all caches, so that f16 differs by the cache alone."""
    return Llama(
        str(path),
        kv_type=spec.kv_type,
        n_ctx=n_ctx,
        n_batch=N_BATCH,
        n_ubatch=N_BATCH,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        flash_attn=True,
        swa_full=swa_full,
        verbose=False,
    )


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        tokens: without the one that ended it.
        text: the same as text.
        packed_share: the share of keys and values that were packed at the end.
    """

    tokens: list[int]
    text: str
    packed_share: float


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share, by Wilson's score: from 0 to 1 even where all answers are right, or none."""
    z = 1.96
    share, pull = n_right / n, z * z / n
    middle, half = share + pull / 2, z * math.sqrt(share * (1 - share) / n + pull / (4 * n))
    return max(0.0, (middle - half) / (1 + pull)), min(1.0, (middle + half) / (1 + pull))


def answer(llm: Llama, prompt: Sequence[int], n_predict: int, stop: str | None = None) -> Answer:
    """Continue a prompt greedily, until the model ends, ``stop`` is written, or ``n_predict`` tokens are.

    Raises:
        ConfigError: the prompt and the answer do not fit into the context.
    """
    if len(prompt) + n_predict > llm.n_ctx():
        raise ConfigError(f"a prompt of {len(prompt)} tokens and an answer of {n_predict} do not fit into a context of {llm.n_ctx()}: use a larger -c")
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    tokens: list[int] = []
    text = ""
    for token in llm.generate(list(prompt), temp=0.0):
        if llama_cpp.llama_vocab_is_eog(vocab, token):
            break
        tokens.append(token)
        text = llm.detokenize(tokens).decode("utf-8", "replace")
        if len(tokens) == n_predict or (stop and stop in text):
            break
    return Answer(tokens, text.split(stop)[0] if stop else text, llm.kv_stats()["total"]["packed_share"])


# ---------------------------------------------------------------------------------------------------------------------------------------------
# GSM8K: grade-school arithmetic (Cobbe et al., arXiv 2110.14168) with worked examples in the prompt
# ---------------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A problem, its worked answer and the number that it comes to."""

    question: str
    worked: str
    result: str


@dataclass(frozen=True)
class Solved:
    """A model's answer to a problem. ``result`` is None if it named no number."""

    problem: Problem
    answer: Answer
    result: str | None

    @property
    def is_right(self) -> bool:
        """Whether the number is the right one."""
        return self.result == self.problem.result


def read_problems(path: str | os.PathLike[str]) -> list[Problem]:
    """Problems from GSM8K's own files: JSON lines with "question" and "answer", which ends in ``#### NUMBER``.

    Raises:
        DataError: the file cannot be read, or a line is not of that form.
    """
    problems = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            worked, _, result = record["answer"].rpartition("####")
            problems.append(Problem(record["question"].strip(), re.sub(r"<<.*?>>", "", worked).strip(), normalize_number(result)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f'{path}, line {number}: not a problem of GSM8K, {{"question": ..., "answer": "... #### NUMBER"}}') from error
    if not problems:
        raise DataError(f"{path} holds no problem")
    return problems


def normalize_number(text: str) -> str:
    """A number in one spelling: "$1,200.00" is "1200". ValueError when it is none."""
    value = float(re.sub(r"[,$\s]", "", text).rstrip("."))
    return str(int(value)) if value.is_integer() else str(value)


def final_number(text: str) -> str | None:
    """The number that an answer comes to: the one behind ``####``, else the last one; None if there is none."""
    numbers = re.findall(r"-?\$?\d[\d,]*(?:\.\d+)?", text.split("####", 1)[-1])
    if not numbers:
        return None
    return normalize_number(numbers[0] if "####" in text else numbers[-1])


def gsm8k_prompt(shots: Sequence[Problem], question: str) -> str:
    """Worked examples and a question, to be continued by its answer."""
    worked = "".join(f"Question: {shot.question}\nAnswer: {shot.worked}\n#### {shot.result}\n\n" for shot in shots)
    return f"{worked}Question: {question}\nAnswer:"


def gsm8k(llm: Llama, shots: Sequence[Problem], problems: Sequence[Problem], n_predict: int = 256) -> Iterator[Solved]:
    """Have a model solve problems, one after the other."""
    for problem in problems:
        prompt = llm.tokenize(gsm8k_prompt(shots, problem.question).encode())
        written = answer(llm, prompt, n_predict, stop="\nQuestion:")
        yield Solved(problem, written, final_number(written.text))


# ---------------------------------------------------------------------------------------------------------------------------------------------
# A needle in a haystack
# ---------------------------------------------------------------------------------------------------------------------------------------------

_NEEDLE = " The secret number of the lighthouse is {number}. "
_QUESTION = "\n\nQuestion: What is the secret number of the lighthouse?\nAnswer: The secret number of the lighthouse is"


@dataclass(frozen=True)
class Search:
    """One cell of the grid: how long the haystack was, how deep the needle lay (0: its start, 1: its end), and whether it was found."""

    length: int
    depth: float
    answer: Answer
    is_found: bool


def haystack(llm: Llama, text: bytes, length: int, depth: float, number: int) -> list[int]:
    """A prompt of about ``length`` tokens: text with the needle after the sentence that ends next to ``depth``, then the question.

    Raises:
        DataError: the text is too short.
    """
    question = llm.tokenize(_QUESTION.encode(), add_bos=False)
    sentence = _NEEDLE.format(number=number).encode()
    n_straw = length - len(question) - len(llm.tokenize(sentence, add_bos=False))
    straw = llm.tokenize(_whole_characters(text[: 16 * length]))
    if len(straw) < n_straw or n_straw < 1:
        raise DataError(f"a haystack of {length} tokens cannot be made: the text has {len(straw)}, needle and question take {length - n_straw}")
    before, after = llm.detokenize(straw[: round(depth * n_straw)]), llm.detokenize(straw[round(depth * n_straw) : n_straw])
    end = before.rfind(b". ") + 2 if b". " in before else len(before)
    return llm.tokenize(_whole_characters(before[:end] + sentence + before[end:] + after)) + question


def _whole_characters(text: bytes) -> bytes:
    """UTF-8 that was cut anywhere, without the pieces of characters."""
    return text.decode("utf-8", "ignore").encode()


def needle(llm: Llama, text: bytes, lengths: Sequence[int], depths: Sequence[float], seed: int = 1, start: int = 0) -> Iterator[Search]:
    """Look for a number in haystacks of several lengths, at several depths, but for the first ``start`` of them. The numbers depend on the seed alone."""
    numbers = random.Random(seed)
    cases = [(length, depth, numbers.randrange(10_000, 100_000)) for length in lengths for depth in depths]
    for length, depth, number in cases[start:]:
        found = answer(llm, haystack(llm, text, length, depth, number), n_predict=16)
        yield Search(length, depth, found, str(number) in found.text)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Drift
# ---------------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """How one answer differs from f16's to the same prompt.

    Attributes:
        first_difference: tokens before the answers part; the length of f16's if they do not.
        is_same: whether they do not.
        same_share: share of positions with the same token, over the longer answer.
        repetition, repetition_f16: share of runs of four tokens that were there before.
        length_ratio: length of this answer / of f16's.
    """

    first_difference: int
    is_same: bool
    same_share: float
    repetition: float
    repetition_f16: float
    length_ratio: float


def split_prompts(llm: Llama, text: bytes, n_prompts: int, n_tokens: int) -> list[list[int]]:
    """Prompts of ``n_tokens`` tokens spread evenly over a text.

    Raises:
        DataError: the text is too short for prompts that do not overlap.
    """
    tokens = llm.tokenize(text)
    if len(tokens) < n_prompts * n_tokens:
        raise DataError(f"the text has {len(tokens)} tokens, too few for {n_prompts} prompts of {n_tokens}: give a longer text or ask for less")
    stride = len(tokens) // n_prompts
    return [tokens[i * stride : i * stride + n_tokens] for i in range(n_prompts)]


def compare_answers(tokens: Sequence[int], tokens_f16: Sequence[int]) -> Drift:
    """How an answer differs from f16's."""
    pairs = list(zip(tokens, tokens_f16, strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    longest = max(len(tokens), len(tokens_f16))
    return Drift(
        first_difference=first,
        is_same=list(tokens) == list(tokens_f16),
        same_share=sum(a == b for a, b in pairs) / longest if longest else 1.0,
        repetition=repetition(tokens),
        repetition_f16=repetition(tokens_f16),
        length_ratio=len(tokens) / len(tokens_f16) if tokens_f16 else float("nan"),
    )


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of runs of n tokens that were there before."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
