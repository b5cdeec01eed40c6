"""`gearcpp check`: the verdict on made-up figures, the search for a preset, and the command on the bundled model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import gearcpp
from gearcpp.cli import main
from gearcpp.evaluation.check import Outcome, Verdict, next_preset, smallest

MODEL = str(Path(gearcpp.__file__).parent / "models" / "books-6m-q8_0.gguf")


def verdict(kv: str, kld: float, ppl_change: float = 0.0) -> Verdict:
    return Verdict(kv, 4.0, kld, 0.99, ppl_change)


@pytest.mark.parametrize(
    ("kld", "ppl_change", "outcome"),
    [
        (0.000929, 0.001, Outcome.SAME),
        (0.022149, 0.002, Outcome.CLOSE),
        (0.899868, 0.9, Outcome.BROKEN),
        (0.031, 0.0, Outcome.BROKEN),
        (0.001, 0.04, Outcome.BROKEN),
        (0.001, -0.04, Outcome.BROKEN),
        (math.nan, 0.0, Outcome.BROKEN),
    ],
)
def test_outcomes(kld: float, ppl_change: float, outcome: Outcome) -> None:
    assert verdict("gear", kld, ppl_change).outcome is outcome


def test_the_sentence() -> None:
    assert str(verdict("gear", 0.00093, 0.001)) == "gear: stands it (KLD 0.0009, the likeliest token stays the same in 99.0 %, perplexity +0.1 %)"


@pytest.mark.parametrize(
    ("chosen", "broken", "tried", "best"),
    [
        ("gear", {"gear2"}, ["gear", "gear3", "gear2"], "gear3"),
        ("gear2", {"gear2"}, ["gear2", "gear3"], "gear3"),
        ("gear2", set(), ["gear2"], "gear2"),
        ("q4_0", {"q4_0"}, ["q4_0", "gear2"], "gear2"),
        ("gear", {"gear", "gear-hi"}, ["gear", "gear-hi"], None),
    ],
)
def test_the_search(chosen: str, broken: set[str], tried: list[str], best: str | None) -> None:
    verdicts: dict[str, Verdict] = {}
    name: str | None = chosen
    while name:
        verdicts[name] = verdict(name, 0.9 if name in broken else 0.001)
        name = next_preset(chosen, verdicts)
    assert (list(verdicts), smallest(verdicts)) == (tried, best)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["check", "-m", MODEL, "-t", "1", *arguments])
    return int(left.value.code or 0)


def test_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json", "-c", "1024", "--kv", "gear2") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["complete"] and record["tried"][0]["kv"] == "gear2"
    assert record["tried"][0]["kld"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--kv", "gear9"), 2, "gear9"),
        (("--kv", "f16"), 2, "held against"),
        (("--kv", "gear,gear2"), 2, "one cache"),
        (("-c", "128"), 2, "nothing that a scored position sees is ever packed"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_short_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    assert run(str(tmp_path / "short.txt")) == 1
    assert "too few" in capsys.readouterr().err
