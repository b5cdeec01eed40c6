"""Damaged input, at random: everything that gearcpp parses gets it, and may only answer with an error of its own.

    python tests/fuzz/fuzz.py [TARGET ...] [--seconds 60] [--seed 1]

    kv_type   names, pairs and mappings for normalize_kv_type
    setting   the GEARCPP_KV of programs that load the plugin, through a process each
    gguf      the header of a model, changed here and there
    tile      packed tiles of any bytes, unpacked
    session   a saved session: changed bytes, and changed contents under checksums that are right

A seeded mutator, which is slower to find things than a guided one and runs everywhere. Prints executions, how many inputs were taken and findings for each
target; a finding is a crash (the process ends: the input is kept in fuzz-TARGET.bin) or an exception that is not a GearError. The exit status is the
number of findings.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from models import Shape, write_model
from session_files import put_together, take_apart

from gearcpp import PRESETS, GearConfig, GearError, Llama, native, normalize_kv_type
from gearcpp.cache.kv_type import LLAMA_CACHE_TYPES
from gearcpp.model_info import read_model_info

Random = np.random.Generator
# One input: what it is, for the finding, and what it is given to. True: it was taken.
Case = tuple[bytes, Callable[[], bool]]

INTERESTING = [0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def mutated(data: bytes, random: Random) -> bytes:
    """A few changes: bits, bytes, numbers, pieces cut out, doubled or moved."""
    changed = bytearray(data)
    for _ in range(int(random.integers(1, 5))):
        at, n = int(random.integers(len(changed) + 1)), int(random.integers(1, 65))
        match int(random.integers(7)):
            case 0 if at < len(changed):
                changed[at] ^= 1 << int(random.integers(8))
            case 1:
                changed[at : at + n] = random.integers(0, 256, n, np.uint8).tobytes()
            case 2:
                del changed[at : at + n]
            case 3:
                changed[at:at] = changed[at : at + n]
            case 4:
                size = int(random.choice([1, 2, 4, 8]))
                changed[at : at + size] = (INTERESTING[int(random.integers(len(INTERESTING)))] % 256**size).to_bytes(size, "little")
            case 5:
                del changed[at:]
            case _:
                other = int(random.integers(len(changed) + 1))
                changed[at : at + n] = changed[other : other + n]
    return bytes(changed)


def kv_type_cases(random: Random, folder: Path) -> Iterator[Case]:
    """Settings for normalize_kv_type, and what it takes must be something that the library takes, too."""
    names = [*PRESETS, *LLAMA_CACHE_TYPES, "q8_0/q4_0", ""]
    fields = list(GearConfig().to_dict())
    values = [0, 1, 2, 3, 4, 7, 8, 16, 32, 64, 128, 256, -1, 2**31, 2**64, 0.5, 1.0, 1e-9, float("nan"), float("inf"), True, None, "4", [], {}]
    while True:
        pick = lambda options: options[int(random.integers(len(options)))]  # noqa: E731
        match int(random.integers(4)):
            case 0:
                given = mutated(pick(names).encode(), random).decode("latin-1")
            case 1:
                given = (pick(names), pick(values))
            case 2:
                given = pick(values)
            case _:
                given = {pick([*fields, *fields, "x", ""]): pick(values) for _ in range(int(random.integers(1, 5)))}

        def take(given: object = given) -> bool:
            kv = normalize_kv_type(given)  # type: ignore[arg-type]
            if kv.gear:
                native.check_config(kv.gear)
            return True

        yield repr(given).encode(), take


def setting_cases(random: Random, folder: Path) -> Iterator[Case]:
    """GEARCPP_KV: the plugin is loaded by a process that does as llama.cpp does."""
    loader = (
        "import ctypes, sys, llama_cpp\n"
        "for name in ('libggml-base.so', 'libggml-cpu.so', 'libggml.so'): pass\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "library.ggml_backend_init.restype = ctypes.c_void_p\n"
        "sys.exit(0 if library.ggml_backend_init() else 3)"
    )
    base = b"bits_k=3,bits_v=3,group_k=64,n_tail=256,sparsity=0.05,clip_k=0.9,seed=7"
    while True:
        data = mutated(base, random).replace(b"\0", b"0")

        def take(data: bytes = data) -> bool:
            command = [sys.executable, "-c", loader, str(native.library_path())]
            result = subprocess.run(command, env={**os.environb, b"GEARCPP_KV": data}, capture_output=True, check=False, timeout=60)
            if result.returncode not in (0, 3) or (result.returncode == 3 and b"gearcpp: " not in result.stderr):
                raise RuntimeError(f"exit status {result.returncode}: {result.stderr[-300:]!r}")
            return result.returncode == 0

        yield data, take


def gguf_cases(random: Random, folder: Path) -> Iterator[Case]:
    """The header of a model."""
    models = [write_model(folder / f"{family}.gguf", family, shape).read_bytes() for family, shape in (("llama", Shape()), ("lfm2", Shape(n_head=2)))]
    path = folder / "fuzz.gguf"
    while True:
        data = models[int(random.integers(len(models)))]
        n_head = 6000  # metadata and vocabulary come first
        changed = mutated(data[:n_head], random) + (data[n_head : n_head + 4000] if random.random() < 0.5 else b"")

        def take(changed: bytes = changed) -> bool:
            path.write_bytes(changed)
            info = read_model_info(path)
            info.kv_elements(4096)
            info.check_gear()
            return True

        yield changed, take


def tile_cases(random: Random, folder: Path) -> Iterator[Case]:
    """Tiles whose bytes mean nothing: unpacking reads and writes only what is its own."""
    while True:
        config = list(PRESETS.values())[int(random.integers(len(PRESETS)))]
        side: native.Side = "k" if random.random() < 0.5 else "v"
        d_head = int(random.choice([32, 64, 80, 128, 256]))
        n_bytes = native.tile_describe(config, side, d_head)["bytes"]
        tile = random.integers(0, 256, n_bytes, np.uint8) if random.random() < 0.7 else np.full(n_bytes, random.choice([0, 0xFF, 0x80]), np.uint8)

        def take(config: GearConfig = config, side: native.Side = side, d_head: int = d_head, tile: np.ndarray = tile) -> bool:
            native.tile_unpack(config, side, d_head, tile)
            native.tile_parts(config, side, d_head, tile)
            return True

        yield tile.tobytes(), take


def session_cases(random: Random, folder: Path) -> Iterator[Case]:
    """A saved session, loaded into the context that it is of. Whatever came of that, the context goes on."""
    model = write_model(folder / "model.gguf")
    llm = Llama(str(model), kv_type=GearConfig(tile=64, n_tail=32), n_ctx=1024, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False)
    llm.eval([1, *range(3, 250), *range(3, 250)])
    path, damaged = folder / "session", folder / "damaged"
    llm.save_session(str(path))
    data = path.read_bytes()
    sections = take_apart(data)
    while True:
        if random.random() < 0.2:
            changed = mutated(data, random)
        else:  # contents that only their own checks can refuse
            forged = list(sections)
            i = int(random.integers(len(forged)))
            kind, payload = forged[i]
            if random.random() < 0.8 and payload:
                # what a section begins with says how to read the rest
                n_first = int(random.choice([64, 512, len(payload)]))
                payload = mutated(payload[:n_first], random) + payload[n_first:]
                forged[i] = (kind, payload)
            elif random.random() < 0.5:
                forged.insert(int(random.integers(len(forged))), (int(random.integers(6)), payload))
            else:
                del forged[i]
            changed = put_together(forged)

        def take(changed: bytes = changed) -> bool:
            damaged.write_bytes(changed)
            taken = True
            try:
                llm.load_session(str(damaged))
            except GearError:
                taken = False
            if not taken or llm.n_tokens > 900:
                llm.reset()
            llm.eval([5, 6, 7])
            assert llm.kv_stats()["total"]["n_written"] >= 3
            return taken

        yield changed, take


TARGETS = {"kv_type": kv_type_cases, "setting": setting_cases, "gguf": gguf_cases, "tile": tile_cases, "session": session_cases}


def fuzz(target: str, seconds: float, seed: int) -> int:
    """Run one target in this process; returns the findings."""
    executions, taken, findings = 0, 0, 0
    kept = Path(f"fuzz-{target}.bin").absolute()
    with tempfile.TemporaryDirectory() as folder:
        end = time.monotonic() + seconds
        for data, take in TARGETS[target](np.random.default_rng(seed), Path(folder)):
            if time.monotonic() > end:
                break
            kept.write_bytes(data)  # so that it is there if this is the last one
            executions += 1
            try:
                taken += take()
            except GearError:
                pass
            except Exception:
                findings += 1
                traceback.print_exc()
                kept.rename(kept.with_name(f"fuzz-{target}-{executions}.bin"))
    kept.unlink(missing_ok=True)
    print(f"{target}: {executions} inputs, {taken} taken, {findings} findings (seed {seed})", flush=True)
    return findings


def main() -> int:
    """Each target in a process of its own, which may crash."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"unknown target {', '.join(unknown)}")
    if options.here:
        return fuzz(options.targets[0], options.seconds, options.seed)
    findings = 0
    for target in options.targets or TARGETS:
        command = [sys.executable, __file__, target, "--here", "--seconds", str(options.seconds), "--seed", str(options.seed)]
        status = subprocess.run(command, check=False).returncode
        if status < 0:
            print(f"{target}: killed by signal {-status}; the input is fuzz-{target}.bin", flush=True)
        findings += abs(status)
    return findings


if __name__ == "__main__":
    sys.exit(min(main(), 100))
