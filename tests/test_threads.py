"""How many threads are taken where no number is given: never more than the process has processors for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gearcpp.cli._model import default_threads
from gearcpp.runtime import threads
from gearcpp.runtime.threads import llama_threads, usable_cores, usable_cpus

N_CPU = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def test_what_is_asked_for_is_taken_and_the_rest_is_capped() -> None:
    assert llama_threads(None, None, n_cpu=64, usable=2) == (2, 2)
    assert llama_threads(None, None, n_cpu=64, usable=64) == (32, 64)
    assert llama_threads(None, None, n_cpu=1, usable=1) == (1, 1)
    assert llama_threads(0, 0, n_cpu=8, usable=6) == (4, 6)
    assert llama_threads(12, 16, n_cpu=8, usable=2) == (12, 16)
    assert llama_threads(3, None, n_cpu=8, usable=8) == (3, 3)
    assert llama_threads(None, 3, n_cpu=8, usable=8) == (4, 3)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "damaged"}, None),
        ({"cpu.max": "1 0"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu.max": "max 100000", "docker/cpu.max": "300000 100000", "docker/a/cpu.max": "200000 100000"}, 2),
    ],
)
def test_quotas_of_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], limit: int | None) -> None:
    monkeypatch.setattr(threads, "_own_group", lambda: ("docker", "a"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert usable_cpus(tmp_path) == (limit or 8)
    assert usable_cores(tmp_path) <= usable_cpus(tmp_path)


def test_commands_take_no_more_than_the_process_may_use() -> None:
    assert 1 <= default_threads() <= usable_cpus() <= N_CPU


LOAD = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from gearcpp import Llama
llm = Llama(sys.argv[1], n_ctx=256, verbose=False)
print(llm.n_threads, llm.n_threads_batch, llm.context_params.n_threads, llm.context_params.n_threads_batch)
asked = Llama(sys.argv[1], n_ctx=256, n_threads=3, n_threads_batch=2, verbose=False)
print(asked.n_threads, asked.n_threads_batch)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU sets")
def test_llama_takes_one_thread_on_one_processor(random_model: Callable[..., Path]) -> None:
    result = subprocess.run([sys.executable, "-c", LOAD, str(random_model())], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["1 1 1 1", "3 2"]
