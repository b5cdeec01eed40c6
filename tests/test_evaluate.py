"""gearcpp.evaluation.tasks: what is asked, how answers are read and compared, and the command on the model that comes with gearcpp."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gearcpp import BusyError, ConfigError, DataError, Llama
from gearcpp.cli import main
from gearcpp.evaluation.run_log import RunLog
from gearcpp.evaluation.tasks import (
    Answer,
    Problem,
    Search,
    answer,
    compare_answers,
    final_number,
    gsm8k,
    gsm8k_prompt,
    haystack,
    needle,
    normalize_number,
    parse_specs,
    read_problems,
    repetition,
    split_prompts,
)

TEXT = " ".join(f"On day {i} the ship sailed {i % 9} miles and then it rested." for i in range(600)).encode()


@pytest.fixture(scope="module")
def llm(bundled_model: Path) -> Iterator[Llama]:
    llm = Llama(str(bundled_model), kv_type="f16", flash_attn=True, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
    yield llm
    llm.close()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Reading and comparing answers
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_f16_comes_first_and_once() -> None:
    assert [spec.label for spec in parse_specs("gear3,f16,q8_0")] == ["f16", "gear3", "q8_0"]
    with pytest.raises(ConfigError, match="unknown kv_type"):
        parse_specs("f16,gear33")


@pytest.mark.parametrize(("text", "number"), [(" 1,200 ", "1200"), ("$18.00", "18"), ("-3.50", "-3.5"), ("7.", "7"), ("0", "0")])
def test_spellings_of_a_number(text: str, number: str) -> None:
    assert normalize_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 eggs.\n#### 7\n\n", "7"),
        ("#### $1,234 of 9", "1234"),
        ("So 3 times 5 is 15.", "15"),
        ("It fell to -4 degrees", "-4"),
        ("nothing to count", None),
        ("#### nothing", None),
    ],
)
def test_the_number_that_an_answer_comes_to(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_problems_are_read_without_the_calculator_marks(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"question": "How many? ", "answer": "2 + 2 = <<2+2=4>>4 ducks.\n#### 4"}) + "\n")
    assert read_problems(file) == [Problem("How many?", "2 + 2 = 4 ducks.", "4")]


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no problem"), ('{"question": "a"}\n', "line 1: not a problem"), ("[1]\n", "line 1: not a problem"), ("{", "line 1: not a problem")],
)
def test_files_that_hold_no_problems(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        read_problems(file)


def test_the_prompt_ends_where_the_answer_begins() -> None:
    shot = Problem("How many ducks?", "Two and two are 4.", "4")
    assert gsm8k_prompt([shot], "And geese?") == "Question: How many ducks?\nAnswer: Two and two are 4.\n#### 4\n\nQuestion: And geese?\nAnswer:"


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0
    # Runs of four: 1212 2121 1212 2121 1212; two different ones of five.
    assert repetition([1, 2] * 4) == pytest.approx(1 - 2 / 5)
    assert repetition([1, 2, 3]) == 0


def test_drift_by_hand() -> None:
    same = compare_answers([1, 2, 3], [1, 2, 3])
    assert (same.is_same, same.first_difference, same.same_share, same.length_ratio) == (True, 3, 1.0, 1.0)
    other = compare_answers([1, 2, 9, 4, 5, 6], [1, 2, 3, 4])
    assert (other.is_same, other.first_difference, other.same_share, other.length_ratio) == (False, 2, 3 / 6, 1.5)
    shorter = compare_answers([1, 2], [1, 2, 3, 4])
    assert (shorter.is_same, shorter.first_difference, shorter.same_share, shorter.length_ratio) == (False, 2, 0.5, 0.5)
    assert compare_answers([], []).same_share == 1.0


# ---------------------------------------------------------------------------------------------------------------------------------------------
# With a model
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_greedy_continuation(llm: Llama) -> None:
    prompt = llm.tokenize(b"The old man walked")
    written = answer(llm, prompt, 12)
    llm.reset()
    completion = llm.create_completion(prompt, max_tokens=12, temperature=0.0)
    assert written.text == completion["choices"][0]["text"]
    assert len(written.tokens) == 12


def test_an_answer_ends_before_the_stop_text(llm: Llama) -> None:
    prompt = llm.tokenize(b"The old man walked")
    whole = answer(llm, prompt, 12).text
    stop = whole[4:7]
    assert answer(llm, prompt, 12, stop=stop).text == whole[: whole.index(stop)]


def test_an_answer_that_does_not_fit_is_refused(llm: Llama) -> None:
    with pytest.raises(ConfigError, match="prompt of 1000 tokens and an answer of 100 do not fit into a context of 1024"):
        answer(llm, [5] * 1000, 100)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_lies_where_it_should(llm: Llama, depth: float) -> None:
    prompt = haystack(llm, TEXT, 400, depth, number=54321)
    text = llm.detokenize(prompt).decode()
    sentence = "The secret number of the lighthouse is 54321. "
    # Cutting the text in other places can change a few tokens.
    assert abs(len(prompt) - 400) < 20
    assert text.count("54321") == 1 and text.endswith("Answer: The secret number of the lighthouse is")
    before = text.index(sentence)
    assert before / text.index("\n\nQuestion:") == pytest.approx(depth, abs=0.1)
    assert depth == 0 or text[:before].rstrip().endswith(".")


def test_the_same_numbers_are_hidden_from_every_cache(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[int] = []

    def found(llm: Llama, prompt: list[int], n_predict: int) -> Answer:
        number = llm.detokenize(prompt).decode().split("lighthouse is ")[1][:5]
        hidden.append(int(number))
        return Answer([], f" {number}." if len(hidden) % 2 else " unknown.", 0.0)

    monkeypatch.setattr("gearcpp.evaluation.tasks.answer", found)
    searches = [*needle(llm, TEXT, [200, 300], [0.0, 1.0], seed=3), *needle(llm, TEXT, [200, 300], [0.0, 1.0], seed=3)]
    assert hidden[:4] == hidden[4:] and len(set(hidden)) == 4
    assert [search.is_found for search in searches] == [True, False] * 4
    assert [(search.length, search.depth) for search in searches[:4]] == [(200, 0.0), (200, 1.0), (300, 0.0), (300, 1.0)]


def test_a_text_too_short_for_the_haystack(llm: Llama) -> None:
    with pytest.raises(DataError, match="haystack of 500 tokens cannot be made"):
        haystack(llm, b"A short text.", 500, 0.5, 12345)
    with pytest.raises(DataError, match="haystack of 5 tokens cannot be made"):
        haystack(llm, TEXT, 5, 0.5, 12345)


def test_prompts_are_spread_over_the_text(llm: Llama) -> None:
    tokens = llm.tokenize(TEXT)
    prompts = split_prompts(llm, TEXT, 4, 100)
    stride = len(tokens) // 4
    assert prompts == [tokens[i * stride : i * stride + 100] for i in range(4)]
    with pytest.raises(DataError, match="too few for 4 prompts of 100000"):
        split_prompts(llm, TEXT, 4, 100_000)


def test_solving_counts_the_right_number(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter([" 2 + 2 = 4\n#### 4", " many"])
    monkeypatch.setattr("gearcpp.evaluation.tasks.answer", lambda llm, prompt, n_predict, stop: Answer([], next(texts), 0.0))
    right, wrong = gsm8k(llm, [], [Problem("a", "b", "4"), Problem("c", "d", "5")])
    assert (right.result, right.is_right) == ("4", True)
    assert (wrong.result, wrong.is_right) == (None, False)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    """The exit code of `gearcpp eval`."""
    with pytest.raises(SystemExit) as end:
        main(["eval", *map(str, arguments)])
    return int(end.value.code or 0)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT)
    return file


@pytest.fixture
def problem_file(tmp_path: Path) -> Path:
    file = tmp_path / "problems.jsonl"
    problems = [{"question": f"What is {i} and {i}?", "answer": f"{i} + {i} = {2 * i}.\n#### {2 * i}"} for i in range(10)]
    file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return file


def test_drift_end_to_end(bundled_model: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-m", bundled_model, "--kv", "gear4,gear2", "--prompts", 2, "--prompt-size", 600, "-n", 8, "-c", 1024, "-t", 1]
    assert run("drift", text_file, *options, "--json") == 0
    answers = json.loads(capsys.readouterr().out)
    assert list(answers) == ["f16", "gear4", "gear2"]
    assert all(len(one["tokens"]) == 8 for got in answers.values() for one in got)
    assert {one["packed_share"] for one in answers["f16"]} == {0.0}
    assert all(0.3 < one["packed_share"] < 0.9 for one in answers["gear4"])


def test_gsm8k_end_to_end(bundled_model: Path, problem_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("gsm8k", problem_file, "-m", bundled_model, "--kv", "q8_0", "-n", 8, "-c", 1024, "-t", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    # Eight of the ten problems are the worked examples.
    assert [line.split("|")[1:3] for line in lines[2:]] == [[" f16   ", "       2 "], [" q8_0  ", "       2 "]]


def test_needle_end_to_end(bundled_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    picture = tmp_path / "grid.png"
    options = ["-m", bundled_model, "--kv", "gear", "--lengths", "200,300", "--depths", 2, "-c", 512, "-t", 1, "--plot", picture]
    assert run("needle", text_file, *options) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[0].split("|")[-3:-1] == [" 200 tokens ", " 300 tokens "]
    assert "gear: nothing was packed in these contexts" in output.err
    assert picture.read_bytes().startswith(b"\x89PNG")


class Stopped(BaseException):
    """Ends a run in the midst of it."""


def stop_after(monkeypatch: pytest.MonkeyPatch, n_answers: int, error: type[BaseException]) -> list[int]:
    """Let so many answers be given; the list returned counts them."""
    given: list[int] = []

    def limited(*arguments: Any, **options: Any) -> Answer:
        if len(given) == n_answers:
            raise error
        given.append(1)
        return answer(*arguments, **options)

    monkeypatch.setattr("gearcpp.evaluation.tasks.answer", limited)
    return given


TASKS = {
    "drift": ["TEXT", "--prompts", 2, "--prompt-size", 600, "-n", 6, "-c", 1024],
    "needle": ["TEXT", "--lengths", "300", "--depths", 2, "-c", 512],
    "gsm8k": ["PROBLEMS", "-n", 6, "-c", 1024],
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped])
@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_goes_on_where_it_was(
    bundled_model: Path,
    text_file: Path,
    problem_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: str,
    error: type[BaseException],
) -> None:
    files = {"TEXT": text_file, "PROBLEMS": problem_file}
    arguments = [task, *(files.get(str(word), word) for word in TASKS[task]), "-m", bundled_model, "--kv", "gear,gear2", "-t", 1, "--json"]
    assert run(*arguments) == 0
    whole = json.loads(capsys.readouterr().out)
    kept = tmp_path / "run.jsonl"
    with monkeypatch.context() as patch:
        stop_after(patch, 3, error)  # the second answer of the second cache is lost
        if error is KeyboardInterrupt:
            assert run(*arguments, "--resume", kept) == 130
            assert f"f16 2, gear 1; kept in {kept}" in capsys.readouterr().err
        else:
            with pytest.raises(Stopped):
                main(["eval", *map(str, arguments), "--resume", str(kept)])
    with kept.open("ab") as file:
        file.write(b'{"cache": "gear", "result": {"tok')  # a line that was cut off
    with monkeypatch.context() as patch:
        given = stop_after(patch, 99, error)
        assert run(*arguments, "--resume", kept) == 0
    assert len(given) == 3
    assert json.loads(capsys.readouterr().out) == whole
    assert len(kept.read_text().splitlines()) == 1 + 6
    # All is there: nothing is asked, no model is loaded.
    monkeypatch.setattr("gearcpp.evaluation.tasks.load", None)
    assert run(*arguments, "--resume", kept) == 0
    assert json.loads(capsys.readouterr().out) == whole


def test_a_run_with_other_settings_is_refused(bundled_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "run.jsonl"
    RunLog(kept, {"task": "drift", "predict": 64}).close()
    before = kept.read_bytes()
    assert run("drift", text_file, "-m", bundled_model, "-n", 32, "--resume", kept) == 2
    error = capsys.readouterr().err
    assert "predict 64, not 32" in error and "task" not in error and error.count("\n") == 1
    assert kept.read_bytes() == before


@pytest.mark.parametrize("content", [b"some text\n", b"[1]\n", b'{"run": {}}\n{"no": 1}\n', b"\x80\n", b"{}\n", b"text without an end"])
def test_a_file_that_is_no_run_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "notes"
    file.write_bytes(content)
    with pytest.raises(DataError, match="is not a run of gearcpp eval"):
        RunLog(file, {})
    assert file.read_bytes() == content


def test_one_run_at_a_time_writes_a_file(tmp_path: Path) -> None:
    first = RunLog(tmp_path / "run", {"a": 1})
    with pytest.raises(BusyError, match="is being written by another run"):
        RunLog(tmp_path / "run", {"a": 1})
    first.close()
    RunLog(tmp_path / "run", {"a": 1}).close()
    with pytest.raises(DataError, match="cannot write"):
        RunLog(tmp_path / "no" / "run", {})


def test_answers_of_another_task_are_refused(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", {})
    log.add("f16", Answer([1], "a", 0.0))
    log.close()
    again = RunLog(tmp_path / "run", {})
    assert again.results("f16", Answer) == [Answer([1], "a", 0.0)]
    assert again.results("gear", Answer) == []
    with pytest.raises(DataError, match="answers of another kind than Search"):
        again.results("f16", Search)
    again.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["needle", "TEXT", "--lengths", "10,x"], "--lengths wants whole numbers"),
        (["needle", "TEXT", "--lengths", "0"], "--lengths wants lengths of 1 or more"),
        (["needle", "TEXT", "--plot", "no/such/grid.png"], "there is no folder no/such"),
        (["drift", "no-such.txt"], "cannot read no-such.txt"),
        (["drift", "TEXT", "--prompt-size", "5000", "--prompts", "1"], "do not fit into a context of 4096"),
        (["gsm8k", "TEXT"], "line 1: not a problem of GSM8K"),
    ],
)
def test_mistakes_are_one_line(bundled_model: Path, text_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    given = [str(text_file) if argument == "TEXT" else argument for argument in arguments]
    assert run(*given, "-m", bundled_model, "-t", 1) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_too_few_problems(bundled_model: Path, problem_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = problem_file.with_name("few.jsonl")
    few.write_text("\n".join(problem_file.read_text().splitlines()[:8]))
    assert run("gsm8k", few, "-m", bundled_model) == 2
    assert "too few problems" in capsys.readouterr().err
