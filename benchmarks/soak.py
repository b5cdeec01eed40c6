"""A long run of everything that a context is used for, while memory must stay flat (Linux with glibc).

    python benchmarks/soak.py MODEL [--minutes 60] [--kv gear] [--ctx 2048] [--threads N] [--seed 1]

One Llama generates, shifts past its context, rolls back, resets, saves and restores; now and then a second one is loaded, used and closed. Minutes are
those that the process ran: a stop (SIGSTOP) does not count. SIGTERM ends the run early, with its result. Prints a table: minute, tokens, resident memory,
bytes that malloc has from the system, those of them in use (blocks that were not freed), blocks of Python's own allocator, open files, errors.

Two figures are judged, from the end of the first fifth of the run to its end:

- malloc's bytes in use: a leak shows here whatever the allocator does;
- resident memory after malloc_trim(0), so with everything that malloc could give back given back: this also has what does not come from malloc (mappings
  of caches, Python's small objects) and what fragments keep.

Resident memory as it is has, besides those, free memory that malloc keeps for later; it is printed and not judged. The exit status is 1 when there was an
error, when either figure grew by more than 2 % (at least 8 MiB), or when the run was ended early.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np

from gearcpp import GearError, Llama
from gearcpp.model_files import model_argument

MIB = 2**20
LONGEST_STEP = 5.0  # seconds; what is longer was a stop


class Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2 (malloc.h): sums over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2


class Memory(NamedTuple):
    """Bytes of this process."""

    resident: int
    from_system: int  # what malloc has
    in_use: int  # of that, in blocks that were not freed
    python_blocks: int  # a count: small objects, which are not malloc's

    @classmethod
    def now(cls, *, trim: bool = False) -> Memory:
        """trim: give back first whatever malloc can give back, after a collection of Python's garbage."""
        if trim:
            gc.collect()
            libc.malloc_trim(0)
        n_pages = int(Path("/proc/self/statm").read_text().split()[1])
        info = libc.mallinfo2()
        mapped = info.hblkhd  # big blocks, each in a mapping of its own
        return cls(n_pages * os.sysconf("SC_PAGE_SIZE"), info.arena + mapped, info.uordblks + mapped, sys.getallocatedblocks())


def grown(what: str, early: int, late: int) -> bool:
    """Print what became of a figure; whether it grew by more than it may."""
    allowed, change = max(0.02 * early, 8 * MIB), late - early
    print(f"{what}: {early / MIB:.1f} MiB after the first fifth, {change / MIB:+.1f} MiB from there to the end (allowed {allowed / MIB:+.1f})")
    return change > allowed


class Soak:
    """The run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.random = options, np.random.default_rng(options.seed)
        self.session = folder / "session"
        self.n_tokens, self.stopped = 0, False
        self.errors: list[str] = []
        self.llm = self.load()

    def load(self) -> Llama:
        o = self.options
        return Llama(o.model, kv_type=o.kv, n_ctx=o.ctx, n_batch=256, n_threads=o.threads, n_threads_batch=o.threads, verbose=False)

    def write(self, llm: Llama, n: int) -> None:
        """Evaluate n tokens, with room made first."""
        if llm.n_tokens + n >= llm.n_ctx():
            llm.shift_context(4, llm.n_tokens // 2)
        llm.eval(self.random.integers(3, llm.n_vocab(), n).tolist())
        self.n_tokens += n

    def step(self) -> None:
        llm = self.llm
        match int(self.random.choice(8, p=[0.3, 0.3, 0.1, 0.05, 0.1, 0.08, 0.04, 0.03])):
            case 0:
                self.write(llm, int(self.random.integers(1, 300)))
            case 1:
                for _ in range(16):
                    self.write(llm, 1)
                    llm.sample(temp=0.8)
            case 2:  # what was drafted is taken back
                llm.n_tokens = max(llm.n_tokens - int(self.random.integers(1, 9)), 0)
            case 3:
                llm.reset()
            case 4 if llm.n_tokens:
                llm.save_session(self.session)
            case 5 if self.session.exists():
                llm.load_session(self.session)
                if not llm.n_tokens:
                    raise AssertionError("a restored session is empty")
            case 6:
                state = llm.save_state()
                llm.reset()
                llm.load_state(state)
            case 7:
                other = self.load()
                self.write(other, 200)
                other.close()
        if llm.n_tokens and not np.isfinite(np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),))).all():
            raise AssertionError("logits are not finite")

    def run(self) -> int:
        length, ran, next_line = 60 * self.options.minutes, 0.0, 0.0
        early: tuple[Memory, Memory] | None = None  # as it was, and trimmed
        self.write(self.llm, 1)
        print("| minute | tokens | resident MiB | malloc's MiB | of them in use | Python's blocks | open files | errors |")
        print("|---|---|---|---|---|---|---|---|")
        while ran < length and not self.stopped:
            begin = time.monotonic()
            try:
                self.step()
            except (GearError, AssertionError, RuntimeError) as error:
                self.errors.append(repr(error))
                print(f"error: {error!r}", file=sys.stderr)
                self.llm.reset()
            if ran >= next_line:
                self.line(ran)
                next_line += 60 * max(1, self.options.minutes / 30)
            if early is None and ran > 0.2 * length:
                early = Memory.now(), Memory.now(trim=True)
            ran += min(time.monotonic() - begin, LONGEST_STEP)
        self.line(ran)
        late = Memory.now(), Memory.now(trim=True)
        print(f"\n{self.n_tokens} tokens, {len(self.errors)} errors, {time.process_time() / 60:.1f} minutes of CPU time")
        if early is None:
            print("ended within the first fifth: memory was not judged")
            return 1
        print(f"resident memory: {early[0].resident / MIB:.1f} MiB after the first fifth, {late[0].resident / MIB:.1f} MiB at the end")
        leaks = grown("malloc's bytes in use", early[1].in_use, late[1].in_use)
        grows = grown("resident memory after malloc_trim", early[1].resident, late[1].resident)
        if self.stopped:
            print(f"ended early, after {ran / 60:.1f} of {self.options.minutes:g} minutes")
        self.llm.close()
        return int(bool(self.errors) or leaks or grows or self.stopped)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler: end after the present step."""
        self.stopped = True

    def line(self, seconds: float) -> None:
        m = Memory.now()
        figures = [f"{n / MIB:.1f}" for n in (m.resident, m.from_system, m.in_use)]
        row = [f"{seconds / 60:.1f}", self.n_tokens, *figures, m.python_blocks, len(os.listdir("/proc/self/fd")), len(self.errors)]
        print("|", " | ".join(map(str, row)), "|", flush=True)


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=model_argument)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kv", default="gear")
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options, Path(folder))
        signal.signal(signal.SIGTERM, soak.stop)
        return soak.run()


if __name__ == "__main__":
    sys.exit(main())
