"""Run by test_gguf_numbers.py, in a process of its own: load a model again and again, each time with another number of its header changed.

    python gguf_numbers_process.py MODEL FOLDER [EVERY]

Each attempt is a fork, which may take 4 GiB of addresses and 10 seconds of a CPU. Prints a line of JSON for each attempt that ended neither well nor by
a GearError.
EVERY: try only each EVERY-th number.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from gearcpp import GearError, Llama

FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SECONDS, ADDRESSES = 10, 4 << 30
LOADED, REFUSED = 0, 3


class Numbers:
    """Every number of a GGUF header: (what it is, where it stands, its struct format)."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 4

    def take(self, form: str) -> tuple[int, int]:
        at = self.at
        (value,) = struct.unpack_from("<" + form, self.data, at)
        self.at += struct.calcsize("<" + form)
        return at, value

    def text(self, name: str) -> Iterator[tuple[str, int, str]]:
        at, length = self.take("Q")
        yield f"{name} (length of text)", at, "Q"
        self.last = self.data[self.at : self.at + length].decode()
        self.at += length

    def value(self, name: str, kind: int, *, in_list: bool = False) -> Iterator[tuple[str, int, str]]:
        if kind == 8:
            yield from self.text(name)
        elif kind == 9:
            at, of = self.take("I")
            yield f"{name} (type of list)", at, "I"
            at, length = self.take("Q")
            yield f"{name} (length of list)", at, "Q"
            for i in range(length):
                for number in self.value(name, of, in_list=True):
                    if i in (0, length - 1):
                        yield number
        else:
            at, _ = self.take(FORMS[kind])
            yield name, at, FORMS[kind]

    def all(self) -> Iterator[tuple[str, int, str]]:
        at, _ = self.take("I")
        yield "version", at, "I"
        (at, n_tensor), (at_key, n_key) = self.take("Q"), self.take("Q")
        yield "number of tensors", at, "Q"
        yield "number of keys", at_key, "Q"
        for _ in range(n_key):
            yield from self.text("a key")
            name = self.last
            at, kind = self.take("I")
            yield f"{name} (type)", at, "I"
            yield from self.value(name, kind)
        for i in range(n_tensor):
            shown = i < 4 or i == n_tensor - 1
            found = list(self.text("a tensor"))
            name = self.last
            at, n_dim = self.take("I")
            found.append((f"{name} (dimensions)", at, "I"))
            found += [(f"{name} (dimension {d})", self.take("Q")[0], "Q") for d in range(n_dim)]
            found.append((f"{name} (type)", self.take("I")[0], "I"))
            found.append((f"{name} (offset)", self.take("Q")[0], "Q"))
            yield from found if shown else ()


def values(form: str, present: float) -> list[float]:
    """What to put in place of a number."""
    if form == "?":
        return []
    if form in "fd":
        return [0.0, -1.0, float("nan"), float("inf"), 1e30]
    size = 8 * struct.calcsize(form)
    high = 2 ** (size - 1) - 1 if form.islower() else 2**size - 1
    wanted = {0, 1, int(present) + 1, int(present) * 2, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**62, high, -1}
    low = -high - 1 if form.islower() else 0
    return sorted(value for value in wanted if low <= value <= high and value != present)


def attempt(path: Path) -> int:
    """Load the model and use it, in a fork; how that ended (negative: the signal)."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = 1
        try:
            llm = Llama(path, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
            llm.eval([1, 2, 3])
            code = LOADED
        except GearError:
            code = REFUSED
        except BaseException as error:
            print(json.dumps({"exception": repr(error)[:300]}), flush=True)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    model, folder, every = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1
    os.environ["GGML_NO_BACKTRACE"] = "1"
    data = model.read_bytes()
    changed, n = folder / "changed.gguf", 0
    for i, (name, at, form) in enumerate(list(Numbers(data).all())):
        if i % every:
            continue
        (present,) = struct.unpack_from("<" + form, data, at)
        for value in values(form, present):
            copy = bytearray(data)
            struct.pack_into("<" + form, copy, at, value)
            changed.write_bytes(copy)
            code = attempt(changed)
            n += 1
            if code not in (LOADED, REFUSED):
                print(json.dumps({"number": name, "value": repr(value), "code": code}), flush=True)
    print(json.dumps({"attempts": n}), flush=True)


if __name__ == "__main__":
    main()
