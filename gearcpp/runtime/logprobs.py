"""Log-probabilities of an echoed prompt, where llama-cpp-python takes those of one token for the next one's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np


def align_echo(llm: llama_cpp.Llama, answer: dict[str, Any], completion: Sequence[int], n_top: int) -> None:
    """Put the log-probabilities of an answer with ``echo`` in their places.

    llama_cpp.Llama counts the rows of logits from the first token and drops a BOS from the tokens; so they fit where the prompt begins with BOS, and are
    those of the token before where it does not (Qwen, SmolLM2).

    Args:
        llm: the context after the answer, with logits of all tokens.
        answer: of `create_completion`; changed.
        completion: the tokens that were sampled; the answer may have fewer.
        n_top: alternatives of each token.
    """
    logprobs, bos, usage = answer["choices"][0]["logprobs"], llm.token_bos(), answer["usage"]
    prompt = [int(token) for token in llm.input_ids[: usage["prompt_tokens"]]]
    if not prompt or prompt[0] == bos:
        return
    ids = [*prompt, *completion[: usage["completion_tokens"]]]
    right: dict[str, list[Any]] = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
    for i, token in enumerate(ids):
        if token == bos:  # which the parent leaves out
            continue
        text = _text(llm, [token], ids[:i])
        right["tokens"].append(text)
        right["text_offset"].append(len(_text(llm, ids[:i])))
        if i == 0:
            right["token_logprobs"].append(None)
            right["top_logprobs"].append(None)
            continue
        row = llama_cpp.Llama.logits_to_logprobs(llm.scores[i - 1])
        top = {_text(llm, [int(j)], ids[:i]): float(row[j]) for j in np.argsort(row)[::-1][:n_top]}
        right["token_logprobs"].append(float(row[token]))
        right["top_logprobs"].append({**top, text: float(row[token])})
    logprobs.update(right)


def _text(llm: llama_cpp.Llama, tokens: list[int], before: list[int] | None = None) -> str:
    return llm.detokenize(tokens, prev_tokens=before).decode("utf-8", "ignore")
