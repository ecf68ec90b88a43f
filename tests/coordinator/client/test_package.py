"""The client as a distribution: it needs only httpx and msgspec, its blocking half is generated."""

import subprocess
import sys
from pathlib import Path

from tests.test_house_style import PACKAGES, ROOT

FOLDER = ROOT / "coordinator" / "client"


def test_the_blocking_client_is_generated_anew() -> None:
    command = [sys.executable, str(FOLDER / "generate_sync.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_imports_nothing_else_of_this_repository(tmp_path: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import baton_client; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(FOLDER)},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(done.stdout.split())
    assert {"baton_client", "httpx", "msgspec"} <= imported
    assert not imported & {*PACKAGES, "torch", "numpy", "zmq"}
