"""What llama.cpp's server keeps of slots holds packed tiles: its prompt cache, and slot files."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import write_family
from server_process import PATIENCE, Server, serve

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="states are packed where libraries are of ELF")
_F16_BYTES = 3 * 1024  # of a token in the bundled model's cache


def post(server: Server, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    """Status and JSON."""
    request = urllib.request.Request(server.url + path, json.dumps(fields).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(server: Server, prompt: list[int], n_predict: int = 8) -> tuple[int, str]:
    """Tokens of the prompt that were not evaluated, because they were there, and the answer."""
    status, answer = post(server, "/completion", prompt=prompt, n_predict=n_predict, temperature=0)
    assert status == 200, answer
    return int(answer["timings"]["cache_n"]), str(answer["content"])


def prompts(random: np.random.Generator, n: int, n_tokens: int) -> list[list[int]]:
    """Prompts that have nothing in common."""
    return [[i + 300, *random.integers(300, 4000, n_tokens - 1).tolist()] for i in range(n)]


def test_the_prompt_cache_holds_tiles(random: np.random.Generator) -> None:
    n_tokens, n_mib = 1500, 8
    asked = prompts(random, 9, n_tokens)
    with serve("-c", "2048", "-np", "1", "--kv", "gear3", "--", "--cache-ram", str(n_mib)) as server:
        first = [ask(server, prompt) for prompt in asked]
        again = [ask(server, prompt) for prompt in reversed(asked)]
        assert "gearcpp E" not in server.log
    assert [n for n, _ in first] == [0] * len(asked)
    n_same = sum(text == before for (_, text), (_, before) in zip(reversed(again), first, strict=True))
    assert n_same >= 7  # an answer may turn out another, since its prompt was read before it was packed; of another prompt's state all would
    kept = [n == n_tokens - 1 for n, _ in again]
    n_kept = kept.index(False) - 1  # without the one that is in the slot
    assert n_kept >= 3 * (n_mib * 2**20 // (n_tokens * _F16_BYTES)), again
    assert not any(kept[n_kept + 1 :])  # the limit is kept to


def test_a_prompt_comes_back_in_another_slot(random: np.random.Generator) -> None:
    """The prompt cache is on by default: what it holds of a slot that was taken is not evaluated again in another one, and says the same."""
    asked, *others = prompts(random, 4, 1000)

    def slot_of(prompt: list[int]) -> tuple[int, int, str]:
        status, answer = post(server, "/completion", prompt=prompt, n_predict=8, temperature=0)
        assert status == 200, answer
        return int(answer["id_slot"]), int(answer["timings"]["cache_n"]), str(answer["content"])

    with serve("-c", "2048", "-np", "2", "--kv", "gear2") as server:
        first, n_cached, _ = slot_of(asked)
        assert n_cached == 0
        assert slot_of(others[0])[0] != first
        here, n_cached, text = slot_of(asked)  # by now its tiles are packed
        assert (here, n_cached) == (first, len(asked) - 1)
        assert [slot_of(other)[0] == first for other in others[1:]] == [False, True]  # the one that was used longest ago is taken
        there, n_cached, again = slot_of(asked)
        assert there != first and n_cached == len(asked) - 1
        assert again == text
        assert "gearcpp E" not in server.log


def test_a_slot_file_is_the_same_in_every_slot(random: np.random.Generator, tmp_path: Path) -> None:
    """To the last bit of the probabilities: no tile is coded again."""
    (prompt,) = prompts(random, 1, 1500)
    with serve("-c", "2048", "-np", "3", "--kv", "gear2", "--", "--slot-save-path", tmp_path) as server:
        status, answer = post(server, "/completion", prompt=prompt, n_predict=8, temperature=0, id_slot=1)
        assert status == 200 and post(server, "/slots/1?action=save", filename="one.bin")[0] == 200
        said = []
        for slot in (1, 0, 2):
            assert post(server, f"/slots/{slot}?action=restore", filename="one.bin")[0] == 200
            status, answer = post(server, "/completion", prompt=prompt, n_predict=8, temperature=0, id_slot=slot, n_probs=5)
            assert status == 200 and answer["timings"]["cache_n"] == len(prompt) - 1
            said.append([(top["id"], top["logprob"]) for token in answer["completion_probabilities"] for top in token["top_logprobs"]])
        assert len(said[0]) == 8 * 5 and said[0] == said[1] == said[2]


def test_a_prefix_is_copied_to_a_slot_beside(random: np.random.Generator) -> None:
    """From the prompt cache, where idle slots are put when another request begins."""
    system, *rest = prompts(random, 5, 600)
    with serve("-c", "2048", "-np", "2", "--", "--cache-ram", "64") as server:
        assert ask(server, system + rest[0][:20])[0] == 0
        assert ask(server, rest[1])[0] == 0  # in the other slot; the first one is idle now
        with ThreadPoolExecutor() as pool:
            cached = list(pool.map(lambda prompt: ask(server, system + prompt[:20], 40)[0], rest[2:4]))
        assert min(cached) >= 600, cached


@pytest.mark.parametrize("kv", ["gear3", "gear"])
def test_a_slot_file_outlives_the_server(random: np.random.Generator, tmp_path: Path, kv: str) -> None:
    (prompt,) = prompts(random, 1, 1500)
    file = tmp_path / "one.bin"
    arguments = ("-c", "2048", "-np", "2", "--", "--slot-save-path", tmp_path)
    with serve("--kv", kv, *arguments) as server:
        _, text = ask(server, prompt)
        (slot,) = [s for s in range(2) if post(server, f"/slots/{s}?action=save", filename=file.name)[1].get("n_saved")]
        status, saved = post(server, f"/slots/{slot}?action=save", filename=file.name)
        assert status == 200 and saved["n_saved"] >= 1500 and saved["n_written"] == file.stat().st_size < saved["n_saved"] * _F16_BYTES / 2
        again = tmp_path / "again.bin"
        assert post(server, "/completion", prompt=prompt[::-1], n_predict=8, id_slot=slot)[0] == 200
        assert post(server, f"/slots/{slot}?action=restore", filename=file.name)[0] == 200
        assert post(server, f"/slots/{slot}?action=save", filename=again.name)[0] == 200
        assert again.read_bytes() == file.read_bytes()  # the slot is what it was, bit for bit
    with serve("--kv", kv, *arguments) as server:
        status, restored = post(server, "/slots/1?action=restore", filename=file.name)
        assert status == 200 and restored["n_restored"] == saved["n_saved"], restored
        assert ask(server, prompt) == (1499, text)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "damaged.bin").write_bytes(data)
        (tmp_path / "short.bin").write_bytes(data[:1000])
        for name, reason in (("damaged.bin", "the checksum"), ("short.bin", "it is cut off"), ("absent.bin", "No such file")):
            status, answer = post(server, "/slots/0?action=restore", filename=name)
            assert status == 400 and reason in answer["error"]["message"], answer
        assert ask(server, prompt) == (1499, text)
    with serve("--kv", "gear2", *arguments) as server:
        status, answer = post(server, "/slots/0?action=restore", filename=file.name)
        assert status == 400 and "it is of another model, or of another --kv" in answer["error"]["message"]
        assert ask(server, prompt)[0] == 0


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss", "qwen35", "granite-hybrid", "falcon-h1"])
def test_windows_and_recurrent_layers_come_back_too(random: np.random.Generator, tmp_path: Path, name: str) -> None:
    """In any slot, after a restart and out of the prompt cache. llama.cpp evaluates the few tokens after its last checkpoint again."""
    asked, *others = [random.integers(5, 250, 700).tolist() for _ in range(3)]
    arguments = ("-m", write_family(tmp_path / "model.gguf", name), "-c", "1024", "-np", "2", "--kv", "gear2", "--", "--slot-save-path", tmp_path)

    def said(server: Server, prompt: list[int], **fields: Any) -> tuple[int, int, list[tuple[int, float]]]:
        """The slot, tokens that were there, and probabilities."""
        status, answer = post(server, "/completion", prompt=prompt, n_predict=8, temperature=0, n_probs=3, **fields)
        assert status == 200, answer
        tops = [(top["id"], top["logprob"]) for token in answer["completion_probabilities"] for top in token["top_logprobs"]]
        return answer["id_slot"], answer["timings"]["cache_n"], tops

    with serve(*arguments) as server:
        here, n_cached, _ = said(server, asked)
        assert n_cached == 0
        status, saved = post(server, f"/slots/{here}?action=save", filename="one.bin")
        assert status == 200 and saved["n_saved"] >= len(asked)
        for other in others:
            assert said(server, other)[1] == 0  # the second one takes the slot of the prompt, which goes to the prompt cache
        there, n_cached, _ = said(server, asked)
        assert there != here and n_cached >= len(asked) - 8
        assert "gearcpp E" not in server.log
    with serve(*arguments) as server:
        answers = []
        for slot in (here, there):
            assert post(server, f"/slots/{slot}?action=restore", filename="one.bin")[0] == 200
            answers.append(said(server, asked, id_slot=slot)[1:])
        assert answers[0][0] >= len(asked) - 8 and answers[0] == answers[1]
