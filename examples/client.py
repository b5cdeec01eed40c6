"""A client of `gearcpp serve`: several questions at once over one system prompt, streamed.

    gearcpp serve -m model.gguf -c 16384 --parallel 4
    python examples/client.py http://127.0.0.1:8080/v1 "What is a key?" "What is a value?"

The server decodes them together.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import OpenAI

SYSTEM = "You answer questions about attention in transformers, in one sentence each."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="base URL of the server, such as http://127.0.0.1:8080/v1")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--plain", action="store_true", help="complete text instead of a chat: for models without a chat template")
    parser.add_argument("-n", "--predict", type=int, default=64, help="most tokens of an answer")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key=os.environ.get("GEARCPP_API_KEY", "none"))
    model = client.models.list().data[0].id

    def ask(question: str) -> str:
        chunks: Any
        if args.plain:
            prompt = f"{SYSTEM}\n\nQuestion: {question}\nAnswer:"
            chunks = client.completions.create(model=model, prompt=prompt, max_tokens=args.predict, stream=True)
            return "".join(chunk.choices[0].text for chunk in chunks)
        messages: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        chunks = client.chat.completions.create(model=model, messages=messages, max_tokens=args.predict, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(len(args.questions)) as pool:
        for question, answer in zip(args.questions, pool.map(ask, args.questions), strict=True):
            print(f"{question}\n  {answer.strip()}")


if __name__ == "__main__":
    main()
