"""Ray may take its time: nobody else waits for it, and a gang that is ended is not brought up."""

import json
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).with_name("starved_ray.py")
DEADLINE_S = 120.0


def test_a_gang_that_ray_has_no_room_for() -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(DRIVER)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=DRIVER.parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, ended, full, came_up, bug = map(json.loads, done.stdout.splitlines())
    assert first["start_returned_after_s"] < 5.0, "it waits for Ray"
    assert (ended["kind"], ended["name"], ended["start"]) == ("StartFailed", "decode0", 1)
    assert "was ended before" in ended["reason"]
    assert (full["kind"], full["start"]) == ("StartFailed", 2)
    assert full["reason"].startswith("Ray has no room for decode0: 1 ranks")
    came_up.pop("reason")
    assert came_up == {"kind": "Exited", "name": "decode0/0", "start": 3}
    assert (bug["kind"], bug["name"], bug["start"]) == ("StartFailed", "store0", 4)
    assert "needs a folder" in bug["reason"]
