"""A model that is served: its process as the gate sees it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import threading
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import gearcpp.errors
from gearcpp.cache.allocation import Allocation
from gearcpp.cache.kv_type import KVType, normalize_kv_type
from gearcpp.cache.stats import llama_layers, summarize
from gearcpp.errors import ConfigError, GearError
from gearcpp.model_info import ModelInfo, read_model_info

from . import worker
from .settings import ModelSettings
from .upstream import UpstreamError, ask

_SECONDS_TO_END = 10
_LOOKS = 50  # into the log
_CELLS = 256  # llama.cpp makes contexts of whole multiples


class Model:
    """Starts the process and waits until the model is loaded.

    Args:
        settings: what to load.
        folder: for its socket; nobody else may enter it.
        n_requests: most requests at the same time.

    Attributes:
        settings: as given, with the context as it is.
        name: what clients call it.
        n_vocab: tokens of its vocabulary.
        has_template: whether it can chat.

    Raises:
        GearError: the model cannot be loaded, or settings are wrong.
    """

    def __init__(self, settings: ModelSettings, folder: Path, n_requests: int) -> None:
        self._info: ModelInfo = read_model_info(settings.model)
        if not settings.n_ctx:
            settings = replace(settings, n_ctx=self._info.n_ctx_train)
        if settings.embedding and not {"pooling", "pooling_type"} & {*settings.options} and not self._info.metadata.get(f"{self._info.arch}.pooling_type"):
            settings = replace(settings, options={**settings.options, "pooling": "mean"})  # llama.cpp's default is a vector for each token
        self.settings, self.name, self.n_vocab = settings, settings.name, self._info.n_vocab
        self.kv_type: KVType = normalize_kv_type(settings.cache)
        self.has_template = bool(settings.chat_template or settings.options.get("chat-template-file") or "tokenizer.chat_template" in self._info.metadata)
        self._knows_tools: bool | None = None
        self._folder, self._n_requests = folder, n_requests
        self._lock = threading.Lock()
        self._start()
        budget = settings.kv_budget
        while budget and (n_bytes := self.kv_stats()["total"]["bytes"]) > budget:
            self.close()
            n_ctx = int(self.settings.n_ctx * budget / n_bytes) // _CELLS * _CELLS
            if n_ctx < _CELLS:
                raise ConfigError(
                    f"kv_budget of {budget} bytes is too small for {settings.parallel} slots of {self.name}: give it more, or take fewer slots"
                )
            self.settings = replace(self.settings, n_ctx=n_ctx)
            self._start()

    def _start(self) -> None:
        self.socket = Path(tempfile.mktemp(".sock", "", self._folder))  # nobody else may write there
        pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self._process = subprocess.Popen(worker.command(), **pipes, text=True, errors="replace", bufsize=1)
        self._log: deque[str] = deque(maxlen=20)  # llama.cpp's last errors
        self._logger = threading.Thread(target=self._read_log, args=(self._process.stderr,), daemon=True)
        self._logger.start()
        try:
            first = self._say(worker.first_line(self.settings, str(self.socket), self._n_requests))
            if "error" in first:
                raise getattr(gearcpp.errors, first["kind"])(first["error"] + self._reason())
        except BaseException:
            self.close()
            raise
        self._kv = first["kv"]

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    async def is_well(self) -> bool:
        """Whether llama.cpp's server says so."""
        try:
            async with ask(self.socket, "GET", "/health") as answer:
                return self.alive and answer.status == 200
        except UpstreamError:
            return False

    async def knows_tools(self) -> bool:
        """Whether its chat template has a place for tools."""
        if self._knows_tools is None:
            async with ask(self.socket, "GET", "/props") as answer:
                self._knows_tools = json.loads(await answer.read()).get("chat_template_caps", {}).get("supports_tools", True)
        return bool(self._knows_tools)

    def kv_stats(self) -> dict[str, Any]:
        """What the KV cache holds, in the form of `gearcpp.Llama.kv_stats`; the last that is known when the process has ended."""
        if self.kv_type.gear:
            with contextlib.suppress(GearError):
                self._kv = self._say("\n")["kv"]
            return dict(self._kv)
        swa_full = bool({"swa-full", "swa_full"} & {*self.settings.options})
        allocation = Allocation(self.settings.n_ctx, n_seq=self.settings.parallel, swa_full=swa_full)
        return summarize(self.kv_type, llama_layers(self.kv_type, self._info, allocation, 0), 0, self._info, allocation)

    def packed_tiles(self) -> int:
        """Tiles that hold something, over K and V of all layers."""
        if not self.kv_type.gear:
            return 0
        tiles = ((layer, layer["n_stream"] * math.ceil(layer["n_cell"] / self.kv_type.gear.tile)) for layer in self._kv["layers"] if layer["bytes_tiles"])
        return sum(round(layer["bytes_tiles_used"] / layer["bytes_tiles"] * n_tiles) for layer, n_tiles in tiles)

    def close(self) -> None:
        """End the process. May be called twice."""
        assert self._process.stdin
        try:
            self._process.stdin.close()
            self._process.wait(_SECONDS_TO_END)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._logger.join()
        assert self._process.stdout and self._process.stderr
        self._process.stdout.close()
        self._process.stderr.close()

    def _say(self, line: str) -> dict[str, Any]:
        """One line to the process, one from it."""
        assert self._process.stdin and self._process.stdout
        with self._lock:
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
            except (OSError, ValueError):
                answer = ""
        if not answer:
            raise GearError(f"the process of {self.name} has ended (status {self._process.poll()}){self._reason()}")
        value: dict[str, Any] = json.loads(answer)
        return value

    def _reason(self) -> str:
        """The last errors in its log."""
        if self._process.poll() is not None:
            self._logger.join()
        return f" ({'; '.join([*self._log][-2:])})" if self._log else ""

    def _read_log(self, lines: TextIO) -> None:
        for line in lines:
            if self.settings.verbose:
                sys.stderr.write(line)
            if " E " in line or line.startswith("parse: error"):
                self._log.append(line.rpartition(" E ")[2].strip())

    async def reason(self, of: str) -> str:
        """What the log says of a grammar that could not be read, or of a slot file; llama.cpp's answer does not. The log may come a moment later."""
        start = "parse: error parsing grammar: " if "parse grammar" in of else "state: " if "restore slot" in of or "save slot" in of else ""
        for _ in range(_LOOKS if start else 0):
            if line := next((line for line in [*self._log][::-1] if line.startswith(start)), None):
                with contextlib.suppress(ValueError):
                    self._log.remove(line)  # it was of this request
                return line.removeprefix(start)
            await asyncio.sleep(0.01)
        return ""
