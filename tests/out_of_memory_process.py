"""A process of test_out_of_memory.py: one operation, whose allocations inside of libgearcpp fail one after the other.

    LD_PRELOAD=libfail_allocations.so python out_of_memory_process.py OPERATION MODEL [--below] [--follow] [--step N]

Prints one JSON object: how many allocations failed, and what is not as it should be. --below: what ggml allocates for a call of libgearcpp's, too.
--follow: all that follow a failing allocation fail as well. --step: only every N-th one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["GEARCPP_SMALL_CACHE"] = "store"
os.environ["GEARCPP_KV"] = "bits_k=3,bits_v=3"

from gearcpp import GearConfig, GearError, Llama, native, read_model_info
from gearcpp.cache.device import GearDevice

CONFIG = GearConfig(tile=64, n_tail=32, n_sink=2, rank_k=1)
TEXT = [1, *range(3, 250), *range(3, 200)]  # more than the pool of exact rows holds


class Failing:
    """What the preloaded library offers."""

    def __init__(self, below: bool, follow: bool) -> None:
        self._library, self._below, self._follow = ctypes.CDLL(None), below, follow
        self._library.fail_disarm.restype = self._library.fail_alive.restype = ctypes.c_int64
        self._library.fail_arm.argtypes = [ctypes.c_int64, ctypes.c_int]
        assert self._library.fail_watch(int(below)), "libgearcpp is not in this process"

    def arm(self, n: int) -> None:
        self._library.fail_arm(n, int(self._follow))

    def disarm(self) -> int:
        return int(self._library.fail_disarm())

    def alive(self) -> int:
        """Blocks and mappings of libgearcpp's."""
        gc.collect()
        return int(self._library.fail_alive())


class Llamas:
    """Contexts for one attempt: made, used, and gone."""

    def __init__(self, model: str) -> None:
        self.model, self.folder = model, Path(model).parent
        self._stack = contextlib.ExitStack()

    def make(self) -> Llama:
        arguments = {"n_ctx": 2048, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, "seed": 1, "verbose": False}
        llm = Llama(self.model, kv_type=CONFIG, **arguments)
        self._stack.callback(llm.close)
        return llm

    def close(self) -> None:
        self._stack.close()


# An operation: given contexts, it prepares and returns what to attempt; what that returns must be the same when it succeeds later.
Operation = Callable[[Llamas], Callable[[], object]]


def again(llm: Llama, tokens: list[int]) -> None:
    """From nothing, as after any failure."""
    llm.reset()
    llm._ctx.kv_cache_clear()
    llm.eval(tokens)


def opening(llamas: Llamas) -> Callable[[], object]:
    return native.open_ggml


def device(llamas: Llamas) -> Callable[[], object]:
    info = read_model_info(llamas.model)
    return lambda: GearDevice(info, CONFIG).close()


def registering(llamas: Llamas) -> Callable[[], object]:
    """What GGML_BACKEND_PATH does. It succeeds once in a process."""
    init = ctypes.CDLL(str(native.library_path())).ggml_backend_init
    init.restype = ctypes.c_void_p

    def register() -> None:
        if not init():
            raise native.last_error()

    return register


def construction(llamas: Llamas) -> Callable[[], object]:
    return lambda: llamas.make().close()


def first_graph(llamas: Llamas) -> Callable[[], object]:
    llm = llamas.make()
    return lambda: again(llm, TEXT[:40])


def prompt(llamas: Llamas) -> Callable[[], object]:
    """Enough tokens that tiles are packed, after one that needed little."""
    llm = llamas.make()
    llm.eval([1])
    return lambda: again(llm, TEXT)


def shift(llamas: Llamas) -> Callable[[], object]:
    llm = llamas.make()
    again(llm, TEXT)

    def attempt() -> None:
        if llm.n_tokens != len(TEXT):
            again(llm, TEXT)
        llm.shift_context(4, 40)
        llm.eval([5])

    return attempt


def save(llamas: Llamas) -> Callable[[], object]:
    llm = llamas.make()
    again(llm, TEXT)
    return lambda: llm.save_session(str(llamas.folder / "saved"))


def load(llamas: Llamas) -> Callable[[], object]:
    llm = llamas.make()
    again(llm, TEXT)
    path = str(llamas.folder / "session")
    llm.save_session(path)
    fresh = llamas.make()

    def attempt() -> None:
        fresh.load_session(path)
        fresh.eval([5])

    return attempt


def state(llamas: Llamas) -> Callable[[], object]:
    """llama-cpp-python's own, through f16."""
    llm = llamas.make()
    again(llm, TEXT)

    def attempt() -> None:
        saved = llm.save_state()
        again(llm, [1, 7])
        llm.load_state(saved)
        llm.eval([5])

    return attempt


def statistics(llamas: Llamas) -> Callable[[], object]:
    llm = llamas.make()
    again(llm, TEXT)
    return lambda: llm.kv_stats()["total"]["n_written"]


OPERATIONS: dict[str, Operation] = {
    operation.__name__: operation for operation in (opening, device, registering, construction, first_graph, prompt, shift, save, load, state, statistics)
}
ONCE = ("opening", "registering")  # what succeeds stays: the next attempt shows that it works after a failure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("operation", choices=OPERATIONS)
    parser.add_argument("model")
    parser.add_argument("--below", action="store_true")
    parser.add_argument("--follow", action="store_true")
    parser.add_argument("--step", type=int, default=1)
    options = parser.parse_args()
    failing = Failing(options.below, options.follow)
    wrong: list[str] = []
    errors: dict[str, int] = {}
    if options.operation not in ONCE:
        warm = Llamas(options.model)  # what a process or a thread makes once is not lost
        OPERATIONS[options.operation](warm)()
        warm.close()
    n_tried = 0
    for n in range(1, 10**6, options.step):
        before = failing.alive()
        llamas = Llamas(options.model)
        attempt = OPERATIONS[options.operation](llamas)
        error: BaseException | None = None
        failing.arm(n)
        try:
            attempt()
        except Exception as caught:
            error = caught
        n_failed = failing.disarm()
        if error:
            errors[f"{type(error).__name__}: {error}"] = errors.get(f"{type(error).__name__}: {error}", 0) + 1
        if error and not isinstance(error, GearError):
            wrong.append(f"allocation {n}: {error!r}")
        if error and not n_failed:
            wrong.append(f"without a failure: {error!r}")
        error = None
        if n_failed and options.operation not in ONCE:
            try:
                attempt()
            except Exception as caught:
                wrong.append(f"allocation {n}: once more: {caught!r}")
        del attempt
        llamas.close()
        if not n_failed:
            break
        n_tried += 1
        if (after := failing.alive()) != before:
            wrong.append(f"allocation {n}: {after - before} blocks are left over")
    json.dump({"operation": options.operation, "failed": n_tried, "wrong": wrong, "errors": errors}, sys.stdout)


if __name__ == "__main__":
    main()
