"""Sends a schedule to a server and writes down what comes back, and when."""
