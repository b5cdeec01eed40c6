"""Every architecture of tests/families.py at length: the presets' errors, and those of each side of each layer when it is lost.

    python benchmarks/families.py [NAME ...] --tokens 1000

A row for each architecture: what its layers are, the error of packed logits against their spread (gear, gear2), the least error that the loss of one
side of one packed layer makes, and whether the bytes are those foretold. An error of gear above a third of that loss is marked.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from families import FAMILIES, write_family
from models import N_VOCAB

from gearcpp import GearError, Llama
from gearcpp.cache.allocation import GEAR, Allocation, allocated

N_UBATCH = 64


def logits(path: Path, kv_type: Any, tokens: list[int], codec: Any = None) -> tuple[np.ndarray, Llama]:
    """Logits of the second half of the tokens, and the model that gave them."""
    arguments = {"codec": codec} if codec else {}
    llm = Llama(
        str(path), kv_type=kv_type, n_ctx=len(tokens), n_batch=N_UBATCH, n_ubatch=N_UBATCH, flash_attn=True, logits_all=True, verbose=False, **arguments
    )
    llm.eval(tokens)
    return np.array(llm.scores[len(tokens) // 2 : len(tokens)], np.float64), llm


def relative(scores: np.ndarray, reference: np.ndarray) -> float:
    """The error against the spread of the logits."""
    return float(np.linalg.norm(scores - reference) / np.linalg.norm(reference - reference.mean(axis=1, keepdims=True)))


def examine(name: str, path: Path, n_tokens: int) -> str:
    """One row."""
    tokens = [1, *np.random.default_rng(1).integers(3, N_VOCAB, n_tokens - 1).tolist()]
    reference, llm = logits(path, "f16", tokens)
    llm.close()
    errors = {}
    for preset in ("gear2", "gear"):
        scores, llm = logits(path, preset, tokens)
        errors[preset] = relative(scores, reference)
        stats, info = llm.kv_stats(), llm.info
        llm.close()
    packed = sorted({layer["il"] for layer in stats["layers"] if layer["kind"] == GEAR})
    losses = {}
    for il in packed:
        for lost_side in ("k", "v"):

            def lose(at: int, side: str, head: int, x: np.ndarray, *_: Any, il: int = il, lost: str = lost_side) -> tuple[np.ndarray, float]:
                return (0 * x if (at, side) == (il, lost) else x), 1.0

            scores, llm = logits(path, "gear", tokens, lose)
            losses[il, lost_side] = relative(scores, reference)
            llm.close()
    sides = allocated(llm.kv_type, info, Allocation(-(-n_tokens // 256) * 256, N_UBATCH))
    foretold = sum(side.n_bytes for side in sides) == stats["total"]["bytes"]
    least = min(losses.values(), default=float("nan"))
    mark = "" if errors["gear"] < least / 3 else " !"
    return f"| {name} | {stats['summary']} | {errors['gear']:.4f}{mark} | {errors['gear2']:.4f} | {least:.4f} | {'yes' if foretold else 'NO'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, default=1000)
    options = parser.parse_args()
    print("| architecture | layers | error, gear | gear2 | least loss | bytes as foretold |\n|---|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names:
            try:
                print(examine(name, write_family(Path(folder) / f"{name}.gguf", name), options.tokens), flush=True)
            except GearError as error:
                print(f"| {name} | {error} | | | | |", flush=True)


if __name__ == "__main__":
    main()
