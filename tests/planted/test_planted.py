"""Every planted bug still fits the tree; that each is caught is shown by ``make planted``."""

from pathlib import Path

import pytest

from protocol.errors import ConfigError
from tests.planted.__main__ import Bug, load

ROOT = Path(__file__).resolve().parents[2]
BUGS = load(ROOT / "tests/planted/bugs.toml")


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_a_planted_bug_changes_one_place_and_is_looked_for(bug: Bug) -> None:
    text = (ROOT / bug.file).read_text()
    assert text.count(bug.old) == 1, f"{bug.file} has the text {text.count(bug.old)} times"
    assert bug.new not in text or bug.new in bug.old or not bug.new
    assert bug.commands()
    for name in bug.tests:
        assert (ROOT / name).exists()


def test_there_are_enough_of_them() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 15


def test_a_bug_that_no_longer_fits_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="a\\.py has no 'y'"):
        Bug("b", "a.py", "y", "z").plant(tmp_path)


def test_outside_a_checkout_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkout"):
        load(tmp_path / "bugs.toml")
