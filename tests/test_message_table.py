"""The table of messages in the documents: as the source has it."""

from pathlib import Path

import pytest

from tests.message_table import MODULES, ends, messages, rewritten, table

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/architecture.md"


def test_the_document_shows_every_message_with_its_ends() -> None:
    text = DOCUMENT.read_text()
    wanted = "run: python -m tests.message_table --write docs/architecture.md"
    assert rewritten(text) == text, wanted
    for name in MODULES:
        assert table(name) in text, name


@pytest.mark.parametrize("module", sorted(MODULES.values()))
def test_every_message_is_built_and_taken_somewhere(module: str) -> None:
    senders, receivers = ends()
    for message in messages(module):
        assert senders.get(message), f"nobody builds {message}"
        assert receivers.get(message), f"nobody takes {message}"
