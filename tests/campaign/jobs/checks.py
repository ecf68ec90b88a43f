"""What must be so of the job engine's folder, after any life, and when everything has ended.

Each check returns what is wrong, in words, or nothing.
"""

import itertools
import json
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.jobs.documents.states import TABLE
from kvcache.prefix import block_salt, hash_blocks
from kvcache.tiers.pack import UNFINISHED, PackError
from modeling.checkpoint.config import load_config
from tests.campaign.jobs.asked import BLOCK_SIZE, LINE_TEXT, SALT, answer_of, linked_lines, text_of
from tests.campaign.jobs.packs import KnownPacks

WAYS = {(state.value, after.value) for (state, _), after in TABLE.items()}
KINDS = ("text", "tokens")  # of a document's files, when it is ready


@dataclass
class Ledger:
    """What was asked for, and what has been acknowledged of it."""

    asked: set[str] = field(default_factory=set)  # keys of documents
    documents: dict[str, str] = field(default_factory=dict)  # key -> id
    deleted: set[str] = field(default_factory=set)  # ids; their deletion was acknowledged
    doomed: set[str] = field(default_factory=set)  # ids; it was asked for
    dropped: set[str] = field(default_factory=set)  # their keys: not to be asked for again
    batches: dict[str, int] = field(default_factory=dict)  # id -> seed
    files: dict[str, str] = field(default_factory=dict)  # id -> text

    @property
    def num_acknowledged(self) -> int:
        return len(self.documents) + len(self.batches) + len(self.files)

    def take(self, said: Mapping[str, Any]) -> str:
        """Note an acknowledgement; what is wrong with it."""
        asked, made = said.get("asked", {}), said.get("made")
        if made is None:
            return ""
        if "document" in asked:
            known = self.documents.setdefault(asked["document"], made)
            return "" if known == made else f"document {asked['document']} was made twice"
        if "batch" in asked:
            self.batches[made] = asked["batch"]
        elif "file" in asked and not asked["expires"]:
            self.files[made] = asked["file"]
        elif "delete" in asked:
            self.deleted.add(made)
        return ""


@dataclass(frozen=True)
class Rows:
    """What the database says."""

    documents: dict[str, dict[str, Any]]
    deletions: set[str]
    batches: dict[str, dict[str, Any]]
    files: set[str]
    num_lines: int  # of batches, and results, that are kept
    integrity: str

    @property
    def output_ids(self) -> set[str]:
        names = ("output_file_id", "error_file_id")
        return {batch[name] for batch in self.batches.values() for name in names}


def read_rows(folder: Path) -> Rows:
    """The database as it is now; whoever works with it goes on."""
    with closing(sqlite3.connect(folder / "jobs.sqlite", timeout=30)) as connection:

        def bodies(query: str) -> dict[str, dict[str, Any]]:
            return {name: json.loads(body) for name, body in connection.execute(query)}

        def names(query: str) -> set[str]:
            return {name for (name,) in connection.execute(query)}

        connection.execute("BEGIN")
        return Rows(
            bodies("SELECT job_id, body FROM job WHERE kind = 'document'"),
            names("SELECT job_id FROM cleanup WHERE kind = 'document'"),
            bodies("SELECT job_id, body FROM job WHERE kind = 'batch'"),
            names("SELECT file_id FROM file"),
            sum(
                connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                for table in ("line", "result")
            ),
            connection.execute("PRAGMA integrity_check").fetchone()[0],
        )


def names_in(folder: Path) -> set[str]:
    """What lies in a folder."""
    return {path.name for path in folder.iterdir()}


# -- after each life -------------------------------------------------------------------------------


def kept(rows: Rows, ledger: Ledger) -> Iterator[str]:
    """Everything that was acknowledged is there."""
    if rows.integrity != "ok":
        yield f"the database is damaged: {rows.integrity}"
    for key, document_id in ledger.documents.items():
        if document_id not in rows.documents and document_id not in ledger.doomed:
            yield f"lost: document {key}"
    yield from (f"lost: batch {name}" for name in ledger.batches.keys() - rows.batches.keys())
    yield from (f"lost: file {name}" for name in ledger.files.keys() - rows.files)
    yield from (f"{name} is back" for name in ledger.deleted & rows.documents.keys())


def strays(folder: Path) -> Iterator[str]:
    """Files that nothing refers to, while a life that has recovered works in the folder."""
    found = {name: names_in(folder / name) for name in ("documents", "files", "batches")}
    rows = read_rows(folder)  # later than the names: what has come meanwhile is known
    known = {
        "documents": rows.documents.keys() | rows.deletions,
        "files": rows.files | rows.output_ids,
        "batches": rows.batches.keys(),
    }
    for name, files in found.items():
        strangers = {file for file in files if file.split(".")[0] not in known[name]}
        # What was removed meanwhile was known when it was found.
        yield from (f"stray: {name}/{file}" for file in strangers & names_in(folder / name))


# -- when everything has ended ---------------------------------------------------------------------


def ended(folder: Path, ledger: Ledger) -> Iterator[str]:
    """Everything that was acknowledged is done, once, and nothing else is there."""
    rows = read_rows(folder)
    yield from kept(rows, ledger)
    yield from _all_documents(folder, rows, ledger)
    by_name: dict[str, str] = {}
    for document_id, document in rows.documents.items():
        by_name[document.get("display_name", "")] = document_id
    for batch_id, batch in rows.batches.items():
        if (state := batch.get("state", "validating")) != "completed":
            yield f"stuck: batch {batch_id} is {state}"
            continue
        outputs = _outputs(batch)
        yield from _results(folder / "files", batch_id, batch, ledger, by_name)
        if not outputs <= rows.files:
            yield f"lost: results of {batch_id}"
    if rows.num_lines:
        yield f"{rows.num_lines} rows of lines are left"
    for file_id, text in ledger.files.items():
        if (folder / "files" / file_id).read_text() != text:
            yield f"lost: what file {file_id} held"
    files = {f"{name}.{kind}" for name in rows.documents for kind in KINDS}
    yield from _same("documents", names_in(folder / "documents"), files)
    yield from _same("files", names_in(folder / "files"), rows.files)
    yield from _same("batches", names_in(folder / "batches"), set())
    yield from _packs(folder / "kv", rows)


def _same(what: str, found: set[str], wanted: set[str]) -> Iterator[str]:
    yield from (f"stray: {what}/{name}" for name in sorted(found - wanted))
    yield from (f"lost: {what}/{name}" for name in sorted(wanted - found))


def _all_documents(folder: Path, rows: Rows, ledger: Ledger) -> Iterator[str]:
    with closing(sqlite3.connect(folder / "jobs.sqlite")) as connection:
        made: Counter[str] = Counter()
        query = "SELECT sequence, kind, data FROM event WHERE job_id = ?"
        for document_id, document in rows.documents.items():
            key = document.get("display_name", "")
            made[key] += 1
            if (state := document.get("state", "queued")) != "ready":
                yield f"stuck: document {key} is {state}"
            events = connection.execute(f"{query} ORDER BY sequence", (document_id,)).fetchall()
            yield from (f"document {key}: {wrong}" for wrong in events_of(events))
    yield from (f"document {key} was made twice" for key, count in made.items() if count > 1)
    own = {key for key in made if ":" not in key}  # the others are of lines
    yield from (f"document {key} was not asked for" for key in own - ledger.asked)


def events_of(events: Sequence[tuple[int, str, bytes]]) -> Iterator[str]:
    """What is wrong with the events of a document that is ready: (sequence, kind, data)."""
    if [number for number, _, _ in events] != list(range(1, len(events) + 1)):
        yield "its events are not numbered one by one"
    states = [json.loads(data)["status"] for _, kind, data in events if kind == "state"]
    if states[:1] != ["queued"] or states.count("ready") != 1:
        yield f"its states were {states}"
    yield from (f"{a} to {b}" for a, b in itertools.pairwise(states) if (a, b) not in WAYS)


def _outputs(batch: Mapping[str, Any]) -> set[str]:
    named = {"has_output": "output_file_id", "has_errors": "error_file_id"}
    return {batch[name] for flag, name in named.items() if batch.get(flag)}


def result_lines(
    folder: Path, batch: Mapping[str, Any], asked: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """What lies in a batch's files, by ``custom_id``, and what is wrong with it as a whole."""
    texts = [(folder / name).read_text() for name in _outputs(batch)]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    wrong = []
    counts = Counter(line["custom_id"] for line in lines)
    for line in asked:
        count = counts.pop(line["custom_id"], 0)
        if count != 1:
            wrong.append(f"{'lost' if not count else 'duplicated'}: line {line['custom_id']}")
    wrong += [f"line {name} was not asked for" for name in counts]
    found = {line["custom_id"]: line["response"] for line in lines}
    wrong += [f"lost: the answer to {name}" for name, response in found.items() if not response]
    statuses = Counter(line["response"]["status_code"] == 200 for line in lines if line["response"])
    counted = (batch.get("num_completed", 0), batch.get("num_failed", 0))
    if counted != (statuses[True], statuses[False]):
        wrong.append(f"{counted[0]} lines are counted of {statuses[True]}")
    return found, wrong


def _results(
    folder: Path, batch_id: str, batch: dict[str, Any], ledger: Ledger, by_name: dict[str, str]
) -> Iterator[str]:
    seed = ledger.batches.get(batch_id)
    if seed is None:  # it was made, and nobody was told: which it is is in its first line
        texts = [(folder / name).read_text() for name in _outputs(batch)]
        seed = int(json.loads(texts[0].splitlines()[0])["custom_id"].split("-")[0])
    asked = linked_lines(seed)
    found, wrong = result_lines(folder, batch, asked)
    yield from wrong
    documents = {
        line["custom_id"]: by_name.get(f"{batch_id}:{number}")
        for number, line in enumerate(asked, 1)
        if line["url"] == "/v1/documents"
    }
    for line in asked:
        response = found.get(line["custom_id"])
        if response is None:
            continue
        if line["custom_id"] in documents:
            is_right = response["body"].get("id") == documents[line["custom_id"]] is not None
        else:
            body = dict(line["body"])
            if "document_id" in body:
                body["document_id"] = documents[body["document_id"].removeprefix("custom:")]
            status, answer = answer_of(body)
            is_right = (response["status_code"], response["body"]) == (status, answer)
        if not is_right:
            yield f"wrong: line {line['custom_id']}"


def hashes_of(texts: Collection[str]) -> set[bytes]:
    """Of all full blocks of documents."""
    salt = block_salt(load_config("arithmetic").fingerprint, SALT)
    return {name for text in texts for name in hash_blocks(list(text.encode()), BLOCK_SIZE, salt)}


def _packs(folder: Path, rows: Rows) -> Iterator[str]:
    unfinished = sorted(path.name for path in folder.glob(f"*{UNFINISHED}"))
    yield from (f"stray: kv/{name}" for name in unfinished)
    packs = KnownPacks(folder, load_config("arithmetic").fingerprint, BLOCK_SIZE)
    stored: Counter[bytes] = Counter()
    num_files = len(names_in(folder))
    for name, header in packs.scan():
        stored.update(header.hashes)
        num_files -= 1
        try:
            is_right = packs.is_right(name, header)
        except PackError as error:
            yield f"damaged: {error}"
            continue
        if not is_right:
            yield f"damaged: kv/{name} holds other blocks than it says"
    if num_files:
        yield f"{num_files} packs cannot be read"
    keys = (document.get("display_name", "") for document in rows.documents.values())
    wanted = hashes_of({LINE_TEXT if ":" in key else text_of(key) for key in keys})
    if missing := len(wanted - stored.keys()):
        yield f"lost: {missing} blocks of documents"
    if extra := len(stored.keys() - wanted):
        yield f"stray: {extra} blocks of no document"
    if twice := sum(count > 1 for count in stored.values()):
        yield f"duplicated: {twice} blocks"
