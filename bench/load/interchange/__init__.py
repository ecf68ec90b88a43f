"""Runs in the formats of other harnesses, and theirs as runs of ours."""
