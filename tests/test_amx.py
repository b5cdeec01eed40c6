"""Builds of llama.cpp whose AMX kernels crash."""

from __future__ import annotations

import subprocess
from typing import Any

import llama_cpp
import pytest

from gearcpp import Llama, model_params
from gearcpp.runtime import amx


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``build(has_amx, status)``: what llama.cpp says of itself, and how the process ends that tries it."""
    tried: list[list[str]] = []

    def of(has_amx: bool, status: int) -> list[list[str]]:
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
            tried.append(command)
            return subprocess.CompletedProcess(command, status)

        monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: b"CPU : AVX512 = 1 | " + (b"AMX_INT8 = 1 | " if has_amx else b""))
        monkeypatch.setattr(amx.subprocess, "run", run)
        amx.works.cache_clear()
        return tried

    yield of
    amx.works.cache_clear()


def test_a_build_without_amx_is_not_tried(build: Any) -> None:
    tried = build(has_amx=False, status=-11)
    assert amx.works() and not tried


@pytest.mark.parametrize("status", [0, 1])
def test_amx_that_does_not_die_is_kept(build: Any, status: int) -> None:
    tried = build(has_amx=True, status=status)
    params = llama_cpp.llama_model_params(use_extra_bufts=True)
    amx.avoid_if_broken(params)
    amx.avoid_if_broken(params)
    assert params.use_extra_bufts and len(tried) == 1


@pytest.mark.parametrize("status", [-11, -4])
def test_amx_that_dies_is_left_out_with_a_warning(build: Any, status: int, bundled_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build(has_amx=True, status=status)
    defaults = llama_cpp.llama_model_params(use_extra_bufts=True)
    with pytest.warns(UserWarning, match="AMX"):
        amx.avoid_if_broken(defaults)
    assert not defaults.use_extra_bufts
    for kv_type in ("gear", "f16"):
        params, device = model_params(bundled_model, kv_type)
        assert not params.use_extra_bufts
        if device:
            device.close()
    llm = Llama(bundled_model, n_ctx=256, verbose=False)
    assert not llm.model_params.use_extra_bufts
    llm.close()
