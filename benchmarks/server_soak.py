"""`gearcpp serve` under clients that leave, wrong requests and kill -9, while nothing that was saved may be lost and memory must stay flat (Linux).

    python benchmarks/server_soak.py -m smollm2-135m --minutes 60 --clients 6 -t 1 [--kv gear] [--kills 4] [--seed 1] [--log FILE]

Clients ask for whole answers and streams, with a system prompt in common or without; some leave in the middle of one, some send what is wrong. Every
answer is looked at: 200 with its tokens, or for wrong requests a 4xx with OpenAI's error object of one sentence.

In the first half of the run the model's process or the server is killed with SIGKILL, in turns, at times while it saves a slot. Before that a slot was
saved under another name, and what the server says of its prompt from the file was noted (greedily, with probabilities). After each kill: a server without
its model's process says so (503) and stops when it is asked to; a model's process without its server ends by itself; the server that is started then takes
up all files so far, each in a slot drawn by chance, evaluates one token of each prompt, and says the same to the last bit. A file that was being written
over is the old one or the new one; the new one, if that was said to be saved.

The second half is one server's. Its memory is judged from the end of its first third to the end, at moments without work: the sum of what both processes
have resident may grow by 2 % (at least 8 MiB). The exit status is 1 when it grew by more, or when anything above was not so. A line of figures is printed
every 20 seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from gearcpp.model_files import bundled_model, model_argument

MIB = 2**20
PATIENCE = 300.0  # seconds after which something that should happen has not
WORDS = "the of and to in a was that his he it with as had for her not at on by she but be him which from you they all were have said one me would".split()  # noqa: SIM905
SYSTEM = " ".join(random.Random("system").choices(WORDS, k=200))
N_KEPT = 400  # tokens of a prompt whose slot is saved
OVER = "over.bin"  # the file that is written over

Reply = tuple[int, dict[str, Any]]


class Server:
    """One life of `gearcpp serve`."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        command = [sys.executable, "-m", "gearcpp", "serve", "--port", "0", "-m", str(args.model), "-t", str(args.threads), "-c", str(args.ctx_size)]
        command += ["-np", str(args.parallel), "--kv", args.kv, "--chat-template", "chatml"]
        self._log = (folder / "server.log").open("w+")
        self.process = subprocess.Popen(
            [*command, "--", "--cache-ram", str(args.cache_ram), "--slot-save-path", str(folder)], stdout=subprocess.DEVNULL, stderr=self._log
        )
        self.port = self._listening()
        (self.worker,) = (int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split())

    def _listening(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"listening on http://\S+:(\d+)/v1", self.text):
                return int(found[1])
            time.sleep(0.05)
        raise SystemExit(f"the server did not start:\n{self.text}")

    @property
    def text(self) -> str:
        """Its log."""
        return Path(self._log.name).read_text()

    def post(self, path: str, body: bytes | dict[str, Any]) -> Reply:
        """Status and JSON."""
        with self.asked(path, body) as response:
            return response.status, json.loads(response.read())

    @contextmanager
    def asked(self, path: str, body: bytes | dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        """A response; who leaves the block leaves the server."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), {"Content-Type": "application/json"})
            yield connection.getresponse()

    def get(self, path: str) -> tuple[int, str]:
        """Status and text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def n_working(self) -> int:
        """Requests that the gate or llama.cpp's server has."""
        numbers = re.findall(
            r"^(?:gearcpp_requests_running|gearcpp_requests_waiting|llamacpp:requests_processing)\S* (\S+)$", self.get("/metrics")[1], re.M
        )
        return round(sum(map(float, numbers)))

    def resident(self) -> tuple[int, int]:
        """Bytes of both processes."""
        gate, worker = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") for pid in (self.process.pid, self.worker))
        return gate, worker

    def stop(self) -> int:
        """As a user does. Its exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE)

    def end(self) -> None:
        """Whatever it does."""
        for pid in (self.process.pid, self.worker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


class Soak:
    """A run: its server, its clients, what was saved, what went wrong."""

    def __init__(self, args: argparse.Namespace, folder: Path, log: TextIO) -> None:
        self.args, self.folder, self.log = args, folder, log
        self.random = random.Random(f"{args.seed}")
        self.start = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []  # what was not as it must be
        self.kept: dict[str, tuple[list[int], Any]] = {}  # by file: its prompt, and what was said of it
        self.server = Server(args, folder)
        self._may_ask, self._stopped = threading.Event(), threading.Event()
        self._lock, self._n_asking = threading.Condition(), 0
        self._clients = [threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(args.clients)]
        for client in self._clients:
            client.start()

    # Clients

    def _client(self, index: int) -> None:
        random_ = random.Random(f"{self.args.seed} {index}")
        while not self._stopped.is_set():
            self._may_ask.wait(1)
            with self._lock:
                if not self._may_ask.is_set():
                    continue
                self._n_asking += 1
                server = self.server
            try:
                self._request(server, random_)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                if self._may_ask.is_set() and server is self.server:  # else it was killed under the client
                    self.is_so(False, f"a client got {type(error).__name__}: {error}")
            finally:
                with self._lock:
                    self._n_asking -= 1
                    self._lock.notify_all()

    def _request(self, server: Server, random_: random.Random) -> None:
        text = " ".join(random_.choices(WORDS, k=random_.choice((8, 40, 200, 400))))
        n = random_.choice((4, 16, 48))
        chance = random_.random()
        if chance < 0.15:
            path, body = random_.choice(self._wrong_requests())
            status, answer = server.post(path, body)
            if self._is_up(server):
                message = answer["error"]["message"]
                self.is_so(400 <= status < 500 and message and "\n" not in message, f"{path} with {body!r:.80} got {status} {answer}")
                self.counts["wrong requests"] += 1
        elif chance < 0.4:
            with server.asked("/v1/completions", {"prompt": text, "max_tokens": 4 * n, "stream": True, "ignore_eos": True}) as response:
                for _ in range(random_.choice((0, 1, 5))):
                    response.readline()
            self.counts["left"] += 1
        elif chance < 0.7:
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
            status, answer = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": n, "ignore_eos": True})
            self._is_whole(server, status, answer, n)
        else:
            status, answer = server.post("/v1/completions", {"prompt": text, "max_tokens": n, "ignore_eos": True})
            self._is_whole(server, status, answer, n)

    def _is_whole(self, server: Server, status: int, answer: dict[str, Any], n: int) -> None:
        if self._is_up(server):
            self.is_so(status == 200 and answer["usage"]["completion_tokens"] == n, f"an answer of {n} tokens was {status} {answer!r:.300}")
            self.counts["answers"] += 1
            self.counts["tokens"] += n

    def _wrong_requests(self) -> list[tuple[str, bytes | dict[str, Any]]]:
        return [
            ("/v1/chat/completions", b'{"messages": ['),
            ("/v1/chat/completions", {"messages": []}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}),
            ("/v1/completions", {"prompt": "x", "best_of": 3}),
            ("/v1/completions", {"prompt": " ".join(WORDS * self.args.ctx_size)}),
            ("/v1/completions", {"prompt": "x", "grammar": "root ::= ("}),
            ("/v1/absent", {}),
        ]

    def _is_up(self, server: Server) -> bool:
        return server is self.server and self._may_ask.is_set()

    # Conduct

    def is_so(self, condition: Any, otherwise: str) -> None:
        """Note what is not."""
        if not condition:
            with self._lock:
                self.wrong.append(otherwise)
            self.say(f"WRONG: {otherwise}")

    def say(self, line: str) -> None:
        """A line with its time."""
        print(f"{(time.monotonic() - self.start) / 60:6.2f} {line}", file=self.log, flush=True)

    def figures(self) -> int:
        """A line of figures. Returns resident bytes."""
        gate, worker = self.server.resident()
        counted = ", ".join(f"{n} {what}" for what, n in sorted(self.counts.items()))
        self.say(f"{counted}; resident {gate / MIB:.1f} + {worker / MIB:.1f} MiB; {len(self.wrong)} wrong")
        return gate + worker

    def pause(self) -> None:
        """Until no client asks and the server has no work, that of clients who left included."""
        self._may_ask.clear()
        with self._lock:
            self.is_so(self._lock.wait_for(lambda: not self._n_asking, PATIENCE), "clients still wait for their answers")
        deadline = time.monotonic() + 30
        while (n := self.server.n_working()) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.is_so(not n, f"the server has work for {n} requests, and no clients")

    def run_clients(self, seconds: float) -> None:
        """Let clients ask; figures every 20 seconds."""
        self._may_ask.set()
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 20))
            self.figures()

    def run(self) -> bool:
        """All of it. Whether everything was so."""
        seconds = self.args.minutes * 60
        for kill in range(self.args.kills):
            self.run_clients(max(1.0, (kill + 1) * seconds / 2 / (self.args.kills + 1) - (time.monotonic() - self.start)))
            self.pause()
            self.keep(f"{kill}.bin")
            self._may_ask.set()
            time.sleep(self.random.random() * 3)
            self.kill(of_worker=kill % 2 == 0, while_saving=kill % 4 > 1 or self.args.kills < 3)
            self.take_up()
        begin, end = time.monotonic(), self.start + seconds
        resident: list[tuple[float, int]] = []  # by time, at rest
        while (now := time.monotonic()) < end or len(resident) < 3:
            self.run_clients(min(30.0, max(5.0, end - now)))
            self.pause()
            self.server.post("/v1/completions", {"prompt": "the end", "max_tokens": 1})
            resident.append((time.monotonic() - begin, self.figures()))
        self._stopped.set()
        took = resident[-1][0]
        early = max(n for at, n in resident if at <= max(took / 3, resident[0][0]))
        late, allowed = resident[-1][1], max(0.02 * early, 8 * MIB)
        self.say(f"resident at rest: {early / MIB:.1f} MiB in the first third of {took / 60:.1f} minutes, {(late - early) / MIB:+.1f} at the end")
        self.is_so(late - early <= allowed, f"memory grew by more than {allowed / MIB:.1f} MiB")
        self.is_so(self.server.stop() in (0, 130), "the server did not stop when it was asked to")
        self.is_so("Traceback" not in self.server.text, self.server.text[-2000:])
        self.say(f"{len(self.kept)} files, {self.args.kills} kills, {self.counts['taken up']} times taken up: {len(self.wrong)} wrong")
        return not self.wrong

    def keep(self, name: str) -> None:
        """Save a slot, and note what the server says from the file."""
        slot, prompt = self._evaluated()
        status, answer = self.server.post(f"/slots/{slot}?action=save", {"filename": name})
        self.is_so(status == 200 and answer["n_saved"] >= N_KEPT, f"saving got {status} {answer!r:.200}")
        self.kept[name] = (prompt, self._said(self._restored(name), prompt))
        self.say(f"saved {name}")

    def _evaluated(self) -> tuple[int, list[int]]:
        """A new prompt, and the slot that it is in."""
        prompt, slot = [self.random.randrange(300, 2000) for _ in range(N_KEPT)], self.random.randrange(self.args.parallel)
        status, answer = self.server.post("/completion", {"prompt": prompt, "n_predict": 8, "temperature": 0, "id_slot": slot})
        self.is_so(status == 200, f"a prompt to be kept got {status} {answer!r:.200}")
        return slot, prompt

    def _restored(self, name: str) -> int:
        """The slot that a file was restored to."""
        slot = self.random.randrange(self.args.parallel)
        status, answer = self.server.post(f"/slots/{slot}?action=restore", {"filename": name})
        self.is_so(status == 200 and answer["n_restored"] >= N_KEPT, f"restoring {name} got {status} {answer!r:.200}")
        return slot

    def _said(self, slot: int, prompt: list[int]) -> Any:
        """What it says of a prompt that is in a slot; None: that is not in it."""
        asked = {"prompt": prompt, "n_predict": 8, "temperature": 0, "id_slot": slot, "n_probs": 3}
        status, answer = self.server.post("/completion", asked)
        if status != 200 or answer["timings"]["cache_n"] != N_KEPT - 1:
            return None
        return [(top["id"], top["logprob"]) for token in answer["completion_probabilities"] for top in token["top_logprobs"]]

    def kill(self, *, of_worker: bool, while_saving: bool) -> None:
        """One of the processes; look at what the other does; start a server."""
        server, said = self.server, []
        over: list[int] = []
        if while_saving:
            self.pause()
            self.keep(OVER)
            slot, over = self._evaluated()

        def save() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                said.append(server.post(f"/slots/{slot}?action=save", {"filename": OVER})[0])

        saving = threading.Thread(target=save)
        if while_saving:
            saving.start()
            time.sleep(self.random.random() * 0.03)
        self._may_ask.clear()
        os.kill(server.worker if of_worker else server.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE
        if of_worker:
            while (status := server.get("/health")[0]) != 503 and time.monotonic() < deadline:
                time.sleep(0.05)
            self.is_so(status == 503, f"/health says {status} of a model without a process")
            status, answer = server.post("/v1/completions", {"prompt": "x"})
            self.is_so(status == 503 and "\n" not in answer["error"]["message"], f"without the model's process a request got {status} {answer}")
            self.is_so(server.stop() in (0, 130), "a server without its model's process did not stop")
        else:
            server.process.wait()
            while is_running(server.worker) and time.monotonic() < deadline:
                time.sleep(0.05)
            self.is_so(not is_running(server.worker), "the model's process outlives its server")
        self.say(f"killed {'the model' if of_worker else 'the server'}{' while it saved a slot' if while_saving else ''}")
        if while_saving:
            saving.join()
        server.end()
        self.server = Server(self.args, self.folder)
        if while_saving:
            prompt, before = self.kept.pop(OVER)
            has_old = self._said(self._restored(OVER), prompt) == before
            has_new = self._said(self._restored(OVER), over) is not None
            self.is_so(has_new or (has_old and 200 not in said), "a file that was being written over is neither the old nor the new one")
            self.say(f"the file is the {'new' if has_new else 'old'} one; {'it was' if 200 in said else 'nothing was'} said to be saved")

    def take_up(self) -> None:
        """All files that were said to be saved."""
        for name, (prompt, before) in self.kept.items():
            said = self._said(self._restored(name), prompt)
            self.is_so(said is not None, f"{name} was evaluated again")
            self.is_so(said == before, f"{name} says something else now")
            self.counts["taken up"] += 1
        self.say(f"took up {len(self.kept)} files")


def is_running(pid: int) -> bool:
    """Not so of a process that waits for its parent to ask for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=model_argument, default=None, help="GGUF file, or a name such as smollm2-135m; default: the bundled one")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--kv", default="gear")
    parser.add_argument("-c", "--ctx-size", type=int, default=2048)
    parser.add_argument("-np", "--parallel", type=int, default=4)
    parser.add_argument("--cache-ram", type=int, default=16, help="MiB of the prompt cache (default: 16, so that it is full soon)")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, help="a file for what is printed")
    args = parser.parse_args()
    args.model = args.model or bundled_model()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        log = stack.enter_context(args.log.open("a")) if args.log else sys.stdout
        soak = Soak(args, Path(folder), log)
        try:
            is_well = soak.run()
        finally:
            soak.server.end()
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
