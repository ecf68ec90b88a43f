"""Are the tests any good? Plants known bugs, one after the other, and looks whether each is caught.

    python -m tests.planted.__main__ [--only TEXT]

Works in a checkout: ``tests/planted/bugs.toml`` says what to plant and what should catch it. The
tree is copied, the copy is changed, and the simulation and the tests run there. Exit status 1 when
a bug is missed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from bench.environment import headline
from protocol.errors import ConfigError

CATALOGUE = Path("tests/planted/bugs.toml")
LEFT_OUT = (".git", ".venv", ".scratch", "__pycache__", "*.safetensors", ".hypothesis", "docs")
TIMEOUT_S = 300.0
PYTEST = ("-m", "pytest", "-q", "-x", "-m", "not slow", "--hypothesis-profile=whole")


@dataclass(frozen=True, slots=True)
class Bug:
    """A change that must not go unnoticed."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()  # pytest's arguments
    seeds: int = 0  # to be simulated

    def plant(self, root: Path) -> None:
        """Change the file.

        Raises:
            ConfigError: the file no longer has the text.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if self.old not in text:
            raise ConfigError(f"{CATALOGUE}: {self.name!r}: {self.file} has no {self.old!r}")
        path.write_text(text.replace(self.old, self.new, 1), encoding="utf-8")

    def commands(self) -> list[list[str]]:
        """What should fail; the quickest first."""
        found = []
        if self.seeds:
            simulate = ["tests.simulation", "--seeds", str(self.seeds), "--workers", "1"]
            found.append([sys.executable, "-m", *simulate])
        if self.tests:
            found.append([sys.executable, *PYTEST, *self.tests])
        return found


def load(path: Path = CATALOGUE) -> list[Bug]:
    """The catalogue.

    Raises:
        ConfigError: this is no checkout.
    """
    if not path.is_file():
        raise ConfigError(f"no {path}: run this in a checkout of the repository")
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["bug"]
    return [Bug(**{**entry, "tests": tuple(entry.get("tests", ()))}) for entry in entries]


def catch(bug: Bug, source: Path) -> str:
    """What caught it; empty if nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        shutil.copytree(source, root, ignore=shutil.ignore_patterns(*LEFT_OUT))
        bug.plant(root)
        for command in bug.commands():
            try:
                code = subprocess.run(
                    command,
                    cwd=root,
                    env=_environment(root),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=TIMEOUT_S,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = 1  # it hangs: that is seen as well
            if code == 1:
                return "simulation" if "tests.simulation" in command else " ".join(bug.tests)
    return ""


def _environment(root: Path) -> dict[str, str]:
    """Ours, but for where modules come from: an installed copy must not be tested instead."""
    return {**dict(os.environ.items()), "PYTHONPATH": str(root)}


def main() -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="tests.planted", description=summary)
    parser.add_argument("--only", default="", metavar="TEXT", help="bugs with this in their name")
    arguments = parser.parse_args()
    try:
        bugs = [bug for bug in load() if arguments.only in bug.name]
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(headline())
    num_caught = 0
    for bug in bugs:
        started = time.monotonic()
        by = catch(bug, Path.cwd())
        num_caught += bool(by)
        verdict = f"caught by {by}" if by else "MISSED"
        print(f"{bug.name:62s} {time.monotonic() - started:5.1f} s  {verdict}", flush=True)
    print(f"{num_caught} of {len(bugs)} planted bugs caught")
    return int(num_caught < len(bugs))


if __name__ == "__main__":
    sys.exit(main())
