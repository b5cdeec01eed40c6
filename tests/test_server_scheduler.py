"""Several sequences decoded together in one context: the same answers as alone, shared prefixes, full caches, cancelled and failing sequences."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from gearcpp.cli._model import bundled_model
from gearcpp.errors import ClosedError, CodecError, ConfigError
from gearcpp.server.client import Client, current_client
from gearcpp.server.errors import CancelledError
from gearcpp.server.llama import ServedLlama

PATIENCE = 120.0
CLOSE = 0.1  # nats: rounding moves a log-probability by up to 0.03 here (8-bit weights, other kernels for larger batches), a wrong context by far more
PROMPTS = [
    f"{opening} {rest}"
    for opening in ("Once upon a time", "The old captain", "In the year 1802", "My dear sister,")
    for rest in ("there stood a house by the river.", "and the whole of the village looked on, while")
]


@contextmanager
def served(n_parallel: int, n_ctx: int = 1024, **arguments: Any) -> Iterator[ServedLlama]:
    """The bundled model with a scheduler."""
    llm = ServedLlama(str(bundled_model()), n_parallel=n_parallel, n_ctx=n_ctx, n_threads=1, n_threads_batch=1, verbose=False, **arguments)
    try:
        yield llm
    finally:
        llm.close()


def answer(llm: ServedLlama, prompt: str | list[int], n: int, **more: Any) -> dict[str, Any]:
    """A greedy answer of n tokens with the two likeliest at each step."""
    return llm.create_completion(prompt, max_tokens=n, temperature=0, logprobs=2, logit_bias={llm.token_eos(): -100.0}, **more)


def together(llm: ServedLlama, prompts: list[Any], n: int) -> list[dict[str, Any]]:
    """Answers to prompts that are all there before the first step."""
    ready = threading.Barrier(len(prompts))

    def one(prompt: Any) -> dict[str, Any]:
        ready.wait(PATIENCE)
        return answer(llm, prompt, n)

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts))


def words(llm: ServedLlama, n: int, seed: int) -> list[int]:
    """A prompt of n tokens, none of them a control token."""
    return [llm.token_bos(), *np.random.default_rng(seed).integers(300, 4000, n - 1).tolist()]


def assert_same(alone: dict[str, Any], batched: dict[str, Any]) -> int:
    """Greedy answers agree as far as rounding allows: the same tokens with the same log-probabilities; where they part, it was a tie. Equal tokens."""
    one, other = alone["choices"][0]["logprobs"], batched["choices"][0]["logprobs"]
    for i, (token, twin) in enumerate(zip(one["tokens"], other["tokens"], strict=True)):
        first, second, *_ = [*sorted(one["top_logprobs"][i].values(), reverse=True), -np.inf]
        if token != twin:
            assert first - second < CLOSE, (i, token, twin, one["top_logprobs"][i], other["top_logprobs"][i])
            return i
        assert abs(one["token_logprobs"][i] - other["token_logprobs"][i]) < CLOSE, (i, token)
    return len(one["tokens"])


@pytest.mark.parametrize("kv_type", ["f16", "gear"])  # what fits into gear's exact rows is f16
def test_eight_at_once_answer_as_each_alone(kv_type: str) -> None:
    with served(8, kv_type=kv_type) as llm:
        alone = [answer(llm, prompt, 32) for prompt in PROMPTS]
        batched = together(llm, PROMPTS, 32)
        assert llm.scheduler and llm.scheduler.counters.preemptions == 0
    equal = [assert_same(one, other) for one, other in zip(alone, batched, strict=True)]
    assert sum(equal) > len(PROMPTS) * 32 / 2, equal
    assert len({one["choices"][0]["text"] for one in alone}) > len(PROMPTS) / 2  # whose answers were mixed up would show


def test_they_were_decoded_together() -> None:
    with served(8) as llm:
        together(llm, PROMPTS, 32)
        counters = llm.scheduler.counters  # type: ignore[union-attr]
        assert counters.generated_tokens == 8 * 32
        assert counters.steps < 3 * 32


@pytest.mark.parametrize("kv_type", ["f16", "gear3"])
def test_a_prompt_in_packed_tiles_is_still_understood_beside_others(kv_type: str) -> None:
    """Long prompts, most of whose rows are packed: what follows is as likely as alone, to within what packing costs."""
    with served(1, 4096, kv_type="f16") as llm:
        novels = [llm.create_completion(prompt, max_tokens=880, temperature=1.0, seed=1)["choices"][0]["text"] for prompt in PROMPTS[::2]]
        prompts = [llm.tokenize(novel.encode())[:860] for novel in novels]
        alone = [answer(llm, prompt, 1) for prompt in prompts]
    with served(4, 4096, kv_type=kv_type) as llm:
        batched = together(llm, prompts, 1)
        packed = llm.kv_stats()["total"]["packed_share"]
    for one, other in zip(alone, batched, strict=True):
        (likely,), (found,) = (a["choices"][0]["logprobs"]["top_logprobs"] for a in (one, other))
        token = max(likely, key=lambda text: likely[text])
        assert abs(likely[token] - found.get(token, -9.0)) < (CLOSE if kv_type == "f16" else 0.5), (likely, found)
    assert packed > 0.5 if kv_type == "gear3" else packed == 0


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Shared prefixes
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_prompts_that_begin_alike_share_rows_and_tiles() -> None:
    with served(8, 4096, kv_type="gear") as llm:
        assert llm.scheduler
        start = words(llm, 2000, 1)
        prompts = [start + words(llm, 21, 10 + i)[1:] for i in range(8)]
        batched = together(llm, prompts, 8)
        n_written = max(layer["n_written"] for layer in llm.kv_stats()["layers"])
        counters = llm.scheduler.counters
        # the start once, then of each its own: 20 tokens of the prompt and 7 of the answer, whose last one is not needed
        assert n_written == 2000 + 8 * 27
        assert counters.prompt_tokens == 2000 + 8 * 20 and counters.shared_tokens == 7 * 2000
        assert counters.cells_kept == n_written and counters.preemptions == 0
        assert llm.kv_stats()["total"]["packed_share"] > 0.4  # the tail of 8 sequences is 512 rows here
    with served(1, 4096, kv_type="f16") as llm:
        for prompt, other in zip(prompts, batched, strict=True):
            (one, *_), (two, *_) = (a["choices"][0]["logprobs"]["top_logprobs"] for a in (answer(llm, prompt, 8), other))
            assert all(abs(one[token] - two[token]) < 0.5 for token in set(one) & set(two))


def test_a_later_turn_of_a_conversation_evaluates_only_what_is_new() -> None:
    with served(2) as llm:
        assert llm.scheduler
        first = words(llm, 200, 3)
        answer(llm, first, 10)
        before = llm.scheduler.counters.prompt_tokens
        answer(llm, [*first, *words(llm, 30, 4)[1:]], 1)
        assert llm.scheduler.counters.prompt_tokens - before == 29
        same = answer(llm, first, 10)
        assert llm.scheduler.counters.prompt_tokens - before == 29 + 1  # the last token, for its logits
        assert_same(same, answer(llm, first, 10))


@pytest.mark.parametrize(("kv_type", "evaluated"), [("f16", [200] + [100] * 7), ("gear", [200, 100, 100, 100, 100, 200, 100, 100])])
def test_under_gear_a_prefix_is_evaluated_anew_when_all_cells_were_written_once_more(kv_type: str, evaluated: list[int]) -> None:
    with served(2, 512, kv_type=kv_type) as llm:
        assert llm.scheduler
        start, found = words(llm, 100, 1), []
        for i in range(8):
            before = llm.scheduler.counters.prompt_tokens
            answer(llm, [*start, *words(llm, 101, 10 + i)[1:]], 1)
            found.append(llm.scheduler.counters.prompt_tokens - before)
        assert found == evaluated


def test_what_cannot_be_cut_is_evaluated_from_its_beginning() -> None:
    with served(2) as llm:
        assert llm.scheduler
        first = answer(llm, PROMPTS[0], 12)
        llm.scheduler._can_cut = False  # as for a recurrent model
        before = llm.scheduler.counters.shared_tokens
        assert_same(first, answer(llm, PROMPTS[0], 12))
        assert llm.scheduler.counters.shared_tokens == before


# ---------------------------------------------------------------------------------------------------------------------------------------------
# A full cache
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_when_the_cells_run_out_the_youngest_waits_and_all_answers_are_whole() -> None:
    with served(4, 512, kv_type="f16") as llm:
        assert llm.scheduler
        prompts = [words(llm, 60, seed) for seed in range(4)]
        alone = [answer(llm, prompt, 200) for prompt in prompts]
        batched = together(llm, prompts, 200)
        assert llm.scheduler.counters.preemptions > 0
        for one, other in zip(alone, batched, strict=True):
            assert other["usage"]["completion_tokens"] == 200
            assert_same(one, other)
        assert llm.scheduler._cells.used <= 512


def test_a_sequence_alone_may_fill_the_whole_context() -> None:
    with served(4, 256) as llm:
        whole = answer(llm, words(llm, 10, 1), 10_000)
        assert whole["choices"][0]["finish_reason"] == "length" and whole["usage"]["total_tokens"] == 256
        assert answer(llm, words(llm, 255, 2), 5)["usage"]["total_tokens"] == 256
        with pytest.raises(ConfigError, match="the prompt has 256 tokens; this server's context has 256"):
            answer(llm, words(llm, 256, 2), 5)


def test_more_requests_than_slots_are_answered_in_turn() -> None:
    with served(2, 512) as llm:
        assert llm.scheduler
        answers = together(llm, PROMPTS, 10)
        assert [a["usage"]["completion_tokens"] for a in answers] == [10] * 8
        assert llm.scheduler.counters.running == llm.scheduler.counters.waiting == 0


def test_answers_go_on_while_a_long_prompt_is_read() -> None:
    with served(2, 4096, n_batch=64, n_ubatch=64) as llm:
        assert llm.scheduler
        stream = llm.create_completion(PROMPTS[0], max_tokens=3000, temperature=0, stream=True, logit_bias={llm.token_eos(): -100.0})
        next(stream)
        before = llm.scheduler.counters.generated_tokens
        answer(llm, words(llm, 960, 1), 1)
        assert llm.scheduler.counters.generated_tokens - before >= 960 / 64
        stream.close()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Sequences that end otherwise
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_a_cancelled_sequence_frees_its_cells() -> None:
    with served(2, 512) as llm:
        assert llm.scheduler
        stream = llm.create_completion(words(llm, 250, 1), max_tokens=10_000, temperature=0, stream=True, logit_bias={llm.token_eos(): -100.0})
        next(stream)
        stream.close()
        whole = answer(llm, words(llm, 500, 2), 5)  # would not fit beside the other
        assert whole["usage"]["completion_tokens"] == 5
        assert llm.scheduler.counters.running == 0 and llm.scheduler.counters.generated_tokens < 200  # of 262 that fit


def test_a_client_that_goes_while_it_waits_is_not_answered() -> None:
    with served(1, 1024) as llm:
        assert llm.scheduler
        running = llm.create_completion(PROMPTS[0], max_tokens=900, temperature=0, stream=True, logit_bias={llm.token_eos(): -100.0})
        next(running)
        client = Client()
        token = current_client.set(client)
        waiting = llm.create_completion(PROMPTS[1], max_tokens=5, stream=True)
        current_client.reset(token)
        client.go()
        with pytest.raises(CancelledError):
            next(waiting)
        running.close()
        assert answer(llm, PROMPTS[2], 3)["usage"]["completion_tokens"] == 3


def test_a_failing_cache_fails_its_batch_and_the_next_one_works() -> None:
    failures = [ValueError("a bad tile")]

    def codec(il: int, side: str, head: int, x: Any, written: Any, cells: Any) -> Any:
        if failures:
            raise failures.pop()
        return x, x.size

    with served(2, 4096, kv_type="gear", codec=codec) as llm:
        prompt = words(llm, 2000, 1)
        with pytest.raises(CodecError, match="a bad tile"):
            answer(llm, prompt, 3)
        assert answer(llm, prompt, 3)["usage"]["completion_tokens"] == 3


def test_a_failing_logits_processor_fails_its_own_sequence_only() -> None:
    def fail(tokens: Any, logits: Any) -> Any:
        raise ZeroDivisionError

    with served(2) as llm:
        staying = llm.create_completion(PROMPTS[0], max_tokens=200, temperature=0, stream=True, logit_bias={llm.token_eos(): -100.0})
        next(staying)
        with pytest.raises(ZeroDivisionError):
            answer(llm, PROMPTS[1], 5, logits_processor=[fail])
        assert list(staying)[-1]["choices"][0]["finish_reason"] == "length"


def test_closing_drops_what_runs_and_waits_and_refuses_what_comes() -> None:
    with served(1) as llm:
        streams = [llm.create_completion(prompt, max_tokens=900, stream=True) for prompt in PROMPTS[:3]]
        next(streams[0])
        scheduler = llm.scheduler
        assert scheduler
        scheduler.close()
        for stream in streams:
            with pytest.raises(CancelledError):
                list(stream)
        assert not scheduler.alive
        with pytest.raises(ClosedError):
            answer(llm, PROMPTS[0], 1)


def test_closing_does_not_wait_for_a_long_prompt() -> None:
    with served(1, 4096, n_batch=4096, n_ubatch=512) as llm:
        stream = llm.create_completion(words(llm, 4090, 1), max_tokens=1, stream=True)
        scheduler = llm.scheduler
        assert scheduler
        while not scheduler._batch.struct.n_tokens:
            time.sleep(0.001)
        scheduler.close()
        with pytest.raises(CancelledError):
            list(stream)
        assert scheduler.counters.prompt_tokens == 0  # its one batch was not finished


def test_a_scheduler_that_dies_says_so() -> None:
    with served(2) as llm:
        assert llm.scheduler
        broken: Callable[[], None] = lambda: (_ for _ in ()).throw(MemoryError("no more"))  # noqa: E731
        llm.scheduler._admit = broken  # type: ignore[method-assign]
        with pytest.raises(Exception, match="the scheduler stopped: MemoryError"):
            answer(llm, PROMPTS[0], 1)
        llm.scheduler._thread.join(PATIENCE)
        assert not llm.scheduler.alive
        with pytest.raises(Exception, match="the scheduler stopped"):
            answer(llm, PROMPTS[0], 1)


def test_the_exact_tail_is_as_long_for_each_sequence_and_counted() -> None:
    with served(1, n_ctx=4096) as one, served(4, n_ctx=4096) as four:
        assert one.kv_type.gear and four.kv_type.gear
        assert (one.kv_type.gear.n_tail, four.kv_type.gear.n_tail) == (128, 512)
        info = one.info
        row = sum(2 * layer.n_head_kv * (layer.d_head_k + layer.d_head_v) for layer in info.layers)  # f16, bytes
        more = four.kv_stats()["total"]["bytes"] - one.kv_stats()["total"]["bytes"]
        assert 384 * row <= more < 1.2 * 384 * row
