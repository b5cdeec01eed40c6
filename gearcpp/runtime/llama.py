"""`Llama`: llama_cpp.Llama with a GEAR cache.

One file of more than 500 lines: a class that overrides its parent's methods has to hold them; what can stand alone is in the modules beside it.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
import random
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama import LlamaState
from llama_cpp.llama_cache import BaseLlamaCache

from .. import native
from ..cache import allocation, stats
from ..cache.budget import within_budget
from ..cache.device import GearDevice
from ..cache.kv_type import KVType, KVTypeLike, for_sequences, normalize_kv_type
from ..cache.placement import Placement, choose_placement
from ..cache.python_codec import Codec, codec_of
from ..errors import ConfigError, DataError, GearError, OutOfMemoryError, UnsupportedError
from ..model_info import NO_CACHE, ModelInfo, read_model_info
from . import amx, free_cells, sessions
from .arguments import parent_arguments, taken
from .asked import check_chat_format, check_grammar, check_sampling, check_schemas, chosen_logprobs, chosen_tools, plain_messages, plain_response_format
from .closed import CLOSED
from .llama_log import LlamaLog
from .logprobs import align_echo
from .prompt_cache import PackedCache
from .turns import Processors, Turns, with_bias

# The parent redirects stdout and stderr of the process while it loads, and the log callback is one for the process: one construction at a time.
_construction = threading.RLock()

_PARENT = llama_cpp.Llama  # now: programs may put gearcpp.Llama in its place later
_COMPLETION = inspect.signature(_PARENT.create_completion)
_CHAT = inspect.signature(_PARENT.create_chat_completion)
_GENERATE = inspect.signature(_PARENT.generate)


class Llama(llama_cpp.Llama):
    """llama_cpp.Llama whose KV cache is compressed by GEAR.

    Takes every argument of llama_cpp.Llama. What differs:

    - ``kv_type`` says what the cache is made of; ``type_k`` and ``type_v`` are not needed. With a GEAR cache flash attention is on and all layers are on
      the GEAR device (over the CPU), so ``n_gpu_layers`` is ignored on a CPU build as in the parent. On GPUs (docs/cuda.md) ``n_gpu_layers``,
      ``tensor_split``, ``main_gpu`` and ``split_mode`` (by layers, or none) mean what they mean in the parent; not given, all layers are on GPUs.
    - Misspelt arguments are errors, as are those that contradict the cache. Those that llama-cpp-python once had (n_parts, f16_kv, ...) are ignored with
      a warning; with ``gearcpp.Llama.lenient = True``, or GEARCPP_LENIENT=1 in the environment, so are all others that it does not know.
    - Without a ``seed`` (or with -1) one is drawn, so that two objects answer differently; a ``seed`` makes them answer alike.
    - What cannot be done is refused: a LoRA file that is not there, a sampling parameter out of range, a tool that must be called and is not there.
    - `reset` empties the cache at once; what it held leaves no trace in later answers.
    - ``n_ctx`` is rounded up to a multiple of 256, as llama.cpp does itself.
    - Sliding windows (Gemma, gpt-oss, ...) get the cells that they need, as in llama.cpp's own programs: ``swa_full`` is False if not given. Such a
      context cannot be shifted, and goes back to an earlier token only as far as its windows reach: `generate` evaluates the prompt again where they do
      not, `eval` refuses. ``swa_full=True`` gives them as many cells as the context. Without it ``n_ubatch`` is 256 on the CPU if not given, because a
      window has cells for a step besides.
    - Threads that are not asked for are no more than the processors that the process may use; ``n_threads`` alone holds for prompts, too.
    - After `close`, use raises ClosedError; the parent crashes.
    - With a ``draft_model`` logits of the whole context are kept (n_ctx x n_vocab x 4 bytes, paid for as tokens come); the parent fails past n_batch.
    - `save_state` keeps logits only with ``logits_all``.

    Args:
        model_path: a GGUF file, or the first one of a split model, as text or a path.
        kv_type: "gear" (the default preset), another preset (`gearcpp.PRESETS`), a `GearConfig` or a mapping of its fields, one of llama.cpp's own types
            ("f16", "q8_0", "q4_0", ...), or a pair of those for K and V; or a method of `gearcpp.reference`, itself or as "sim:NAME", which codes the
            tiles in place of the native codec: for research, slow, and saves no memory.
        kv_budget: memory for the whole cache, as bytes, "2GiB" or "24KiB/token": the bits of K and V are chosen for it, in some layers one more than in
            others. The attribute ``kv_type`` then names what was chosen.
        codec: a Python function that codes the tiles of a GEAR cache in place of the native one (`gearcpp.cache.python_codec.Codec`); slow, for research.
        arguments: those of llama_cpp.Llama.

    Raises:
        ConfigError: an argument is unknown, out of range or contradicts another.
        UnsupportedError: GEAR does not cover the model's family or head size.
        DataError: the model file is missing, damaged or not a model.
        OutOfMemoryError: the cache does not fit into memory.
        AbiError: the installed llama-cpp-python does not fit.
    """

    _stack: Any = None  # what to free; None until the parent makes it, because __del__ runs also after a construction that failed early
    _device: GearDevice | None = None
    _owner: dict[str, Any] | None = None  # what sessions belong to, once it was asked for
    _present_sampler: Any = None
    _warned = False  # that the model has no chat template
    _n_sequences = 1  # that share the cells of the context
    lenient = False  # whether unknown arguments are ignored, as by the parent: for frameworks that pass what they like

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        kv_type: KVTypeLike = "gear",
        kv_budget: int | str | None = None,
        codec: Codec | None = None,
        **arguments: Any,
    ) -> None:
        self._turns = Turns()
        arguments = taken({"model_path": model_path, **arguments}, lenient=self.lenient)
        model_path = arguments.pop("model_path")
        self._given = {"model_path": model_path, "kv_type": kv_type, **arguments}
        self._given |= {name: value for name, value in (("kv_budget", kv_budget), ("codec", codec)) if value is not None}
        self.kv_type: KVType = normalize_kv_type(kv_type)
        self.info: ModelInfo = read_model_info(model_path, arguments.get("kv_overrides"))
        if (base := arguments.get("rope_freq_base")) and base != self.info.rope_freq_base:  # frameworks give 10000 unasked
            warnings.warn(f"rope_freq_base={base:g} takes the place of the model's own {self.info.rope_freq_base:g}; 0 keeps that", stacklevel=2)
        has_cache = not arguments.get("vocab_only") and self.info.arch not in NO_CACHE
        placement = choose_placement(arguments, self.info.n_layer) if has_cache and self.kv_type.gear else Placement()
        given = {"model_path": model_path, **arguments}
        resolved = parent_arguments(self.kv_type, given, self.info.n_ctx_train, has_cache=has_cache, placement=placement)
        self.kv_type = for_sequences(self.kv_type, self._n_sequences, resolved["n_ctx"])
        codec = codec_of(self.kv_type, codec)
        if placement.on_cpu and has_cache and not resolved.get("embedding"):
            resolved.setdefault("n_ubatch", allocation.default_ubatch(self.info, swa_full=bool(resolved.get("swa_full", True))))
        n_ubatch = min(resolved["n_ctx"], resolved.get("n_batch", 512), resolved.get("n_ubatch", 512))
        self._allocation = allocation.Allocation(resolved["n_ctx"], n_ubatch, self._n_sequences, bool(resolved.get("swa_full", True)))
        if kv_budget is not None:
            if codec:
                raise ConfigError("kv_budget chooses the bits of the native codec; with codec= there are none to choose")
            self.kv_type = within_budget(self.kv_type, kv_budget, self.info, self._allocation)
        if has_cache and placement.on_cpu:
            self._check_memory()
        if has_cache and self.kv_type.gear:
            self._device = GearDevice(self.info, self.kv_type.gear, n_ubatch=n_ubatch, codec=codec, placement=placement)
        self._construct(resolved)
        if self._device and (warning := allocation.warning(self._layer_groups())):
            warnings.warn(f"{self.info.path.name}: {warning} (kv_stats() lists them)", stacklevel=2)
        seed = arguments.get("seed")
        if seed is None or seed in (-1, llama_cpp.LLAMA_DEFAULT_SEED):
            seed = random.SystemRandom().randrange(llama_cpp.LLAMA_DEFAULT_SEED)
        self._seed = int(seed)  # the parent takes 0 for none
        if self.draft_model is not None and not resolved.get("logits_all"):
            self.scores = np.ndarray((self.n_ctx(), self.n_vocab()), np.single)

    def _construct(self, arguments: dict[str, Any]) -> None:
        with _construction, LlamaLog(errors_only=not arguments.get("verbose", True)) as log:
            try:
                super().__init__(**arguments)
                check_chat_format(arguments.get("chat_format"), self)
                if arguments.get("lora_path") and not self._lora_adapter:  # the parent looks for None, and gets a null pointer
                    raise DataError(f"llama.cpp cannot use the LoRA file {arguments['lora_path']}: {log.reason or 'is it of this model?'}")
                if self._ctx.memory is not None:
                    free_cells.TellingContext.of(self._ctx, self._device)
                if self._device:
                    self._device.check_owns(self.info.layers, is_hybrid=llama_cpp.llama_model_is_hybrid(self.model))
            except BaseException as error:
                failure = self._explain_construction(error, log.reason)
                self.close()
                if failure is error:
                    raise
                raise failure from failure.__cause__ or error

    # The parent makes the parameters, fills them and loads the model with them; it has no argument for devices.
    @property
    def model_params(self) -> llama_cpp.llama_model_params:
        """llama.cpp's parameters that the model was loaded with."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: llama_cpp.llama_model_params) -> None:
        self._model_params = params
        amx.avoid_if_broken(params)
        if self._device:
            self._device.attach(params)
            self._stack.callback(self._device.close)  # the first one pushed is the last one called: after the model is gone

    # The parent leaves a sampler to Python's garbage collector, which does not know what llama.cpp holds for it (in proportion to the vocabulary). Here it
    # is freed when the next one takes its place.
    @property
    def _sampler(self) -> Any:
        return self._present_sampler

    @_sampler.setter
    def _sampler(self, sampler: Any) -> None:
        if self._present_sampler is not None and self._present_sampler is not sampler:
            self._present_sampler.close()
        self._present_sampler = sampler

    def _drop_sampler(self) -> None:
        self._sampler = None  # the parent's `sample` would go on with it, whatever it is asked for

    def _check_memory(self) -> None:
        """Refuse what the process would be killed for."""
        n_bytes = allocation.cache_bytes(self.kv_type, self.info, self._allocation)
        available = native.available_memory()
        if n_bytes > available:
            raise OutOfMemoryError(
                f"a {self.kv_type.name} cache for n_ctx={self._allocation.n_ctx} takes {n_bytes / 2**20:.0f} MiB, "
                f"but only {available / 2**20:.0f} MiB are available; use a smaller n_ctx or a kv_type of fewer bits"
            )

    def _explain_construction(self, error: BaseException, reason: str) -> BaseException:
        """The exception to raise for one that came out of the parent's constructor; llama.cpp's reasons come by other ways than exceptions."""
        failure = self._device.take_failure() if self._device else None
        if isinstance(error, jinja2.TemplateError):
            return DataError(f"the chat template of {self.info.path.name} cannot be read: {error}; repair tokenizer.chat_template in the file")
        if failure or isinstance(error, GearError) or not isinstance(error, ValueError):
            return failure or error
        if str(error).startswith("Failed to load model"):
            return DataError(f"llama.cpp cannot load {self.info.path}: {reason or 'it does not say why (verbose=True shows its log)'}")
        if str(error).startswith("Failed to create llama_context"):
            kind = OutOfMemoryError if "alloc" in reason else UnsupportedError
            return kind(f"llama.cpp cannot make a context for {self.info.path.name}: {reason or 'it does not say why (verbose=True shows its log)'}")
        return error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """llama_decode says only that it failed; the device knows why."""
        try:
            yield
        except RuntimeError as error:
            failure = self._device.take_failure() if self._device else None
            if failure:
                raise failure from failure.__cause__ or error
            raise

    def reset(self) -> None:
        """Empty the context. What a GEAR cache held leaves no trace in later answers."""
        super().reset()
        if self._device and self._ctx.memory is not None:
            self._ctx.kv_cache_clear()

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens, as in llama_cpp.Llama; a failing cache raises its own error.

        Raises:
            UnsupportedError: ``n_tokens`` was set back to where a sliding window is lost.
        """
        with self._turns.step(), self._explained():
            self._require_open()
            has_end = self._ctx.memory is not None and llama_cpp.llama_memory_seq_pos_max(self._ctx.memory, 0) >= self.n_tokens
            if has_end and not free_cells.can_go_back(self.ctx, 0, self.n_tokens):
                raise UnsupportedError(
                    f"the sliding windows of this {self.info.arch} model do not reach back to token {self.n_tokens} any more: reset() and evaluate all "
                    "tokens again, or keep windows whole with swa_full=True"
                )
            super().eval(tokens)

    def embed(self, input: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """Embed text, as in llama_cpp.Llama; a failing cache raises its own error.

        Raises:
            ConfigError: there is nothing to embed: no text, or one without a token.
        """
        texts = [input] if isinstance(input, str) else input
        if not texts:
            raise ConfigError("there is nothing to embed")
        for i, text in enumerate(texts):
            n_tokens = len(self.tokenize(text.encode("utf-8", "replace")))
            if not n_tokens:
                raise ConfigError(f"text {i} to embed is empty: this model's tokenizer makes no token of it")
            if n_tokens > self.n_batch:  # with truncate=False the parent refuses it
                warnings.warn(f"text {i} to embed has {n_tokens} tokens: only the first {self.n_batch} count (n_batch)", stacklevel=2)
        with self._turns.step(), self._explained():
            return super().embed(input, *args, **kwargs)

    # -----------------------------------------------------------------------------------------------------------------------------------------
    # What is asked for is done or refused
    # -----------------------------------------------------------------------------------------------------------------------------------------

    @functools.wraps(_PARENT.create_completion)
    def create_completion(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in llama_cpp.Llama; parameters that nothing could follow are a ConfigError."""
        given = dict(_COMPLETION.bind(self, *args, **kwargs).arguments)
        given.pop("self")
        check_sampling(given)
        if given.get("suffix"):
            raise ConfigError("suffix: llama-cpp-python puts token 0 where a model's own infill tokens belong; write those into the prompt")
        given["logits_processor"] = with_bias(given.pop("logit_bias", None), given.get("logits_processor"), self.n_vocab())
        if given.get("stream"):
            return super().create_completion(**given)
        with self._turns.answer():
            answer: Any = super().create_completion(**given)
            if given.get("echo") and given.get("logprobs") is not None:
                align_echo(self, answer, self._turns.tokens, given["logprobs"])
            return answer

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in llama_cpp.Llama; BusyError when another answer is begun before this one has ended. An exception of a logits processor is raised."""
        given = dict(_GENERATE.bind(self, *args, **kwargs).arguments)
        given.pop("self")
        check_sampling(given)
        check_grammar(self.model, given.get("grammar"))
        processors = given["logits_processor"] = Processors(given["logits_processor"]) if given.get("logits_processor") else None
        return self._turns.take(super().generate(**given), processors, self._drop_sampler, may_send=bool(self._logits_all))

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """As in llama_cpp.Llama; an exception of a logits processor is raised."""
        processors = kwargs.get("logits_processor")
        if self._sampler is None:
            check_sampling(kwargs)
            check_grammar(self.model, kwargs.get("grammar"))
        if not processors or isinstance(processors, Processors):
            return super().sample(*args, **kwargs)
        kept = kwargs["logits_processor"] = Processors(processors)
        token = super().sample(*args, **kwargs)
        kept.raise_failure()
        return token

    @functools.wraps(_PARENT.create_chat_completion)
    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in llama_cpp.Llama. Content in parts, the role "developer", tool_choice "required" with one tool, and a json_schema are understood; what
        cannot be followed is a ConfigError. With a ``chat_handler`` messages go to it as they are."""
        given = dict(_CHAT.bind(self, *args, **kwargs).arguments)
        given.pop("self")
        check_sampling(given)
        if not self.chat_handler:
            if not self.has_chat_template and not self._given.get("chat_format") and not self._warned:
                self._warned = True
                warnings.warn("this model has no chat template: messages are written as Llama 2's were; chat_format names another", stacklevel=2)
            given["messages"] = plain_messages(given["messages"])
            given["tools"], given["tool_choice"] = chosen_tools(given.get("tools"), given.get("tool_choice"))
            given["response_format"] = plain_response_format(given.get("response_format"))
            check_schemas(given, self.verbose)
        given["top_logprobs"] = chosen_logprobs(given.get("logprobs"), given.get("top_logprobs"))
        return super().create_chat_completion(**given)

    # -----------------------------------------------------------------------------------------------------------------------------------------
    # The cache
    # -----------------------------------------------------------------------------------------------------------------------------------------

    def kv_stats(self) -> dict[str, Any]:
        """What the KV cache holds and costs.

        Returns:
            ``kv_type``: its name. ``layers``: one dict for K and one for V of each layer; ``kind`` says what it is: "gear", one of llama.cpp's types, or
            "f16: " and why. ``groups``: the layers by kind, those among them that have a recurrent state or read another layer's cache, and
            ``growth_share``, their share of what the context adds with each token (windows and states do not grow). ``summary``: the same in one line.
            ``total``: sums over the layers, and

            - ``bytes``: memory of the whole cache, reserved for the full context: tiles, exact rows and bookkeeping; ``bytes_used``: the same without
              tiles that hold nothing; ``bytes_f16``: what plain f16 would take.
            - ``bits_per_element``: bits of a packed tile for each number, everything in it counted; ``bits_per_element_all``: the same with exact rows
              and bookkeeping, over the whole context.
            - ``n_written``, ``n_packed``, ``n_exact``: rows, summed over K and V of all layers; ``packed_share``: n_packed / n_written.
            - ``scratch_bytes``: scratch of attention and packing.
            - ``score_error``: what packing did to the scores, root mean square in nats over K of all layers, by the queries that each head met before its
              first tile was packed; ``value_error``: to V's rows, as a share of their size. None where nothing is known: nothing is packed yet, or the
              cache is of llama.cpp's own types. Each layer has ``error``, ``score_error``, and ``worst_head`` with ``worst_error``, in K's nats or V's
              share. docs/accuracy.md says what they mean for the text.
            - ``n_stay_exact``: sides of layers where a head's error went over 2 nats (V: 0.8 of the size), so that their new rows stay f16
              (``stays_exact`` of each layer). On a GPU none does.
            - ``state_bytes``: of the recurrent states of a hybrid, as llama.cpp allocates them.
            - ``growth_share_lost``: the share of what the context adds that stays f16 though it was not asked for.
            - ``codec_bits_per_element``, ``codec_bytes``: only with a codec in Python, whose tiles are kept as f16 and save no memory (``kind`` says so
              for each layer, and all other figures are of that memory): what the codec would store, for each number and for all rows packed now, from
              the mean of the tiles that it coded so far.
        """
        self._require_open()
        layers = self._layer_stats()
        return stats.summarize(self.kv_type, layers, self._device.scratch_bytes() if self._device else 0, self.info, self._allocation)

    def _layer_stats(self) -> list[dict[str, Any]]:
        if self._device:
            device = self._device
            return stats.gear_layers(device.stats(), self.kv_type, self.info, self._allocation, codec=device.codec, operation=device.other_use)
        return [] if self._given.get("vocab_only") else stats.llama_layers(self.kv_type, self.info, self._allocation, self.n_tokens)

    def _layer_groups(self) -> list[allocation.LayerGroup]:
        return allocation.group_layers([(layer["il"], layer["kind"], layer["bytes"]) for layer in self._layer_stats()], self.info, self._allocation)

    @property
    def has_small_windows(self) -> bool:
        """Whether layers have sliding windows with fewer cells than the context: then llama.cpp cannot shift it, and it can go back to an earlier token
        only as far as those cells reach."""
        return any(self._allocation.cells(layer) < self._allocation.n_ctx for layer in self.info.cached_layers)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a chat template. Without one the parent's create_chat_completion falls back to Llama 2's."""
        return self.info.has_chat_template

    def shift_context(self, n_keep: int, n_discard: int) -> None:
        """Make room: drop ``n_discard`` tokens after the first ``n_keep`` and move the later ones up.

        Raises:
            ConfigError: there are not that many tokens.
            UnsupportedError: llama.cpp cannot shift this model's cache.
        """
        self._require_open()
        if n_keep < 0 or n_discard <= 0 or n_keep + n_discard > self.n_tokens:
            raise ConfigError(f"cannot drop {n_discard} tokens after the first {n_keep}: there are {self.n_tokens}")
        memory = llama_cpp.llama_get_memory(self.ctx)
        if not memory or not llama_cpp.llama_memory_can_shift(memory):
            instead = "keep windows whole with swa_full=True, or begin a new context" if self.has_small_windows else "begin a new context instead"
            raise UnsupportedError(f"llama.cpp cannot shift the KV cache of this {self.info.arch} model; {instead}")
        end = n_keep + n_discard
        self._ctx.kv_cache_seq_rm(0, n_keep, end)
        llama_cpp.llama_memory_seq_add(memory, 0, end, self.n_tokens, -n_discard)
        self.input_ids[n_keep : self.n_tokens - n_discard] = self.input_ids[end : self.n_tokens].copy()
        if self._logits_all:
            self.scores[n_keep : self.n_tokens - n_discard] = self.scores[end : self.n_tokens].copy()
        self.n_tokens -= n_discard
        if self.n_tokens > n_keep:
            # llama.cpp rotates the moved keys when it next decodes, and forgets to in a state saved before that: decode the last token again.
            self.n_tokens -= 1
            self.eval([int(self.input_ids[self.n_tokens])])

    # -----------------------------------------------------------------------------------------------------------------------------------------
    # State
    # -----------------------------------------------------------------------------------------------------------------------------------------

    def save_session(self, path: str | os.PathLike[str], data: Any = None) -> int:
        """Save the context with its cache packed as it is, so that `load_session` makes it the same again: the next logits are equal bit for bit.

        Tiles that are full are packed first, which they would be sooner or later anyway; tail, sinks and a tile half filled stay exact, here and in the
        file. The file is written under another name and renamed. A cache of llama.cpp's own types is saved as it is.

        Args:
            path: the file.
            data: anything that JSON can hold, to be returned by `load_session`.

        Returns:
            Bytes of the file.

        Raises:
            GearError: the file cannot be written; an earlier one is as it was.
        """
        self._require_open()
        return sessions.save(self, Path(path), data)

    def load_session(self, path: str | os.PathLike[str]) -> Any:
        """Go back to a saved session of the same model and ``kv_type``; ``n_ctx`` may be another one, if the tokens fit.

        Where the context has lost tokens in the middle (`shift_context`), llama.cpp closes the gap: tiles before it come back as they were, tokens after
        it are packed anew, with the error of one more packing.

        Returns:
            What was given to `save_session` as ``data``.

        Raises:
            DataError: the file is missing, damaged, foreign or of another version, or belongs to another model, cache or context. The present context is
                as it was, or the message says that it is empty now.
        """
        self._require_open()
        return sessions.load(self, Path(path))

    def save_state(self, packed: bool | None = None) -> LlamaState:
        """The state of the context.

        With the cache as f16 it can be loaded under any cache of llama.cpp type f16 with flash attention, GEAR or not. Packed it is a `GearState`: several
        times smaller, for the same model and ``kv_type``, and restored as by `load_session`. Without ``logits_all`` neither holds logits (``scores`` is a
        single zero, which the parent's load_state takes, too).

        Args:
            packed: None: packed if the prompt cache (`set_cache`) is one of gearcpp's.
        """
        self._require_open()
        if packed or (packed is None and isinstance(self.cache, PackedCache)):
            return sessions.pack_state(self)
        size = llama_cpp.llama_state_get_size(self.ctx)
        buffer = (ctypes.c_uint8 * size)()
        n_bytes = llama_cpp.llama_state_get_data(self.ctx, buffer, size)
        self._raise_failure()
        if n_bytes == 0:
            raise DataError("llama.cpp could not save the state; verbose=True shows its log")
        return LlamaState(
            input_ids=self.input_ids.copy(),
            scores=self._scores.copy() if self._logits_all else np.zeros((1, 1), np.single),
            n_tokens=self.n_tokens,
            llama_state=bytes(memoryview(buffer)[:n_bytes]),
            llama_state_size=n_bytes,
            seed=self._seed,
        )

    def load_state(self, state: LlamaState) -> None:
        """Go back to a saved state, also one of llama_cpp.Llama or of a context of another length, as long as its tokens fit.

        Raises:
            DataError: it is of another model, of another cache type, or damaged; the present context is as it was, or the message says that it is empty
                now.
        """
        self._require_open()
        if isinstance(state, sessions.GearState):
            try:
                sessions.load_packed(self, state)
            except DataError as error:
                raise DataError(f"the state cannot be loaded: {error}") from error
            return
        if state.n_tokens > self.n_ctx():
            raise DataError(f"the state holds {state.n_tokens} tokens; this context has room for {self.n_ctx()} (n_ctx)")
        whole = np.frombuffer(state.llama_state, np.uint8)  # no copy: it is as large as the cache would be in f16
        if len(whole) < state.llama_state_size:
            raise DataError(f"the state is cut off: it should have {state.llama_state_size} bytes and has {len(whole)}")
        data = whole.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        with self._listening() as log:
            n_bytes = llama_cpp.llama_state_set_data(self.ctx, data, state.llama_state_size)
        failure = self._device.take_failure() if self._device else None
        if failure or n_bytes != state.llama_state_size:
            self.n_tokens = 0
            self._ctx.kv_cache_clear()
            raise failure or DataError(f"the state cannot be loaded: {sessions.explain_state(log.reason)}; the context is empty now")
        self._take_up(state.input_ids[: state.n_tokens], state.scores, state.seed)

    def _take_up(self, tokens: npt.NDArray[np.intc], scores: npt.NDArray[np.single], seed: int) -> None:
        """What the parent knows of a context that was just restored."""
        self.n_tokens = len(tokens)
        self.input_ids[: self.n_tokens] = tokens
        self._requires_eval = True
        self._seed = seed
        if self._logits_all:
            self.scores[: self.n_tokens] = scores

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """Set the prompt cache, as in llama_cpp.Llama: one of its own, which hold states as f16, or a `GearRAMCache` or `GearDiskCache`, which hold them
        packed. Of the latter this context sees only what belongs to its model and ``kv_type``."""
        self._require_open()
        super().set_cache(cache.of_owner(sessions.owner_name(self._session_owner())) if isinstance(cache, PackedCache) else cache)

    def _session_owner(self) -> dict[str, Any]:
        if self._owner is None:
            self._owner = sessions.owner_of(self)
        return self._owner

    @contextmanager
    def _listening(self) -> Iterator[LlamaLog]:
        with _construction, LlamaLog() as log:
            yield log

    def _raise_failure(self) -> None:
        failure = self._device.take_failure() if self._device else None
        if failure:
            raise failure

    def __getstate__(self) -> dict[str, Any]:
        """The user's own arguments: what makes the same Llama again (without what its context holds)."""
        return dict(self._given)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # -----------------------------------------------------------------------------------------------------------------------------------------
    # The end
    # -----------------------------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free context, model and cache. May be called twice; whatever else is called afterwards raises ClosedError."""
        if self._stack is not None:
            self._sampler = None
            super().close()
            self._ctx = self._model = self._batch = self.tokenizer_ = CLOSED
        if self._device:
            self._device.close()  # where the parent failed before it took the device over

    def _require_open(self) -> None:
        if self._stack is None or getattr(self, "_ctx", CLOSED) is CLOSED:
            raise CLOSED.error()
