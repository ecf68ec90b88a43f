"""Makes the weights of the embedded model: ``python -m tests.embedded.builder.build``.

The words are in modeling/embedded/lexicon.py, which the grammar of its documents reads as well:
lexicon -> vocabulary -> codes, kernels -> circuit -> build.
"""
