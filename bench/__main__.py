"""All figures, one after the other: ``python -m bench [--save DIR]``.

Each is a command of its own that anyone can run alone; this runs them with their defaults, and with
``--save`` keeps what they print, with the command, the machine and the versions, one file each.
"""

import argparse
import datetime
import subprocess
import sys
from pathlib import Path

from bench.environment import headline

FIGURES: dict[str, tuple[str, ...]] = {
    "ring": ("bench.ring",),
    "handoff": ("bench.handoff",),
    "transfer": ("bench.transfer",),
    "files": ("bench.files",),
    "kernels": ("bench.kernels",),
}


def run_figure(name: str, module: tuple[str, ...], save: Path | None) -> int:
    """Run one figure's command, show what it prints, and keep it if that is asked for."""
    command = f"python -m {' '.join(module)}"
    print(f"\n== {name}: {command}", flush=True)
    argv = [sys.executable, "-P", "-m", *module]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    if save is not None and done.returncode == 0:
        today = datetime.datetime.now(tz=datetime.UTC).date()
        text = f"$ {command}\n# {today}, {headline()}\n\n{done.stdout}"
        (save / f"{name}.txt").write_text(text, encoding="utf-8")
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("names", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("--save", type=Path, help="a folder to keep the results in")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - FIGURES.keys()
    if unknown:
        parser.error(f"no such figure: {', '.join(sorted(unknown))}")
    if arguments.save is not None:
        arguments.save.mkdir(parents=True, exist_ok=True)
    print(headline())
    chosen = arguments.names or list(FIGURES)
    codes = [run_figure(name, FIGURES[name], arguments.save) for name in chosen]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
