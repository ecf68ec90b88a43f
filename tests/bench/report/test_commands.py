"""``baton bench report | compare | import | export`` from end to end, against toy servers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.load.alternation import Contest, order_of
from bench.load.driving.driver import Target
from bench.load.planning import Options, recipe_of
from bench.load.record import read_run, write_run
from bench.load.workload.prompts import Api, Dialect
from launcher.__main__ import main
from protocol.errors import ConfigError
from tests.bench.example import sample_run
from tests.bench.toy_server import ToyConfig

LOAD = ["--workload", "lengths:prompt=64,output=4", "--rate", "40", "--requests", "12"]


def test_compare_takes_turns_and_concludes(toy: Callable[..., str], tmp_path: Path) -> None:
    quick, slow = (toy(ToyConfig(base_s, 0.0, 0.002)) for base_s in (0.02, 0.04))
    targets = [f"quick={quick}", f"slow={slow}"]
    gate = ["--gate", "ttft_s.p50=1.2"]
    output = ["--output", str(tmp_path)]
    code = main(["bench", "compare", *targets, "--blocks", "2", *LOAD, *gate, *output])
    manifest, records = read_run(tmp_path)
    assert manifest.driver["block_starts"] == [0, 12]
    assert [target["name"] for target in manifest.targets] == ["quick", "slow"]
    pairs = {name: [r for r in records if r.target == name] for name in ("quick", "slow")}
    asked = [[(r.index, r.intended_s, r.session) for r in own] for own in pairs.values()]
    assert asked[0] == asked[1]
    assert [index for index, _, _ in asked[0]] == list(range(24))
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["verdict"] == ("fail" if manifest.valid else "invalid")
    assert code == (4 if manifest.valid else 3)  # a busy machine makes the driver late
    rows = {(row["metric"], row["statistic"]): row for row in found["pairs"][0]["rows"]}
    paired = rows["ttft_s", "paired"]
    assert paired["low"] < 2.0 < 1.3 * paired["high"]
    assert paired["ratio"] > 1.2
    assert (tmp_path / "report.html").exists()


def _targets(*names: str) -> list[Target]:
    return [Target(name, "http://127.0.0.1:1", Dialect("m", Api.TOKENS)) for name in names]


def test_turns_go_back_and_forth() -> None:
    orders = [[t.name for t in order_of(_targets("a", "b", "c"), block)] for block in range(3)]
    assert orders == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


@pytest.mark.parametrize(("names", "num_blocks"), [("a", 4), ("aa", 4), ("ab", 1), ("ab", 2000)])
def test_contests_that_prove_nothing(names: str, num_blocks: int) -> None:
    recipe = recipe_of(Options(rate=1.0, requests=4))
    with pytest.raises(ConfigError):
        Contest(_targets(*names), recipe, num_blocks)


def test_reports_of_a_run_and_of_the_example(tmp_path: Path) -> None:
    write_run(tmp_path / "run", *sample_run(0, 4.0, 6.0))
    assert main(["bench", "report", str(tmp_path / "run"), "--no-plots"]) == 3
    assert (tmp_path / "run/report.html").exists()
    example = ["bench", "report", "--example", "--no-plots", "--output", str(tmp_path / "example")]
    assert main(example) == 3
    assert (tmp_path / "example/report.html").exists()


@pytest.mark.parametrize("source", ["vllm", "aiperf"])
def test_out_and_in_again(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", *sample_run(0, 4.0, 6.0))
    out = ["--output", str(tmp_path / "out")]
    assert main(["bench", "export", str(tmp_path / "run"), "--to", source, *out]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(files) == 2
    back = ["--output", str(tmp_path / "back")]
    assert main(["bench", "import", str(files[0]), "--from", source, *back]) == 0
    manifest, records = read_run(tmp_path / "back")
    assert manifest.driver["imported_from"]
    assert records
    report = ["bench", "report", str(files[0]), "--from", source, "--no-plots"]
    assert main([*report, "--output", str(tmp_path / "seen")]) == 0
    assert "UNAUDITED" in (tmp_path / "seen/report.html").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["report"],
        ["report", "a", "b"],
        ["report", "a", "--example"],
        ["report", "nowhere"],
        ["compare", "a=http://127.0.0.1:1", "b", *LOAD, "--output", "{}"],
        ["compare", "http://127.0.0.1:1", *LOAD, "--output", "{}", "--gate", "x"],
        ["compare", "a=local:--nonsense", "b=http://127.0.0.1:1", *LOAD, "--output", "{}"],
        ["import", "nowhere", "--from", "vllm", "--output", "{}"],
    ],
)
def test_mistakes_are_one_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *(word.replace("{}", str(tmp_path)) for word in words)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
