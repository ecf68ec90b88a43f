"""C++ helpers, compiled on the machine that runs them.

1. ``load_native`` names the library after everything that decides its code: the source, the
   compiler, its flags and the CPU's features. A cached one with that name is loaded as it is.
2. Otherwise one process compiles, the others wait at a file lock; the finished file appears under
   its name by an atomic rename.
3. Without a compiler, or with a cache folder that others may write to, the caller gets None and
   takes its slower path: nothing here is needed for a correct answer.

ctypes releases the GIL during calls.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "cpp"
COMPILERS = ("g++", "c++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp-simd", "-shared", "-fPIC", "-pthread"),
)
COMPILE_TIMEOUT_S = 120.0

_log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    return Path.home() / ".cache" / "baton"


def load_native(name: str, cache_dir: Path | None = None) -> ctypes.CDLL | None:
    """The library of ``cpp/NAME.cpp``, compiled at the first use on this machine.

    Args:
        name: the source's file name without its ending.
        cache_dir: where compiled libraries are kept; None takes :func:`default_cache_dir`.

    Returns:
        None when it cannot be had; the reason is logged.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        _log.warning("no C++ compiler (%s): %s takes its slow path", ", ".join(COMPILERS), name)
        return None
    folder = cache_dir or default_cache_dir()
    try:
        _prepare_folder(folder)
        source = SOURCES / f"{name}.cpp"
        library = folder / f"{name}-{_build_key(source, compiler)}.so"
        if not library.exists():
            _compile(source, library, compiler)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        lines = str(error.stderr).strip().splitlines()
        _log.warning("%s does not compile: %s", name, lines[0] if lines else error)
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("no native %s: %s", name, error)
    return None


def _prepare_folder(folder: Path) -> None:
    """Make the folder, and refuse one to which other users can write: its libraries are run."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{folder} can be written to by other users")


def _build_key(source: Path, compiler: str) -> str:
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_TIMEOUT_S
    ).stdout
    parts = (source.read_bytes(), version, " ".join(FLAGS).encode(), _cpu_features())
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _cpu_features() -> bytes:
    """What ``-march=native`` goes by: model and feature flags of the first CPU."""
    kept = {"flags", "Features", "vendor_id", "cpu family", "model", "CPU part"}
    lines: list[str] = [platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first = cpuinfo.read_text().split("\n\n")[0]
        lines += [line for line in first.splitlines() if line.partition(":")[0].strip() in kept]
    return "\n".join(lines).encode()


def _compile(source: Path, library: Path, compiler: str) -> None:
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file closes, or its process dies
        if library.exists():
            return
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            target = Path(scratch) / library.name
            subprocess.run(
                [compiler, *FLAGS, "-o", str(target), str(source), "-lrt"],
                capture_output=True,
                text=True,
                check=True,
                timeout=COMPILE_TIMEOUT_S,
            )
            target.rename(library)
