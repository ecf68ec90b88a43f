"""How every process deals with its surroundings: logs, signals, limits, files, failpoints."""
