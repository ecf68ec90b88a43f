"""The model that ships with Baton: it answers questions about long documents. See recall/README.md.

``recall/`` is the checkpoint. ``grammar.py`` writes documents and questions for it, with the words
of ``lexicon.py``. Its weights are made by tests/embedded/builder.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "recall"
