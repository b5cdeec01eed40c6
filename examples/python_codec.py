"""A codec of your own, in numpy, in the place of the native one.

    python examples/python_codec.py -m model.gguf text.txt

llama.cpp calls `codec` whenever a tile of one KV head is packed, and attention reads what it returns. The script prints how well the model predicts a text
with it, with f16 and with gearcpp's own codec. No memory is saved: what the codec returns is kept as f16.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from gearcpp import Llama

BITS = 3


def codec(il: int, side: str, head: int, x: np.ndarray, written: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, float]:
    """Quantize each row to BITS bits between its lowest and its highest value.

    Args:
        il, side, head: layer, "k" or "v", and KV head.
        x: rows, f32 [n_token, d_head].
        written: which rows there are, bool [n_token].
        cells: their cells in the cache, i64 [n_token].

    Returns:
        The reconstruction of x, and the bytes that a packed form would take.
    """
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale = np.maximum(high - low, 1e-6) / (2**BITS - 1)
    codes = np.round((x - low) / scale)
    n_bytes = written.sum() * (x.shape[1] * BITS / 8 + 4)  # the codes, and scale and zero as f16
    return low + scale * codes, float(n_bytes)


def nats_per_token(model: str, tokens: list[int], **arguments: Any) -> tuple[float, dict[str, Any]]:
    """Mean negative log-likelihood of the second half of the tokens, and what the cache holds."""
    llm = Llama(model, n_ctx=len(tokens), n_batch=128, n_ubatch=128, logits_all=True, verbose=False, **arguments)
    llm.eval(tokens)
    logits = llm.scores[: len(tokens) - 1].astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(tokens) - 1), tokens[1:]]
    total = llm.kv_stats()["total"]
    llm.close()
    return float(losses[len(tokens) // 2 :].mean()), total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="GGUF file")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("-c", "--ctx-size", type=int, default=2048, help="tokens of the text to read")
    args = parser.parse_args()

    vocabulary = Llama(args.model, vocab_only=True, verbose=False)
    tokens = vocabulary.tokenize(args.text.read_bytes())[: args.ctx_size]
    vocabulary.close()
    for name, arguments in (("f16", {"kv_type": "f16"}), ("gear3", {"kv_type": "gear3"}), ("codec", {"codec": codec})):
        nats, total = nats_per_token(args.model, tokens, **arguments)
        bits = total.get("codec_bits_per_element", total["bits_per_element"])
        print(f"{name:6} {nats:.4f} nats per token, {bits:.2f} bits per element")


if __name__ == "__main__":
    main()
