"""Which model, and the one place where the command line loads it."""

from __future__ import annotations

import fnmatch
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gearcpp.cli._console import notice
from gearcpp.errors import ConfigError, GearError
from gearcpp.model_files import assistant_model, bundled_model
from gearcpp.model_info import read_model_info

if TYPE_CHECKING:
    from gearcpp import Llama
    from gearcpp.cache.kv_type import KVTypeLike

DEFAULT_QUANT = "Q4_K_M"
DEFAULT_CTX = 8192


def resolve_model(file: Path | None, hf: str | None) -> Path:
    """The GGUF file that ``-m`` or ``-hf`` names; else the model of the extra ``assistant``, or the one that comes with gearcpp.

    Raises:
        ConfigError: both were given.
        DataError: nothing was named, and there is no model to fall back on.
        GearError: the download failed.
    """
    if file and hf:
        raise ConfigError("-m and -hf name two models: give one of them")
    if hf:
        return download(hf)
    return file or assistant_model() or bundled_model()


def download(name: str) -> Path:
    """Fetch ``user/repo[:quant]`` from Hugging Face, with its progress bar, into its cache; without a network, what the cache holds.

    Args:
        name: as llama.cpp's ``-hf``; the quantization is Q4_K_M if there is one, else the first file.

    Returns:
        The GGUF file; of a model in several parts, the first.

    Raises:
        ConfigError: the name is malformed, or the repository has no such quantization.
        GearError: there is no such repository, or no way to reach it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if not (match := re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", name)):
        raise ConfigError(f"-hf wants USER/REPO or USER/REPO:QUANT, such as ggml-org/gemma-3-1b-it-GGUF:Q4_K_M, not {name!r}")
    repo, quant = match.groups()
    try:
        parts = [hf_hub_download(repo, name) for name in choose_files(_list_files(repo), quant, repo)]
        return Path(parts[0])
    except GatedRepoError as error:
        raise GearError(f"{repo} is gated: accept its terms on huggingface.co, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise GearError(f"there is no repository {repo} on Hugging Face (or it is private: run `hf auth login`)") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise GearError(f"cannot fetch {repo} from Hugging Face ({_reason(error)}); check the network, or give a file with -m") from error


def _list_files(repo: str) -> list[str]:
    """Names of the repository's files; when it cannot be reached, of those in the cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return [file.rfilename for file in HfApi().model_info(repo).siblings or []]
    except HfHubHTTPError:
        raise
    except Exception as error:  # no network: the exception's class belongs to whichever HTTP library this huggingface_hub uses
        try:
            folder = Path(snapshot_download(repo, local_files_only=True))
        except LocalEntryNotFoundError:
            raise OSError(_reason(error)) from error
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]


def choose_files(names: list[str], quant: str | None, repo: str) -> list[str]:
    """The parts of one model among a repository's files, in order. ConfigError when there is none of that quantization."""
    models = sorted(name for name in names if name.endswith(".gguf") and not Path(name).name.lower().startswith("mmproj"))
    if not models:
        raise ConfigError(f"{repo} holds no GGUF file; look for a repository whose name ends in -GGUF")
    matching = [name for name in models if fnmatch.fnmatch(name.lower(), f"*{(quant or DEFAULT_QUANT).lower()}[.-]*")]
    if quant and not matching:
        raise ConfigError(f"{repo} has no {quant}; it has {', '.join(models)}")
    first = (matching or models)[0]
    parts = re.sub(r"-\d{5}-of-(\d{5})\.gguf$", r"-[0-9]*-of-\1.gguf", first)
    return [name for name in models if name == first or fnmatch.fnmatchcase(name, parts)]


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def default_threads() -> int:
    """Physical cores that this process may use."""
    from gearcpp.runtime.threads import usable_cores

    return usable_cores()


def load_model(
    path: Path,
    kv: KVTypeLike,
    *,
    kv_budget: str | None = None,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_batch: int | None = None,
    swa_full: bool = False,
    verbose: bool = False,
) -> Llama:
    """Load a model with the KV cache asked for.

    Args:
        path: GGUF file.
        kv: any form of ``kv_type``.
        kv_budget: as gearcpp.Llama has it.
        n_ctx: cells of the cache, 0: what the model was trained for; None: that, but at most `DEFAULT_CTX`.
        n_threads: of generation and prefill both; None: the physical cores.
        n_batch: tokens of a batch and of a step; None: gearcpp.Llama's.
        swa_full: sliding windows get as many cells as the context.
        verbose: llama.cpp's log on stderr.

    Raises:
        GearError: of the kind that `gearcpp.Llama` raises.
    """
    from gearcpp import Llama

    if not verbose:
        silence_llama_log()
    trained = read_model_info(path).n_ctx_train
    n_ctx = default_ctx(trained, n_ctx)
    if n_ctx > trained:
        notice(f"note: this model was trained for {trained} tokens; past them its answers degrade")
    threads = n_threads or default_threads()
    batch: dict[str, Any] = {"n_batch": n_batch, "n_ubatch": n_batch} if n_batch else {}
    return Llama(
        str(path),
        kv_type=kv,
        kv_budget=kv_budget,
        n_ctx=n_ctx,
        **batch,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        swa_full=swa_full,
        verbose=verbose,
    )


def default_ctx(trained: int, given: int | None) -> int:
    """Tokens of a context: those given, 0 for all that the model was trained for, None for that, but at most `DEFAULT_CTX`."""
    return min(trained, DEFAULT_CTX) if given is None else given or trained


def silence_llama_log() -> None:
    """Keep llama.cpp's log off the terminal. llama-cpp-python's own filter does not: its level numbers are old, warnings pass as errors."""
    import llama_cpp

    llama_cpp.llama_log_set(_drop_log_line(), None)


@functools.cache  # llama.cpp keeps the pointer: the callback must live as long as the process
def _drop_log_line() -> Any:
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, user: None)
