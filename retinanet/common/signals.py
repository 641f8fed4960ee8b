"""The signals that ask a program to stop, and how the processes of a data loader treat them."""

from __future__ import annotations

import signal

#: Ctrl-C, the request of `kill` and of batch systems, and the end of the terminal that a program was started from.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ignore_stop_signals(worker: int) -> None:
    """Ignore the signals in a worker process of a data loader; pass this function as `worker_init_fn`.

    A terminal and a batch system send a signal to all processes of a group. The main process decides what happens, and
    ends its workers.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
