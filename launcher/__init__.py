"""The command line, and what starts, watches and ends the processes of a cluster."""
