"""Each module has ``run``: a question about a production policy, its null case, its figures."""
