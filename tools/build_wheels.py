"""Wheels of gearcpp that need no compiler where they are installed: py3-none-manylinux_2_28, for x86-64 and aarch64.

    python tools/build_wheels.py [--to dist] [--machines x86_64,aarch64]

    --to        where the wheels are put; default: dist
    --machines  which; default: both

The compiler is zig's clang (the package ziglang), which has every glibc's symbols and so builds for an old one, and for another machine, without a
container; its C++ library is linked in. Kernels of every level are in each wheel, and the machine decides at run time, as with any other build. There
are no CUDA kernels. Each wheel is checked: auditwheel finds the platform that its name says, no C++ library is asked for, the plugin's entry points are
there, and its kernels give what the scalar ones give: on this machine, and on the other under qemu where there is one (on Debian: qemu-user-static and
libc6-arm64-cross).
What builds (ziglang, auditwheel, scikit-build-core, cffi, ninja, cmake) is installed into an environment of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GLIBC = "2.28"
MACHINES = ("x86_64", "aarch64")
EXPORTED = ("ggml_backend_init", "ggml_backend_score", "gear_open", "gear_cache_new", "gear_simd_name")
# What may be asked of the machine: glibc's libraries.
ALLOWED = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def run(*command: str | Path, **environment: str) -> str:
    """What a command prints; its end other than well is ours, too."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(str(part) for part in command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def make_environment(folder: Path) -> Path:
    """A Python with what builds and checks."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "ziglang", "auditwheel", "scikit-build-core>=0.11", "cffi>=1.15", "ninja", "cmake", "pyelftools")
    return python


def compiler(python: Path, folder: Path, machine: str) -> Path:
    """A program that CMake takes for a C++ compiler: zig's, for a machine and a glibc."""
    path = folder / f"zig-c++-{machine}"
    path.write_text(f'#!/bin/sh\nexec "{python}" -m ziglang c++ -target {machine}-linux-gnu.{GLIBC} "$@"\n')
    path.chmod(0o755)
    return path


def build(python: Path, folder: Path, machine: str, to: Path) -> Path:
    """One wheel."""
    settings = {
        "CMAKE_CXX_COMPILER": str(compiler(python, folder, machine)),
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": machine,
        "GEARCPP_CUDA": "OFF",
        "CMAKE_SHARED_LINKER_FLAGS": "-s",
    }
    defines = [word for name, value in settings.items() for word in ("-C", f"cmake.define.{name}={value}")]
    made = folder / machine
    run(
        python,
        *("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", made, *defines, "-C", f"build-dir={folder / f'build-{machine}'}", ROOT),
        _PYTHON_HOST_PLATFORM=f"manylinux_{GLIBC.replace('.', '_')}_{machine}",
        PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        CMAKE_ARGS="",
    )
    (wheel,) = made.glob("gearcpp-*.whl")
    to.mkdir(parents=True, exist_ok=True)
    return wheel.replace(to / wheel.name)


CHECK = """
import sys
from elftools.elf.elffile import ELFFile
with open(sys.argv[1], "rb") as file:
    elf = ELFFile(file)
    print("machine", elf.get_machine_arch())
    for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED"):
        print("needs", tag.needed)
    for symbol in elf.get_section_by_name(".dynsym").iter_symbols():
        if symbol["st_shndx"] != "SHN_UNDEF":
            print("has", symbol.name)
"""


def run_kernels(python: Path, folder: Path, library: str, machine: str) -> str:
    """The kernel levels that tools/wheel_check.cpp ran, each against the scalar one; of another machine under qemu where that is here."""
    program = folder / f"wheel_check-{machine}"
    include, source = ROOT / "native/include", ROOT / "tools/wheel_check.cpp"
    run(compiler(python, folder, machine), "-std=c++17", "-O1", f"-I{include}", source, library, f"-Wl,-rpath,{Path(library).parent}", "-o", program)
    if machine == os.uname().machine:
        return run(program).strip()
    emulator, system = shutil.which(f"qemu-{machine}-static"), Path(f"/usr/{machine}-linux-gnu")
    if not emulator or not system.exists():
        return ""
    return run(emulator, "-cpu", "max", "-L", system, program).strip()


def check(python: Path, folder: Path, wheel: Path, machine: str) -> list[str]:
    """What is wrong with a wheel."""
    problems = []
    platform = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
    if not wheel.name.endswith(f"-py3-none-{platform}.whl"):
        problems.append(f"it is called {wheel.name}")
    said = run(python, "-m", "auditwheel", "show", wheel)
    best = re.findall(rf'"(manylinux_\d+_\d+_{machine})"', said.replace("\n", " "))
    if not best or tuple(map(int, best[0].split("_")[1:3])) > tuple(map(int, GLIBC.split("."))):
        problems.append(f"auditwheel: {' '.join(said.split())}")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("gearcpp/libgearcpp.so", folder / f"unpacked-{machine}")
    found = run(python, "-c", CHECK, library).splitlines()
    needs = {line.split()[1] for line in found if line.startswith("needs ")}
    if needs - ALLOWED:
        problems.append(f"it needs {', '.join(sorted(needs - ALLOWED))}")
    for name in EXPORTED:
        if f"has {name}" not in found:
            problems.append(f"it does not export {name}")
    levels = run_kernels(python, folder, library, machine)
    print(f"{wheel.name}: kernels that ran: {levels or f'none, there is no qemu-{machine}-static and /usr/{machine}-linux-gnu'}")
    if levels and levels.split()[0] == "scalar":
        problems.append("none but the scalar kernels run")
    if found[0] != {"x86_64": "machine x64", "aarch64": "machine AArch64"}[machine]:
        problems.append(f"it is for {found[0]}")
    return problems


def main() -> int:
    """Build and check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--to", type=Path, default=ROOT / "dist")
    parser.add_argument("--machines", default=",".join(MACHINES))
    options = parser.parse_args()
    n_bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = make_environment(folder / "venv")
        for machine in options.machines.split(","):
            if machine not in MACHINES:
                raise SystemExit(f"unknown machine {machine!r}; known: {', '.join(MACHINES)}")
            wheel = build(python, folder, machine, options.to.resolve())
            problems = check(python, folder, wheel, machine)
            n_bad += bool(problems)
            print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB: {'; '.join(problems) or 'good'}", flush=True)
    return n_bad


if __name__ == "__main__":
    sys.exit(main())
