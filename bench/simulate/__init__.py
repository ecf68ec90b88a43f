"""Clusters without processes, on virtual time, and what experiments on them have found."""
