"""Every order of events of a small cluster, one after the other: explicit-state model checking."""
