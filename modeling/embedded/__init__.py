"""The model that ships with Baton: it answers questions about long documents. See recall/README.md.

lexicon -> vocabulary -> codes, kernels -> circuit -> build; grammar writes documents about it.
"""

from pathlib import Path

NAME = "recall"
CHECKPOINT = Path(__file__).parent / NAME
