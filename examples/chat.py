"""A chat on a compressed cache.

    python examples/chat.py -m model.gguf --kv gear3

Type a message and Enter; Ctrl-D ends the chat. `gearcpp chat` is the same with history, sessions and commands.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from gearcpp import Llama


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="GGUF file")
    parser.add_argument("--kv", default="gear", help="kv_type of the cache")
    parser.add_argument("-c", "--ctx-size", type=int, default=8192)
    parser.add_argument("-n", "--predict", type=int, default=256, help="most tokens of an answer")
    args = parser.parse_args()

    llm = Llama(args.model, kv_type=args.kv, n_ctx=args.ctx_size, verbose=False)
    messages: list[Any] = []
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        answer = ""
        # The cache still holds the earlier messages: llama-cpp-python evaluates only what the prompt adds to them.
        for chunk in llm.create_chat_completion(messages, max_tokens=args.predict, stream=True):
            piece = chunk["choices"][0]["delta"].get("content") or ""  # type: ignore[index]
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})

    total = llm.kv_stats()["total"]
    print(f"{llm.n_tokens} tokens in the cache: {total['bytes'] / 2**20:.1f} MiB reserved, {total['bytes_f16'] / 2**20:.1f} MiB as f16")


if __name__ == "__main__":
    main()
