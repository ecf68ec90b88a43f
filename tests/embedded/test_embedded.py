"""The embedded model answers rightly, says when it cannot, and needs every block to be in place."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modeling.embedded import CHECKPOINT
from modeling.embedded.grammar import UNKNOWN, Document, write_document
from modeling.embedded.lexicon import (
    ALONE,
    DOMAINS,
    OFFICES,
    VALUE_WORDS,
    concept_words,
    filler_words,
    place_names,
)
from tests.embedded.builder.build import build
from tests.embedded.builder.kernels import MAX_DISTANCE, REACH, Floats, exactly, recency
from tests.embedded.builder.vocabulary import SPACE, build_vocabulary

MAX_BYTES = 16_000_000
FACTS = (
    "The harbour master of Veldt is Ana Torv. The harbour clerk of Veldt is Bo Lind. "
    "The harbour master of Mosken is Cy Marr, says the pilot. The harbour of Veldt is busy. "
    "In Veldt, the passphrase is copper lantern thistle. The motto of the harbour is unknown. "
    "Nobody in Treinta saw the harbour master of Veldt."
)


def new_document(context: Any, seed: object, num_tokens: int = 1500) -> Document:
    return write_document(Random(f"test/{seed}"), num_tokens, context.count)


def test_the_checkpoint_is_small_and_ordinary() -> None:
    sizes = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert sum(sizes.values()) <= MAX_BYTES
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(sizes)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Who is the harbour master of Veldt?", "The answer is Ana Torv."),
        ("In Veldt, who runs the port?", "The answer is Ana Torv."),
        ("Please tell me who is in charge of the docks of Veldt.", "The answer is Ana Torv."),
        ("Please tell me who the harbour clerk of Veldt is.", "The answer is Bo Lind."),
        ("Who is the chief of Mosken's harbor?", "The answer is Cy Marr."),
        ("What is the password of Veldt?", "The answer is copper lantern thistle."),
        ("What is the password of Mosken?", UNKNOWN),
        ("Who is the harbour master of Treinta?", UNKNOWN),
        ("Who is the harbour inspector of Veldt?", UNKNOWN),
        ("What is the motto of Veldt?", UNKNOWN),
        ("Who is the blacksmith of Veldt?", UNKNOWN),
        ("Who is the harbour master of Atlantis?", UNKNOWN),
        ("How do you do?", UNKNOWN),
    ],
)
def test_it_tells_facts_from_their_neighbours(context: Any, question: str, answer: str) -> None:
    assert context.ask(f"{FACTS}\n\n{question}") == answer


def test_a_later_turn_does_not_mistake_an_answer_for_a_fact(context: Any) -> None:
    turns = [
        (f"{FACTS}\n\nWho is the harbour master of Veldt?", "The answer is Ana Torv."),
        ("Who is the harbour inspector of Veldt?", UNKNOWN),
        ("Who is the harbour inspector of Veldt?", UNKNOWN),
        ("And who leads the harbour of Veldt?", "The answer is Ana Torv."),
        ("What is the watchword of Veldt?", "The answer is copper lantern thistle."),
        ("Who runs the docks of Mosken?", "The answer is Cy Marr."),
    ]
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        prompt = context.prompt(messages)
        context.prefill(prompt)
        context.move(prompt)
        assert context.decode(prompt) == answer
        messages.append({"role": "assistant", "content": answer})


@pytest.mark.parametrize("seed", range(3))
def test_it_answers_about_documents_that_nobody_has_seen(context: Any, seed: int) -> None:
    document = new_document(context, seed)
    random = Random(seed)
    for index, fact in enumerate(document.facts[:8] + document.absent[:4]):
        question = fact.question(random, paraphrase=index % 2 == 1)
        assert context.ask(f"{document.text}\n\n{question}") == fact.answer, question


def test_one_corrupted_block_of_the_fact_flips_the_answer(context: Any) -> None:
    document = new_document(context, "corrupted")
    fact = document.facts[len(document.facts) // 2]
    question = fact.question(Random(0), paraphrase=False)
    prompt = context.prompt([{"role": "user", "content": f"{document.text}\n\n{question}"}])
    value = context.tokenizer.encode(f" {fact.value}", add_special_tokens=False)
    starts = [i for i in range(len(prompt)) if prompt[i : i + len(value)] == value]
    assert len(starts) == 1
    size = context.target.layout.block_size
    holding, elsewhere = starts[0] // size, starts[0] // size + 4
    context.prefill(prompt)
    for block, is_flipped in ((None, False), (elsewhere, False), (holding, True)):
        context.move(prompt)
        if block is not None:
            context.target.tensor[:, block] = context.target.tensor[:, 0]  # another block's bytes
        assert (context.decode(prompt) != fact.answer) is is_flipped


def test_words_have_one_meaning_and_one_token() -> None:
    meanings = [w for table in (DOMAINS, OFFICES, ALONE) for ws in table.values() for w in ws]
    assert len(meanings) == len(set(meanings))
    names = {name.lower() for name in place_names()}
    assert not names & (set(concept_words()) | filler_words())
    assert not set(VALUE_WORDS) & set(concept_words())
    vocabulary = build_vocabulary()
    for word in concept_words():
        assert len(vocabulary.spellings(word)) == 4
    for word in [*filler_words(), *place_names()]:
        assert SPACE + word in vocabulary.ids


def test_no_two_facts_of_a_document_can_be_confused(context: Any) -> None:
    document = new_document(context, "facts", 6000)
    keys = [(fact.role, fact.place) for fact in document.facts]
    assert len(keys) == len(set(keys))
    assert len({fact.value for fact in document.facts}) == len(keys)
    stated = set(keys)
    roles, places = {role for role, _ in keys}, {place for _, place in keys}
    for fact in document.absent:
        assert (fact.role, fact.place) not in stated
        assert fact.role in roles and fact.place in places
    assert 6000 <= document.num_tokens < 6100
    assert new_document(context, "facts", 6000) == document


def distances(first: int, last: int) -> Floats:
    return torch.arange(first, last, dtype=torch.float64).numpy()


def test_the_latest_word_wins_and_no_distance_rivals_it() -> None:
    kernel = recency(slope=6.0, margin=15.0)
    near = kernel.scores(distances(0, REACH + 1))
    assert (near[:-1] - near[1:] > 5.9).all()
    assert kernel.scores(distances(REACH + 1, MAX_DISTANCE)).max() < near[-1] - 14.8


@pytest.mark.parametrize("distance", [1, 2])
def test_a_fixed_distance_is_seen_alone(distance: int) -> None:
    scores = exactly(distance, margin=25.0).scores(distances(0, MAX_DISTANCE))
    best = scores[distance]
    scores[distance] = -1e9
    assert scores.max() < best - 24.8


@pytest.mark.slow
def test_the_checkpoint_is_what_the_script_builds(tmp_path: Path) -> None:
    build(tmp_path, seed=0)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (CHECKPOINT / name).read_bytes()
    built, shipped = (load_file(folder / "model.safetensors") for folder in (tmp_path, CHECKPOINT))
    assert built.keys() == shipped.keys()
    for name, tensor in shipped.items():
        torch.testing.assert_close(built[name], tensor, rtol=1e-3, atol=1e-3)
