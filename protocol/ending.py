"""The signals by which a cluster's processes are asked to end.

SIGTERM and SIGINT come from outside. A terminal sends SIGINT to all processes of a cluster, and a
service manager may send SIGTERM to all of them, so they mean the cluster and not the process: the
launcher and the coordinator have it end in order, and a rank waits for what these say. The launcher
has signals of its own for its children, which nobody else sends.
"""

import signal

ASKED = (signal.SIGTERM, signal.SIGINT)  # from outside: the cluster is to end; twice, at once
DRAIN = signal.SIGUSR1  # to the coordinator: take nothing new, end when what runs has ended
END = signal.SIGUSR2  # end now, in order
