"""llama.cpp's own converter, run from a checkout in an environment of its own: for the model classes that ours does not know."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from gearcpp.errors import ConfigError, DataError

_SCRIPT = "convert_hf_to_gguf.py"
_REQUIREMENTS = Path("requirements") / "requirements-convert_hf_to_gguf.txt"
_LINES_SHOWN = 12
_INCLUDED = re.compile(r"\s*(?:-r|--requirement)[\s=]+(\S+)")


def check_checkout(checkout: Path, current_python: bool) -> None:
    """Refuse what is no checkout of llama.cpp.

    Raises:
        ConfigError: no such folder, or a folder without the converter or, where an environment is to be made, its requirements.
    """
    if not checkout.is_dir():
        raise ConfigError(f"there is no folder {checkout}: upstream must name a checkout of llama.cpp, or its unpacked sources")
    for needed in (Path(_SCRIPT), *([] if current_python else [_REQUIREMENTS])):
        if not (checkout / needed).is_file():
            raise ConfigError(f"{checkout} is no checkout of llama.cpp: it has no {needed}")


def run_converter(checkout: Path, folder: Path, output: Path, outtype: str, *, current_python: bool, report: Callable[[str], None]) -> None:
    """Convert `folder` to `output` by the converter of `checkout`.

    It runs with its own gguf-py, so that the installed gguf stays as it is.

    Raises:
        ConfigError: `checkout` is none.
        DataError: the environment cannot be made, or the converter failed; its last lines are in the message.
    """
    check_checkout(checkout, current_python)
    python = Path(sys.executable) if current_python else _environment(checkout, report)
    report(f"converting by {checkout / _SCRIPT}")
    # The name is given without its folder, in which the converter would fill in braces.
    command = [str(python), str((checkout / _SCRIPT).resolve()), str(folder.resolve()), "--outfile", output.name, "--outtype", outtype]
    _run(command, "llama.cpp's converter failed", output.parent, _variables(current_python))
    if not output.is_file():
        raise DataError(f"llama.cpp's converter ({checkout / _SCRIPT}) ended without an error and without a file")


def environments() -> Path:
    """Where the converters' environments are kept: one for each list of requirements and version of Python."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gearcpp" / "upstream"


def _environment(checkout: Path, report: Callable[[str], None]) -> Path:
    """The Python of the environment with the converter's requirements, made if there is none."""
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in _requirement_files(checkout / _REQUIREMENTS))).hexdigest()[:16]
    kept = environments() / f"python{sys.version_info.major}.{sys.version_info.minor}-{digest}"
    if not _python(kept).exists():
        report(f"installing the converter's requirements into {kept} (once)")
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=".making-", dir=kept.parent))
        except OSError as error:
            raise DataError(f"cannot write {kept.parent}: {error.strerror}") from error
        try:
            _make_environment(made, checkout)
            if not kept.exists():  # another process may have been faster
                made.replace(kept)
        except OSError as error:
            if not _python(kept).exists():
                raise DataError(f"cannot write {kept}: {error.strerror}") from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return _python(kept)


def _make_environment(folder: Path, checkout: Path) -> None:
    variables = _variables(current_python=False)
    _run([sys.executable, "-m", "venv", str(folder)], "no Python environment could be made for llama.cpp's converter", folder, variables)
    # pip is run as a module: the scripts of an environment do not survive its renaming.
    install = [str(_python(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str((checkout / _REQUIREMENTS).resolve())]
    advice = "with --upstream-python (upstream_python=True) the current Python is used, if it has what the converter needs"
    _run(install, f"the requirements of llama.cpp's converter could not be installed ({advice})", folder, variables)


def _python(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _requirement_files(path: Path, seen: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The file and those that it includes."""
    path = path.resolve()
    if path in seen or not path.is_file():
        return
    yield path
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := _INCLUDED.match(line):
            yield from _requirement_files(path.parent / match[1], seen | {path})


def _variables(current_python: bool) -> Mapping[str, str]:
    """Without what would lead to another gguf than the checkout's, or to packages of another Python."""
    unwanted = {"NO_LOCAL_GGUF"} | (set() if current_python else {"PYTHONPATH", "PYTHONHOME"})
    return {name: value for name, value in os.environ.items() if name not in unwanted}


def _run(command: Sequence[str], failure: str, folder: Path, variables: Mapping[str, str]) -> None:
    """Raises DataError with the last lines of a command that fails."""
    try:
        finished = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False, cwd=folder, env=variables
        )
    except OSError as error:
        raise DataError(f"{failure}: {command[0]} cannot be run ({error.strerror})") from error
    if finished.returncode:
        lines = [line for line in finished.stdout.splitlines() if line.strip()][-_LINES_SHOWN:]
        shown = "".join(f"\n    {line}" for line in lines) or " nothing"
        raise DataError(f"{failure} (exit status {finished.returncode}); its last lines:{shown}")
