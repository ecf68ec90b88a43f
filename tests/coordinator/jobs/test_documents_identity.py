"""What made a document is recorded with it, and compared: after a start, and at every question."""

import json
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.tokenizer_file import write_tokenizer
from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.jobs.documents import identity
from coordinator.jobs.documents.document import Document
from coordinator.jobs.questions.canonical import DATE, TURNS, encode_document, show
from coordinator.text.tasks import Call, ReadTokenize, Refused, Settings
from coordinator.text.tokenizing import TextIdentity, TextTools
from coordinator.text.worker import TextWorker
from modeling.checkpoint.config import load_config
from modeling.text.chat_template import ChatTemplate
from modeling.text.tokenizer import ByteTokenizer, load_tokenizer
from tests.coordinator.jobs.world import FINGERPRINT, FakeIngestor, Site, start_site

TEXT = "Baton hands the KV cache over. " * 30
NOW = datetime(2026, 11, 30, 12)
FIRST = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
OTHER = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
# As Mistral's: the system's text stands in the last turn of the user.
LAST_TURN = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content ~ '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST]{% if loop.last %}{{ s }}{% endif %}"
    "{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
DATED = "Today is {{ strftime_now('%d %B %Y') }}.\n" + FIRST
AT_ONCE = "Now is {{ strftime_now('%H:%M:%S.%f') }}.\n" + FIRST
LAST_SHORTENED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content | upper }}"
    "{% endfor %}"
)


def tools_of(source: str) -> TextTools:
    tokenizer = ByteTokenizer(512)
    return TextTools(tokenizer, ChatTemplate(source, "test", tokenizer.special_tokens))


def prompt_of(answer: dict[str, Any]) -> str:
    return bytes(answer["choices"][0]["prompt_token_ids"]).decode()


def warnings_of(site: Site, document_id: str) -> list[str]:
    events = site.events(document_id)
    return [event["message"] for event in events if event.get("code") == "varying_prefix"]


class Sites:
    """Sites with the same folder, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.template = folder / "template.jinja"
        self.template.write_text(FIRST)
        self._folder = folder
        self._data = folder / "data"
        self._data.mkdir()

    def start(self, *, block_size: int = 16, store: str = "data", **fields: Any) -> Any:
        """One whose simulated store keeps what it has in the folder ``store``."""
        kept = self._folder / store
        kept.mkdir(exist_ok=True)
        ingestor = FakeIngestor(block_size, FINGERPRINT, folder=kept, chunk_tokens=64)
        return start_site(
            self._folder,
            ingestor=ingestor,
            data_dir=str(self._data),
            secret="the same",
            chat_template=str(self.template),
            block_size=block_size,
            **fields,
        )


@pytest.fixture
def sites(tmp_path: Path) -> Sites:
    return Sites(tmp_path)


def test_an_edited_template(sites: Sites) -> None:
    with sites.start() as site:
        chat, kept = site.ingest(text=TEXT)["id"], site.ingest(text=f"Kept. {TEXT}")["id"]
        plain = site.post(source={"text": TEXT}, form="text").json()["id"]
        for document_id in (chat, kept, plain):
            assert site.wait(document_id)["mismatch"] is None
    sites.template.write_text(OTHER)
    with sites.start() as site:
        found = site.get(chat)
        assert (found["status"], found["mismatch"]["reason"]) == ("mismatched", "template_changed")
        answer = site.ask(chat, "What?", return_token_ids=True)
        assert prompt_of(answer) == f"[user]{TEXT}\n\nWhat?[assistant]"
        assert answer["cache_miss"]["reason"] == "template_changed"
        assert site.get(plain)["status"] == "ready", "no template has shown it"
        assert site.post(f"/{chat}/rewarm").status_code == 202
        assert site.wait(chat)["mismatch"] is None
        assert "cache_miss" not in site.ask(chat, "Who?")
    sites.template.write_text(FIRST)
    with sites.start() as site:
        assert site.get(kept)["status"] == "ready", "it was never touched"
        assert site.get(chat)["mismatch"]["reason"] == "template_changed"


def test_a_system_text_that_moves_to_the_last_turn(sites: Sites) -> None:
    sites.template.write_text(LAST_TURN)
    system = {"role": "system", "content": "Be brief."}
    with sites.start() as site:
        made = site.ingest(messages=[system, {"role": "user", "content": TEXT}])["id"]
        site.wait(made)
        assert [TURNS in message for message in warnings_of(site, made)] == [True]
        part = {"type": "document", "document_id": made}
        first = {"role": "user", "content": [part, {"type": "text", "text": "Who?"}]}
        answered = [{"role": "assistant", "content": "It."}, {"role": "user", "content": "Why?"}]

        def ask(*messages: Any) -> dict[str, Any]:
            body = {"messages": messages, "max_tokens": 2, "return_token_ids": True}
            reply = site.client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            answer: dict[str, Any] = reply.json()
            return answer

        alone = ask(system, first)
        assert prompt_of(alone) == f"[INST]Be brief.\n\n{TEXT}\n\nWho?[/INST]"
        assert "cache_miss" not in alone
        second = ask(system, first, *answered)
        shown = f"[INST]{TEXT}\n\nWho?[/INST]It.</s>[INST]Be brief.\n\nWhy?[/INST]"
        assert prompt_of(second) == shown
        assert second["cache_miss"]["reason"] == "prefix_changed"


def test_a_template_that_tells_the_time(sites: Sites) -> None:
    sites.template.write_text(AT_ONCE)
    with sites.start() as site:
        made = site.ingest(text=TEXT)["id"]
        site.wait(made)
        assert [DATE in message for message in warnings_of(site, made)] == [True]
        first, second = (site.ask(made, "Who?", return_token_ids=True) for _ in range(2))
        assert first["cache_miss"]["reason"] == "prefix_changed"
        assert prompt_of(first).split(".\n")[1:] == prompt_of(second).split(".\n")[1:]
        assert prompt_of(first) != prompt_of(second)


@pytest.mark.parametrize(
    ("source", "varies_with"),
    [(FIRST, ()), (LAST_TURN, ()), (DATED, (DATE,)), (LAST_SHORTENED, (TURNS,))],
)
def test_what_a_head_varies_with(source: str, varies_with: tuple[str, ...]) -> None:
    tools, question = tools_of(source), {"role": "user", "content": "Who?"}
    made = encode_document(tools, TEXT, "chat", (), NOW)
    assert made.varies_with == varies_with
    assert show(tools, TEXT, [question], NOW).digest == made.shown
    tomorrow = show(tools, TEXT, [question], NOW + timedelta(days=1))
    assert (tomorrow.digest != made.shown) == (DATE in varies_with)


def test_another_dtype_and_back(sites: Sites) -> None:
    with sites.start(kv_dtype="float32") as site:
        text, ids = site.ingest(text=TEXT)["id"], site.ingest(token_ids=[5] * 200)["id"]
        site.wait(text)
        site.wait(ids)
    with sites.start(kv_dtype="bfloat16", store="other") as site:
        found = site.get(text)
        assert (found["status"], found["mismatch"]["reason"]) == ("mismatched", "dtype_changed")
        assert "float32, not bfloat16" in found["mismatch"]["message"]
        assert site.ask(text, "What?")["cache_miss"]["reason"] == "dtype_changed"
        body = {"prompt": [1], "document_id": ids, "max_tokens": 1, "return_token_ids": True}
        answer = site.client.post("/v1/completions", json={**body, "max_tokens": 1}).json()
        assert answer["choices"][0]["prompt_token_ids"] == [5] * 200 + [1], "ids are what they were"
        site.post(f"/{text}/rewarm")
        assert site.wait(text)["mismatch"] is None
    with sites.start(kv_dtype="float32") as site:
        site.until(lambda: site.get(text)["status"] == "ready", "its packs are still there")
        for document_id in (text, ids):
            assert [place["fraction"] for place in site.get(document_id)["residency"]] == [1.0]
        assert site.get(ids)["status"] == "ready"


def test_another_block_size_and_back(sites: Sites) -> None:
    with sites.start() as site:
        text, ids = (
            site.ingest(text=TEXT + "0123456789")["id"],
            site.ingest(token_ids=[5] * 200)["id"],
        )
        assert site.wait(text)["tokens"]["total"] % 32 >= 16, "else both promise the same"
        site.wait(ids)
    with sites.start(block_size=32, store="other") as site:
        found = site.get(text)
        assert found["mismatch"]["reason"] == "block_size_changed"
        assert "blocks of 16 tokens, not 32" in found["mismatch"]["message"]
        miss = site.ask(text, "What?")["cache_miss"]
        promised = found["tokens"]["total"] // 32 * 32
        assert miss == {"reason": "block_size_changed", "missed_tokens": promised}
        assert site.get(ids)["mismatch"]["reason"] == "block_size_changed"
        assert site.post(f"/{ids}/rewarm").status_code == 202
        assert site.wait(ids)["mismatch"] is None
    with sites.start() as site:
        found = site.get(text)
        assert (found["status"], found["residency"][0]["fraction"]) == ("ready", 1.0)
        assert site.get(ids)["mismatch"]["reason"] == "block_size_changed"


FACTS = identity.ModelFacts("m", "f", 16, "bfloat16", TextIdentity("t", "c"))
MADE = Document(
    id="doc_1",
    tenant="tenant",
    cache_salt="salt",
    created_at=0.0,
    kind="text",
    fingerprint="f",
    num_tokens=100,
    block_size=16,
    kv_dtype="bfloat16",
    tokenizer="t",
    template="c",
)
OF_IDS = {"kind": "token_ids", "tokenizer": "", "template": ""}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"fingerprint": "g"}, "model_changed"),
        ({"tokenizer": ""}, "version_changed"),
        ({"tokenizer": "u"}, "tokenizer_changed"),
        ({"template": "d"}, "template_changed"),
        ({"template": "", "form": "text"}, None),
        ({"tokenizer": "u", "form": "text"}, "tokenizer_changed"),
        ({"block_size": 32}, "block_size_changed"),
        ({"kv_dtype": "float32"}, "dtype_changed"),
        (OF_IDS, None),
        ({**OF_IDS, "fingerprint": "g"}, "model_changed"),
    ],
)
def test_mismatches(changes: dict[str, Any], reason: str | None) -> None:
    document = msgspec.structs.replace(MADE, **changes)
    assert identity.mismatch(document, FACTS) == reason
    if reason is not None:
        assert "not usable as configured" in identity.explain(document, reason, FACTS)


def test_every_file_of_a_tokenizer_counts(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 512)
    first = load_tokenizer(str(tmp_path)).digest
    assert load_tokenizer(str(tmp_path)).digest == first
    config = tmp_path / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    for more in ({"extra_special_tokens": ["<extra>"]}, {"cls_token": "<cls>"}):
        config.write_text(json.dumps({**fields, **more}))
        assert load_tokenizer(str(tmp_path)).digest != first
    config.write_text(json.dumps(fields))
    file = tmp_path / "tokenizer.json"
    parts = json.loads(file.read_text())
    parts["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(parts))
    assert load_tokenizer(str(tmp_path)).digest != first


def test_a_worker_that_finds_other_files_refuses(tmp_path: Path) -> None:
    """It is started with its first task, long after the others: it may find an edited template."""
    template = tmp_path / "template.jinja"
    template.write_text(FIRST)
    config = CoordinatorConfig(
        "token",
        "arithmetic",
        (ExpectedPool("decode0", "decode", 1, 1),),
        chat_template=str(template),
    )
    identity_then = tools_of(FIRST).identity
    settings = Settings(config, load_config("arithmetic"), os.getpid(), identity_then)
    call = Call(ReadTokenize(64), memoryview(b'{"prompt": "abc"}'))

    def made() -> TextWorker:
        return TextWorker(settings, lambda _stage, _size: None)

    assert not isinstance(made().do(call, None), Refused)
    template.write_text(OTHER)
    refused = made().do(call, None)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.status, refused.is_worn) == ("model_files_changed", 503, True)
