"""The command: every experiment is offered, runs small, is kept, and complains in words."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from bench.simulate.command import EXPERIMENTS, add_arguments, complaint, run

NAMES = (
    "batching", "blocks", "ring", "budgets", "disaggregation", "routing", "predictor", "overhead",
)  # fmt: skip


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_every_experiment_is_offered() -> None:
    assert tuple(EXPERIMENTS) == NAMES
    assert complaint(parse("all")) == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nonsense",), "no such"),
        (("all", "--seeds", "1"), "interval"),
        (("ring", "--size", "0"), "above 0"),
    ],
)
def test_mistakes_are_told_in_words(words: tuple[str, ...], says: str) -> None:
    assert says in complaint(parse(*words))


def test_an_experiment_runs_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = parse(
        "overhead", "--seeds", "2", "--size", "0.05", "--no-live", "--save", str(tmp_path)
    )
    assert run(arguments) == 0
    assert "null case" in capsys.readouterr().out
    kept = tmp_path / "experiments"
    assert sorted(path.name for path in kept.iterdir()) == [
        "overhead.jsonl", "overhead.md", "overhead.png",
    ]  # fmt: skip
    assert "--no-live" in (kept / "overhead.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_runs_small_and_its_null_case_holds(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "bench.simulate", name, "--seeds", "2"]
    command += ["--size", "0.3", "--no-live", "--save", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "experiments" / f"{name}.png").exists()
