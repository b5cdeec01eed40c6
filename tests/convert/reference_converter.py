"""Runs llama.cpp's own converter, which refuses tokenizers that it has not seen: it is told the pre-tokenizer that ours found.

usage: reference_converter.py LLAMA_CPP_SOURCE PRE FOLDER OUTPUT OUTTYPE [OPTION ...]
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    source, pre, folder, output, outtype, *options = sys.argv[1:]
    sys.path[:0] = [source, f"{source}/gguf-py"]  # its own gguf, which is newer than the published one
    from conversion import base

    for value in vars(base).values():
        if isinstance(value, type) and "get_vocab_base_pre" in vars(value):
            value.get_vocab_base_pre = lambda self, tokenizer: pre  # type: ignore[attr-defined]
    script = f"{source}/convert_hf_to_gguf.py"
    sys.argv = [script, folder, "--outfile", output, "--outtype", outtype, *options]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
