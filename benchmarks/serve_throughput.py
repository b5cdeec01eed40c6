"""How many tokens a second a server gives to 1, 4 and 8 clients: requests decoded together, one after the other, and by llama-server.

    python benchmarks/serve_throughput.py -m model.gguf -t 2 --kv gear --clients 1,4,8 --prompt 512 --predict 128 [--llama-server PATH]
    python benchmarks/serve_throughput.py --shape llama-8b:4 ...      # a model of random weights, as in `gearcpp bench`, with a vocabulary

Every client sends one streamed request after another; all of them have the same number of prompt words and answer with the same number of tokens (the end
token is forbidden). The servers are started once and wait, without work, for their turn; each repetition goes through all of them, forwards and backwards
in turns, so that a busy machine disturbs all alike. Prompts are new in every request, but for the first --shared words, which all have in common.

What is printed, for each server and number of clients: generated tokens a second over all clients (median of the repetitions, lowest and highest), the
median time to the first token, and the ratio to one request after the other.

llama-server runs with the same threads, context, number of sequences (unified) and flash attention, and a q8_0 or f16 cache (--llama-cache).
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gearcpp.model_files import model_argument

STARTUP = 600.0  # seconds for a model to load
# Words that any vocabulary has as one or two tokens.
WORDS = "the of and to in a was that his he it with as had for her not at on by she but be him which from you they all were have said one me would".split()  # noqa: SIM905
# What shaped_model makes tokens of.
CHARACTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 2048)]


@dataclass
class Run:
    """One server with one number of clients."""

    tokens_per_second: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)


def main() -> None:
    args = parse()
    if args.shape:
        args.model = shaped_model(args.shape)
    clients = [int(n) for n in args.clients.split(",")]
    commands = server_commands(args, max(clients))
    with ExitStack() as stack:
        ports = {name: stack.enter_context(started(command)) for name, command in commands.items()}
        for port in ports.values():
            measure(port, 1, args, random.Random("warm"), n_requests=1)  # warm
        runs = {(name, n): Run() for name in ports for n in clients}
        start = time.monotonic()
        for repetition in range(args.repetitions):
            seconds = time.monotonic() - start
            if repetition and seconds * (repetition + 1) / repetition > 60 * args.minutes:
                print(f"# {repetition} repetitions: one more would go beyond {args.minutes:g} minutes", file=sys.stderr)
                break
            order = list(runs)
            for name, n in order if repetition % 2 == 0 else reversed(order):
                result = measure(ports[name], n, args, random.Random(f"{repetition} {n}"))
                runs[name, n].tokens_per_second.append(result[0])
                runs[name, n].first_token += result[1]
                print(f"# {repetition} {name} {n} clients: {result[0]:.1f} t/s", file=sys.stderr)
    report(runs, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=model_argument, help="GGUF file, or a name such as smollm2-135m; default: the bundled one")
    parser.add_argument("--shape", help="instead: a model of random weights, NAME[:LAYERS] of `gearcpp bench --shape`")
    parser.add_argument("--kv", default="gear", help="cache types of gearcpp, a list (default: gear)")
    parser.add_argument("--clients", default="1,4,8")
    parser.add_argument("--prompt", type=int, default=256, help="words of a prompt")
    parser.add_argument("--shared", type=int, default=0, help="of them, at the beginning, in common")
    parser.add_argument("--predict", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=2, help="of each client, one after the other")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5.0, help="begin no repetition that would end later (default: 5)")
    parser.add_argument("-c", "--ctx-size", type=int, default=8192)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--llama-server", type=Path, help="a llama-server to compare with")
    parser.add_argument("--llama-cache", default="f16,q8_0", help="its cache types, a list (default: f16,q8_0)")
    parser.add_argument("--json", action="store_true", help="all numbers, for programs")
    return parser.parse_args()


def shaped_model(shape: str) -> Path:
    """A model of `gearcpp bench` with a vocabulary: three special tokens, the bytes, and Chinese characters, each of which is one token."""
    import gguf
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    from gearcpp.cli.bench._shapes import named_model

    _, source = named_model(shape)
    path = source.with_name(f"{source.stem}-vocabulary.gguf")
    if path.exists():
        return path
    reader = gguf.GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    n_vocab = int(reader.fields[f"{arch}.vocab_size"].contents())
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS]
    tokens += [f"token{i}" for i in range(len(tokens), n_vocab)]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, *[gguf.TokenType.BYTE] * 256]
    types += [gguf.TokenType.NORMAL] * (n_vocab - len(types))
    kind = gguf.GGUFValueType
    metadata = {
        "tokenizer.ggml.model": MetadataDetails(kind.STRING, "llama"),
        "tokenizer.ggml.tokens": MetadataDetails(kind.ARRAY, tokens[:n_vocab]),
        "tokenizer.ggml.scores": MetadataDetails(kind.ARRAY, [0.0] * n_vocab),
        "tokenizer.ggml.token_type": MetadataDetails(kind.ARRAY, [int(value) for value in types[:n_vocab]]),
        "tokenizer.ggml.bos_token_id": MetadataDetails(kind.UINT32, 1),
        "tokenizer.ggml.eos_token_id": MetadataDetails(kind.UINT32, 2),
        "tokenizer.ggml.add_space_prefix": MetadataDetails(kind.BOOL, False),
    }
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        copy_with_new_metadata(reader, gguf.GGUFWriter(unfinished, arch), metadata, [])
        unfinished.replace(path)
    return path


def server_commands(args: argparse.Namespace, n_parallel: int) -> dict[str, list[str]]:
    """What to start under which name; {port} stands for a free one."""
    shared = ["-c", str(args.ctx_size), "-t", str(args.threads), "--port", "{port}"]
    model = ["-m", str(args.model)] if args.model else []
    commands = {}
    for kv in args.kv.split(","):
        for label, n in ((f"{kv}, one after the other", 1), (f"{kv}, together", n_parallel)):
            commands[label] = [sys.executable, "-m", "gearcpp", "serve", *model, *shared, "--kv", kv, "-np", str(n), "--queue", "1000"]
    if args.llama_server:
        if not args.model:
            raise SystemExit("--llama-server needs -m")
        for cache in args.llama_cache.split(","):
            options = ["-np", str(n_parallel), "-kvu", "-fa", "on", "-ctk", cache, "-ctv", cache, "--no-webui", "-tb", str(args.threads)]
            commands[f"llama-server {cache}"] = [str(args.llama_server), *model, *shared, *options]
    return commands


@contextmanager
def started(command: list[str]) -> Iterator[int]:
    """A server that answers /health; its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+b") as log:
        process = subprocess.Popen([part.replace("{port}", str(port)) for part in command], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + STARTUP
            while not is_healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"{' '.join(command)} did not start:\n{log.read().decode(errors='replace')[-3000:]}")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def measure(port: int, n_clients: int, args: argparse.Namespace, randomness: random.Random, n_requests: int = 0) -> tuple[float, list[float]]:
    """Generated tokens a second over all clients, and each request's seconds to the first token."""
    n_requests = n_requests or args.requests
    prompts = [[prompt(args, randomness) for _ in range(n_requests)] for _ in range(n_clients)]
    first_token: list[float] = []
    failures: list[BaseException] = []
    barrier = threading.Barrier(n_clients + 1)

    def client(own: list[str]) -> None:
        barrier.wait()
        try:
            first_token.extend(request(port, text, args.predict) for text in own)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(own,)) for own in prompts]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if failures:
        raise SystemExit(f"a request failed: {failures[0]!r}")
    return n_clients * n_requests * args.predict / seconds, first_token


def prompt(args: argparse.Namespace, randomness: random.Random) -> str:
    words, space = (CHARACTERS, "") if args.shape else (WORDS, " ")
    common = random.Random(1).choices(words, k=args.shared)
    return space.join([*common, *randomness.choices(words, k=args.prompt - args.shared)])


def request(port: int, text: str, n_predict: int) -> float:
    """Stream one answer to its end; seconds to its first token. min_tokens is gearcpp's way to forbid the end, ignore_eos llama-server's."""
    body: dict[str, Any] = {"prompt": text, "max_tokens": n_predict, "stream": True, "temperature": 0.8, "min_tokens": n_predict, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(response.read().decode(errors="replace"))
    first = None
    reason = None
    for line in response:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            reason = chunk["choices"][0]["finish_reason"] or reason
    connection.close()
    if reason != "length" or first is None:
        raise RuntimeError(f"an answer ended by {reason!r} instead of its length")
    return first


def report(runs: dict[tuple[str, int], Run], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps([{"server": name, "clients": n, **vars(run)} for (name, n), run in runs.items()], indent=1))
        return
    print(f"prompt {args.prompt} words ({args.shared} in common), answer {args.predict} tokens, {args.threads} threads, context {args.ctx_size}\n")
    print("| server | clients | tokens/s (lowest, highest) | first token, s | against one after the other |")
    print("|---|---|---|---|---|")
    for (name, n), run in runs.items():
        base = runs.get((name.split(",")[0] + ", one after the other", n)) or next(iter(runs.values()))
        ratios = [a / b for a, b in zip(run.tokens_per_second, base.tokens_per_second, strict=True)]
        rate = f"{statistics.median(run.tokens_per_second):.1f} ({min(run.tokens_per_second):.1f}, {max(run.tokens_per_second):.1f})"
        print(f"| {name} | {n} | {rate} | {statistics.median(run.first_token):.2f} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
