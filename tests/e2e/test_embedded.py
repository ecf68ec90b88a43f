"""The model that ships, asked over HTTP: every split gives the same right answers."""

import os
import subprocess
import sys
from random import Random

import pytest

from modeling.embedded import CHECKPOINT
from modeling.embedded.grammar import Document, write_document
from modeling.text.tokenizer import load_tokenizer
from tests.e2e.cluster import parse_path, run_cluster

NUM_TOKENS = 3000
DEMO_S = 200.0
COLOCATED = ("--decode", "tp1")
QUICK = (
    COLOCATED,
    (),
    ("--prefill", "cp2", "--decode", "tp2"),
    ("--prefill", "cp3", "--decode", "tp1", "--transport", "tcp"),
)
THOROUGH = (
    ("--prefill", "cp2tp2", "--decode", "tp2"),
    ("--prefill", "cp1tp2", "--decode", "tp1"),
    ("--prefill", "cp4", "--decode", "tp2"),
    ("--prefill", "cp2", "--prefill", "cp1", "--decode", "tp1", "--decode", "tp2"),
)


@pytest.fixture(scope="module")
def document() -> Document:
    tokenizer = load_tokenizer(str(CHECKPOINT))
    return write_document(
        Random("splits"), NUM_TOKENS, lambda text: len(tokenizer.encode(text)) - 1
    )


@pytest.mark.cluster
@pytest.mark.parametrize(
    "split", [*QUICK, *(pytest.param(split, marks=pytest.mark.slow) for split in THOROUGH)]
)
def test_every_split_gives_the_same_right_answers(
    document: Document, split: tuple[str, ...]
) -> None:
    random = Random(0)
    asked = [*document.facts[::9], *document.absent[:2]]
    messages: list[dict[str, str]] = []
    with run_cluster(*split, "--kv-memory", "128MiB", "--checksum", "always") as cluster:
        for index, fact in enumerate(asked):
            question = fact.question(random, paraphrase=index % 2 == 1)
            content = question if messages else f"{document.text}\n\n{question}"
            messages.append({"role": "user", "content": content})
            answer = cluster.client.chat(
                messages, temperature=0, max_tokens=40, session_id="splits"
            )
            assert (answer.text, answer.finish_reason) == (fact.answer, "stop")
            messages.append({"role": "assistant", "content": fact.answer})
            path = parse_path(answer.path)
            computed = int(path["computed"])
            assert computed < 100 if index else computed > NUM_TOKENS
            assert ("prefill" in path) is (index == 0 and split != COLOCATED)


@pytest.mark.cluster
def test_the_demo_tells_its_story_and_leaves_nothing() -> None:
    run = subprocess.run(
        [sys.executable, "-P", "-m", "launcher", "demo", "--tokens", "4096", "--seed", "3"],
        capture_output=True,
        text=True,
        timeout=DEMO_S,
        env={**os.environ, "COLUMNS": "160"},
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "5 of 5 answers right; blocks still held: 0" in run.stdout
    assert "ring=2" in run.stdout and "every process has ended" in run.stdout
    assert "wrong" not in run.stdout
