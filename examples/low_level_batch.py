"""Several sequences in one batch, through llama.cpp's low-level API.

    python examples/low_level_batch.py -m model.gguf "Once upon a time" --sequences 4

The prompt is evaluated once. `llama_memory_seq_cp` gives its cells to every sequence, packed tiles included; then each batch holds the next token of each.
"""

from __future__ import annotations

import argparse
import ctypes
from contextlib import ExitStack, closing
from typing import Any

import llama_cpp
import numpy as np

import gearcpp
from gearcpp.runtime.context import Batch, Context, Model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="GGUF file")
    parser.add_argument("prompt")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--kv", default="gear", help="kv_type of the cache")
    parser.add_argument("-c", "--ctx-size", type=int, default=4096, help="cells that the sequences share")
    parser.add_argument("-n", "--predict", type=int, default=32, help="tokens of each sequence")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    random = np.random.default_rng(args.seed)
    with ExitStack() as stack:
        # Closed in the opposite order: context, model, and the device last of all.
        params, device = gearcpp.model_params(args.model, args.kv)
        if device:
            stack.callback(device.close)
        model = stack.enter_context(closing(Model(gearcpp.read_model_info(args.model), params, device)))
        fields = {"n_ctx": args.ctx_size, "n_seq_max": args.sequences, "kv_unified": True}
        context = stack.enter_context(closing(Context(model, gearcpp.context_params(args.kv, **fields), args.kv)))

        prompt = model.tokenize(args.prompt.encode())
        batch = Batch(max(len(prompt), args.sequences))
        batch.add(0, 0, prompt, logits=True)
        context.decode(batch)
        logits = np.repeat(context.logits(1), args.sequences, axis=0)  # [n_sequence, n_vocab]
        memory = llama_cpp.llama_get_memory(context.handle)
        for sequence in range(1, args.sequences):
            llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)

        texts = [b""] * args.sequences
        for i in range(args.predict):
            # Sampled from the softmax of the logits: its likeliest token after noise of a Gumbel distribution.
            tokens = (logits + random.gumbel(size=logits.shape)).argmax(1)
            batch.clear()
            for sequence, token in enumerate(tokens):
                texts[sequence] += piece(model.vocab, int(token))
                batch.add(sequence, len(prompt) + i, [token], logits=True)
            context.decode(batch)
            logits = context.logits(args.sequences)
        for sequence, text in enumerate(texts):
            print(f"{sequence}: {args.prompt}{text.decode('utf-8', 'replace')}")


def piece(vocab: Any, token: int) -> bytes:
    """The text of a token."""
    buffer = ctypes.create_string_buffer(256)
    n = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, False)
    return buffer.raw[: max(n, 0)]


if __name__ == "__main__":
    main()
