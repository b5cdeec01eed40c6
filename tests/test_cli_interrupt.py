"""Ctrl-C while the command line is still being imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Ctrl-C at the n-th import after the command has begun.
PROGRAM = """
import sys
from gearcpp.__main__ import main

class Interrupt:
    n_left = int(sys.argv.pop(1))
    def find_spec(self, name, path=None, target=None):
        Interrupt.n_left -= 1
        if Interrupt.n_left == 0:
            raise KeyboardInterrupt
        return None

assert "typer" not in sys.modules and "gearcpp.cli" not in sys.modules, "slow imports stand in front of the handler"
sys.meta_path.insert(0, Interrupt())
main()
"""


@pytest.mark.parametrize("n", [1, 2, 5, 20, 80, 150])
def test_it_ends_without_a_traceback(n: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(n), "info"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_command_is_that_entry() -> None:
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="gearcpp")
    assert command.value == "gearcpp.__main__:main"
