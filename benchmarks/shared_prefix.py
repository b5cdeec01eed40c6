"""What a prefix that the server's sequences share loses while others write the cells around it again and again.

    python benchmarks/shared_prefix.py wiki.test.raw --kv gear,gear2 --turns 1,inf

Requests with the same first 700 tokens and 300 to 2,500 others of the text go through one scheduler, one after the other. After some of them it is asked
for the token after the prefix and 8 more tokens, at 16 positions of the text; printed is how far the log-probability of f16's likeliest token is from
f16's, in the mean and at most. --turns is the scheduler's TURNS: after how many contexts' worth of tokens a prefix is evaluated anew; inf: never.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gearcpp.cli._model import bundled_model, silence_llama_log
from gearcpp.server import scheduler
from gearcpp.server.llama import ServedLlama

N_PREFIX, N_POSITIONS, N_AFTER = 700, 16, 8
LOOKS = (1, 4, 14, 39)  # requests after which to look

Logprobs = list[dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("-m", "--model", type=Path, default=bundled_model())
    parser.add_argument("--kv", default="gear,gear2")
    parser.add_argument("--turns", default="1,inf")
    parser.add_argument("-c", "--ctx-size", type=int, default=4096)
    parser.add_argument("-t", "--threads", type=int, default=1)
    args = parser.parse_args()
    silence_llama_log()

    with served(args, "f16", 1) as llm:
        tokens = llm.tokenize(args.text.read_bytes()[:20000])
        exact = look(llm, tokens)
    for kv in args.kv.split(","):
        for turns in args.turns.split(","):
            scheduler.TURNS = float(turns)
            with served(args, kv, 4) as llm:
                assert llm.scheduler
                random, n_done = np.random.default_rng(1), 0
                for n_requests in LOOKS:
                    while n_done < n_requests:
                        first, n = random.integers(0, len(tokens) - 2600), random.integers(300, 2500)
                        llm.create_completion(tokens[:N_PREFIX] + tokens[first : first + n], max_tokens=40, temperature=0)
                        n_done += 1
                    counters = llm.scheduler.counters
                    filled = counters.prompt_tokens / args.ctx_size
                    off = distances(exact, look(llm, tokens))
                    print(f"{kv:8} turns {turns:4} | {n_done:3} requests, cache filled {filled:4.1f} times | off by {off[0]:.4f} (at most {off[1]:.4f})")


@contextmanager
def served(args: argparse.Namespace, kv: str, n_parallel: int) -> Iterator[ServedLlama]:
    llm = ServedLlama(
        str(args.model), n_parallel=n_parallel, kv_type=kv, n_ctx=args.ctx_size, n_threads=args.threads, n_threads_batch=args.threads, verbose=False
    )
    try:
        yield llm
    finally:
        llm.close()


def look(llm: ServedLlama, tokens: list[int]) -> Logprobs:
    """The likeliest tokens after the prefix and a few more tokens, at each position."""
    found = []
    for i in range(N_POSITIONS):
        first = 2000 + 37 * i
        answer = llm.create_completion(tokens[:N_PREFIX] + tokens[first : first + N_AFTER], max_tokens=1, temperature=0, logprobs=20)
        found.append(answer["choices"][0]["logprobs"]["top_logprobs"][0])
    return found


def distances(exact: Logprobs, found: Logprobs) -> tuple[float, float]:
    """Mean and largest distance of the likeliest token's log-probability; one that is not among the 20 likeliest any more counts as the last of them."""
    off = []
    for one, other in zip(exact, found, strict=True):
        likeliest = max(one, key=lambda token: one[token])
        off.append(abs(one[likeliest] - other.get(likeliest, min(other.values()))))
    return statistics.mean(off), max(off)


if __name__ == "__main__":
    main()
