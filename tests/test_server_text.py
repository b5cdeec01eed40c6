"""What becomes of tokens' bytes before a client sees them, and the ledger of cells: small parts of the server, without a model."""

from __future__ import annotations

import random

import numpy as np
import pytest

from gearcpp.server.cells import CellLedger
from gearcpp.server.sampling import top_logprobs
from gearcpp.server.text import TextStream


def cut(data: bytes, lengths: random.Random) -> list[bytes]:
    """Bytes in pieces of 1 to 5."""
    pieces = []
    while data:
        n = lengths.randint(1, 5)
        pieces.append(data[:n])
        data = data[n:]
    return pieces


def test_characters_come_whole_however_tokens_cut_them() -> None:
    text = "naïve 日本語 👩‍👩‍👧 end"
    for seed in range(50):
        stream = TextStream()
        shown = [stream.push(piece) for piece in cut(text.encode(), random.Random(seed))]
        assert "\ufffd" not in "".join(shown), seed
        assert "".join(shown) + stream.finish() == text, seed


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    stream = TextStream()
    assert stream.push("é".encode()[:1]) == ""
    assert stream.finish() == "\ufffd"


def test_a_stop_string_is_found_across_tokens_and_never_shown() -> None:
    text, stops = "abc<|end|>def STOP ghi", ["<|end|>", "STOP"]
    for seed in range(100):
        stream = TextStream(stops)
        shown = ""
        for piece in cut(text.encode(), random.Random(seed)):
            shown += stream.push(piece)
            assert "abc".startswith(shown), seed
        assert stream.stopped and shown + stream.finish() == "abc", seed
        assert stream.length == 3


def test_what_only_looks_like_a_stop_string_is_shown_in_the_end() -> None:
    stream = TextStream(["aab", ""])
    assert [stream.push(letter) for letter in (b"a", b"a", b"a", b"c")] == ["", "", "a", "aac"]
    assert stream.push(b"aa") == "" and stream.finish() == "aa" and not stream.stopped


def test_the_earliest_stop_string_counts() -> None:
    stream = TextStream(["world", "lo"])
    assert stream.push(b"hello world") == "hel" and stream.stopped


def test_cells_are_counted_once_however_many_hold_them() -> None:
    ledger = CellLedger(10)
    first = ledger.take(6)
    second = [*ledger.share(first[:4]), *ledger.take(2)]
    assert (ledger.used, ledger.free) == (8, 2)
    assert ledger.age(first[0]) == 8 and ledger.age(second[-1]) == 1
    ledger.release(first)
    assert ledger.used == 6
    ledger.release(second)
    assert ledger.free == 10
    with pytest.raises(AssertionError):
        ledger.take(11)


def test_log_probabilities_of_a_row() -> None:
    row = np.log(np.array([0.1, 0.5, 0.2, 0.2], np.float32)) + 3
    logprob, best = top_logprobs(row, 0, 2)
    assert logprob == pytest.approx(np.log(0.1), abs=1e-6)
    assert [token for token, _ in best] in ([1, 2], [1, 3]) and best[0][1] == pytest.approx(np.log(0.5), abs=1e-6)
    assert top_logprobs(row, 1, 0)[1] == [] and len(top_logprobs(row, 1, 20)[1]) == 4
