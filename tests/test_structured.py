"""gearcpp.evaluation.structured: what is asked, how JSON is judged, and the commands on the model that comes with gearcpp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gearcpp.cli import main
from gearcpp.evaluation.structured import (
    TOOLS,
    Request,
    call_prefix,
    call_requests,
    follows,
    judge_call,
    judge_object,
    object_prefix,
    object_requests,
    same,
)
from gearcpp.evaluation.tasks import Answer, wilson


def written(text: str) -> Answer:
    return Answer([], text, 0.0)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [call_requests, object_requests])
def test_requests_depend_on_the_seed_alone(make) -> None:  # type: ignore[no-untyped-def]
    assert make(30, 5) == make(30, 5)
    assert make(50, 5)[:30] == make(30, 5)
    assert make(30, 5) != make(30, 6)
    assert len({request.prompt for request in make(50)}) > 45


def test_every_function_is_asked_for_and_every_right_call_is_judged_right() -> None:
    requests = call_requests(60, seed=2)
    assert {request.wanted["name"] for request in requests} == set(TOOLS)
    for request in requests:
        assert follows(request.wanted["arguments"], request.schema)
        judged = judge_call(request, written(" " + json.dumps(request.wanted)))
        assert judged.is_valid and judged.fits and judged.is_right
        # Whoever reads the sentence can know the values.
        for value in request.wanted["arguments"].values():
            said = f"{value:.2f}" if isinstance(value, float) else str(value)
            assert isinstance(value, bool) or said in request.prompt


def test_every_right_object_is_judged_right() -> None:
    for request in object_requests(60, seed=2):
        assert follows(request.wanted, request.schema) and request.schema["required"] == list(request.wanted)
        judged = judge_object(request, written(json.dumps(request.wanted)))
        assert judged.is_valid and judged.fits and judged.is_right


def test_examples_are_calls_and_objects() -> None:
    calls = [line.removeprefix("Call: ") for line in call_prefix().splitlines() if line.startswith("Call: ")]
    assert len(calls) == 3 and all(json.loads(call)["name"] in TOOLS for call in calls)
    objects = [line.removeprefix("Object: ") for line in object_prefix().splitlines() if line.startswith("Object: ")]
    assert len(objects) == 4 and all(json.loads(one) for one in objects)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# How it is judged
# ---------------------------------------------------------------------------------------------------------------------------------------------

CALL = Request("", {"name": "go", "arguments": {"to": "Oslo", "fast": True}}, {})


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"name": "go", "arguments": {"to": "Oslo", "fast": true}}', (True, True, True)),
        ('{"arguments": {"fast": true, "to": " oslo"}, "name": "go"}', (True, True, True)),
        ('{"name": "go", "arguments": {"to": "Oslo", "fast": 1}}', (True, True, False)),
        ('{"name": "go", "arguments": {"to": "Oslo"}}', (True, True, False)),
        ('{"name": "stay", "arguments": {"to": "Oslo", "fast": true}}', (True, False, False)),
        ('{"name": "go", "arguments": "Oslo"}', (False, False, False)),
        ('{"name": "go"}', (False, False, False)),
        ('{"name": "go", "arguments": {"to": "Oslo", "fast": true}} and more', (False, False, False)),
        ('{"name": "go", "arguments": {"to": "Os', (False, False, False)),
        ("[]", (False, False, False)),
        ("", (False, False, False)),
    ],
)
def test_calls_by_hand(text: str, verdict: tuple[bool, bool, bool]) -> None:
    judged = judge_call(CALL, written(text))
    assert (judged.is_valid, judged.fits, judged.is_right) == verdict


SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "x": {"type": "number"},
        "c": {"type": "string", "enum": ["red", "blue"]},
        "l": {"type": "array", "items": {"type": "string"}},
    },
}
OBJECT = Request("", {"n": 3, "x": 1.5, "c": "red", "l": ["a", "b"]}, SCHEMA)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"n": 3, "x": 1.50, "c": "red", "l": ["a", "B"]}', (True, True, True)),
        ('{"n": 3, "x": 1.5, "c": "red", "l": ["b", "a"]}', (True, True, False)),
        ('{"n": 3, "x": 1.5, "c": "blue", "l": ["a", "b"]}', (True, True, False)),
        ('{"n": 3, "x": 1.5, "c": "Red", "l": ["a", "b"]}', (True, False, False)),
        ('{"n": "3", "x": 1.5, "c": "red", "l": ["a", "b"]}', (True, False, False)),
        ('{"n": 3.5, "x": 1.5, "c": "red", "l": ["a", "b"]}', (True, False, False)),
        ('{"n": true, "x": 1.5, "c": "red", "l": ["a", "b"]}', (True, False, False)),
        ('{"n": 3, "x": 1.5, "c": "red", "l": "a"}', (True, False, False)),
        ('{"n": 3, "x": 1.5, "c": "red"}', (True, False, False)),
        ('{"n": 3, "x": 1.5, "c": "red", "l": ["a", "b"], "more": 1}', (True, False, False)),
        ("n = 3", (False, False, False)),
    ],
)
def test_objects_by_hand(text: str, verdict: tuple[bool, bool, bool]) -> None:
    judged = judge_object(OBJECT, written(text))
    assert (judged.is_valid, judged.fits, judged.is_right) == verdict


def test_true_is_not_one() -> None:
    assert same(1.0, 1) and not same(True, 1) and not same(1, True) and not same("1", 1)


def test_wilsons_interval_by_hand() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 50) == pytest.approx((0, 0.0713), abs=1e-4)
    assert wilson(50, 50) == pytest.approx((0.9287, 1), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    """The exit code of `gearcpp eval`."""
    with pytest.raises(SystemExit) as end:
        main(["eval", *map(str, arguments)])
    return int(end.value.code or 0)


@pytest.mark.parametrize("task", ["tools", "schemas"])
def test_end_to_end(bundled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str) -> None:
    arguments = [task, "--problems", 2, "-m", bundled_model, "--kv", "gear", "-n", 4, "-t", 1, "--resume", tmp_path / "run"]
    assert run(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["f16", "gear"]
    assert lines[2].split("|")[4].strip() == "0.0 % (0 to 66)"  # four tokens are no JSON
    assert float(lines[3].split("|")[3].strip(" %")) > 20  # packed
    assert run(*arguments, "--json") == 0
    answers = json.loads(capsys.readouterr().out)
    assert [len(answers["gear"]), len(answers["f16"])] == [2, 2] and not answers["f16"][0]["is_valid"]
    assert run(*arguments, "--seed", 2) == 2
    assert "holds a run with other settings (text " in capsys.readouterr().err
