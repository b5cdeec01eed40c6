"""A long run of everything that a context is used for, while memory must stay flat.

    python benchmarks/soak.py MODEL [--minutes 60] [--kv gear] [--ctx 2048] [--threads N] [--seed 1]

One Llama generates, shifts past its context, rolls back, resets, saves and restores; now and then a second one is loaded, used and closed. Prints a table:
minute, tokens, resident memory, address space, open files, errors. The exit status is 1 when there was an error, or when resident memory grew by more than
2 % (at least 8 MiB) after the first fifth of the run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gearcpp import GearError, Llama


def memory() -> tuple[int, int]:
    """Resident bytes and address space of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) * 1024, int(lines["VmSize"].split()[0]) * 1024


class Soak:
    """The run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.random = options, np.random.default_rng(options.seed)
        self.session = folder / "session"
        self.n_tokens, self.errors = 0, []
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
        begin = time.monotonic()
        end, next_line, early = begin + 60 * self.options.minutes, begin, None
        self.write(self.llm, 1)
        print("| minute | tokens | resident MiB | address space MiB | open files | errors |\n|---|---|---|---|---|---|")
        while (now := time.monotonic()) < end:
            try:
                self.step()
            except (GearError, AssertionError, RuntimeError) as error:
                self.errors.append(repr(error))
                print(f"error: {error!r}", file=sys.stderr)
                self.llm.reset()
            if now >= next_line:
                self.line(now - begin)
                next_line += 60 * max(1, self.options.minutes / 30)
            if early is None and now - begin > 0.2 * (end - begin):
                early = memory()[0]
        self.line(time.monotonic() - begin)
        grown = memory()[0] - (early or memory()[0])
        flat = grown <= max(0.02 * (early or 0), 8 * 2**20)
        print(f"\n{self.n_tokens} tokens, {len(self.errors)} errors, resident memory {grown / 2**20:+.1f} MiB since the first fifth")
        self.llm.close()
        return int(bool(self.errors) or not flat)

    def line(self, seconds: float) -> None:
        resident, space = memory()
        n_files = len(os.listdir("/proc/self/fd"))
        print(f"| {seconds / 60:.1f} | {self.n_tokens} | {resident / 2**20:.1f} | {space / 2**20:.0f} | {n_files} | {len(self.errors)} |", flush=True)


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kv", default="gear")
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return Soak(options, Path(folder)).run()


if __name__ == "__main__":
    sys.exit(main())
