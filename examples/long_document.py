"""Questions about a long document, which the model reads once.

    python examples/long_document.py -m model.gguf book.txt "Who is the narrator?" "Where does it end?"

The packed cache of the document goes into a session file beside it. The next run loads that instead of reading the document again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gearcpp import Llama


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="GGUF file")
    parser.add_argument("document", type=Path, help="UTF-8 text")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--kv", default="gear", help="kv_type of the cache")
    parser.add_argument("-c", "--ctx-size", type=int, default=32768)
    parser.add_argument("-n", "--predict", type=int, default=128, help="most tokens of an answer")
    args = parser.parse_args()

    llm = Llama(args.model, kv_type=args.kv, n_ctx=args.ctx_size, verbose=False)
    document = llm.tokenize(args.document.read_bytes())
    most = llm.n_ctx() - 256 - args.predict
    if len(document) > most:
        raise SystemExit(f"the document has {len(document)} tokens, and the context has room for {most}: give a larger -c")

    session = args.document.with_suffix(".gear")
    if session.exists():
        llm.load_session(session)
        print(f"loaded {llm.n_tokens} tokens from {session}")
    else:
        llm.eval(document)
        n_bytes = llm.save_session(session)
        print(f"read {llm.n_tokens} tokens; {session} has {n_bytes / 2**20:.1f} MiB")

    for question in args.questions:
        # A prompt that begins with the tokens in the cache: only the question is evaluated.
        prompt = document + llm.tokenize(f"\n\nQuestion: {question}\nAnswer:".encode(), add_bos=False)
        answer = llm.create_completion(prompt, max_tokens=args.predict, temperature=0.0, stop=["\n\n"])
        print(f"{question}\n  {answer['choices'][0]['text'].strip()}")  # type: ignore[index]


if __name__ == "__main__":
    main()
