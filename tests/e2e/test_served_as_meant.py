"""A folder that transformers wrote is served as its files say: dtype, stops, sampling, names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from baton_client import BatonAPIError, Completion
from tests.e2e.cluster import Cluster, run_cluster
from tests.modeling.checkpoints import write_checkpoint

PROMPT = [11, 42, 99, 7, 250, 33]
SAMPLING = {"temperature": 0.8, "top_k": 1, "repetition_penalty": 1.3}  # likeliest of the penalised
NAMES = ("tune", "tune:latest")


def _change(path: Path, **fields: Any) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **fields}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune")
    write_checkpoint(
        path, family="llama", hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, vocab=320,
        dtype="float16", seed=5,
    )  # fmt: skip
    _change(path / "generation_config.json", **SAMPLING, typical_p=0.9)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[int]:
    """What transformers generates in float16 by the folder's own defaults, were there no stops."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
    made = model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=12, eos_token_id=None,
        repetition_penalty=SAMPLING["repetition_penalty"], pad_token_id=0,
    )  # fmt: skip
    token_ids: list[int] = made[0, len(PROMPT) :].tolist()
    return token_ids


@pytest.fixture(scope="module")
def stop_text(folder: Path, reference: list[int]) -> str:
    """The fourth token of the answer, which the tokenizer, and nobody else, names the end."""
    from tokenizers import Tokenizer

    assert reference[3] not in reference[:3]
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(reference[3])
    assert text is not None
    _change(folder / "tokenizer_config.json", eos_token=text)
    return text


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("said") / "stderr"


@pytest.fixture(scope="module")
def cluster(folder: Path, stop_text: str, said: Path) -> Iterator[Cluster]:
    del stop_text
    flags = ("--decode", "tp1", "--dtype", "float16", "--kv-memory", "16MiB")
    with run_cluster(str(folder), *flags, "--served-model-name", *NAMES, log=said) as running:
        yield running


def ask(cluster: Cluster, **fields: Any) -> Completion:
    return cluster.client.complete(PROMPT, max_tokens=12, return_token_ids=True, **fields)


@pytest.mark.cluster
def test_a_request_that_names_none_is_sampled_by_the_folders_defaults(
    cluster: Cluster, reference: list[int]
) -> None:
    for seed in (1, 2):
        assert ask(cluster, ignore_eos=True, seed=seed).token_ids == reference
    own = {**SAMPLING, "repetition_penalty": 1.0}
    assert ask(cluster, ignore_eos=True, **own).token_ids != reference


@pytest.mark.cluster
def test_the_tokenizers_end_of_sequence_ends_an_answer(
    cluster: Cluster, reference: list[int]
) -> None:
    answer = ask(cluster)
    assert (answer.finish_reason, answer.token_ids) == ("stop", reference[:4])


@pytest.mark.cluster
def test_every_name_is_served_and_no_other(cluster: Cluster, folder: Path) -> None:
    listed = cluster.http.get("/v1/models").json()["data"]
    assert {model["id"] for model in listed} == set(NAMES)
    for name in NAMES:
        assert ask(cluster, model=name).finish_reason == "stop"
    with pytest.raises(BatonAPIError) as caught:
        ask(cluster, model=folder.name)
    assert caught.value.status == 404


@pytest.mark.cluster
def test_the_start_says_what_is_served(
    cluster: Cluster, folder: Path, said: Path, stop_text: str, reference: list[int]
) -> None:
    lines = [line.strip() for line in said.read_text().splitlines()]
    start = lines.index("serving")
    found = {}
    for line in lines[start + 1 : start + 13]:
        name, colon, text = line.partition(":")
        if colon and name in ("model", "dtype", "stop tokens", "sampling", "output head"):
            found[name] = text.strip()
    assert found["model"] == f"{folder} (llama), named {', '.join(NAMES)}"
    assert found["dtype"] == "float16"
    assert f"{stop_text} {reference[3]} (tokenizer)" in found["stop tokens"]
    assert found["sampling"] == (
        "temperature 0.8, top_k 1, repetition_penalty 1.3 (generation_config.json); "
        "without effect: typical_p"
    )
    assert found["output head"] == "stored"
    serving = cluster.state()["serving"]
    assert (serving["dtype"], serving["names"]) == ("float16", list(NAMES))
    assert serving["checkpoint"]["sampling"] == SAMPLING
