"""What a measurement or a bug report must carry: the machine and the versions of what matters."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

from protocol.process.limits import num_cores

PACKAGES = ("baton-serve", "torch", "nixl", "pyzmq", "msgspec", "fastapi", "ray", "flash-attn")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe() -> dict[str, str]:
    """The machine and the versions, as short strings."""
    return {
        "cpu": _cpu_model(),
        "cores": str(num_cores()),
        "memory": f"{_memory_gib():.0f} GiB",
        "gpu": "yes" if Path("/dev/nvidiactl").exists() else "none",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "compiler": shutil.which("g++") or "none: decode attention uses its slower fallback",
        **{package: _version(package) for package in PACKAGES},
    }


def headline() -> str:
    """One line to print above a figure."""
    found = describe()
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['memory']}; Python {found['python']}, "
        f"torch {found['torch']}, nixl {found['nixl']}, baton {found['baton-serve']}"
    )
