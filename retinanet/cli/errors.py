"""Exit codes of the command line, and the report of errors that a user can cause.

Exit codes: 0 success; 1 a failed demonstration; 2 wrong usage; 3 wrong data or checkpoint; 4 the training diverged;
130 interrupted by Ctrl-C; 143 terminated (SIGTERM); 129 the terminal was closed (SIGHUP). An error that a user can
cause is printed on standard error, one line for each problem and without a traceback. Any other exception is a defect
of the program and keeps its traceback.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retinanet.common.errors import RetinaNetError, UsageError, one_line
from retinanet.common.launch import launched_processes, launched_rank
from retinanet.common.memory import is_out_of_memory

#: What the signals that stop a command are called. The exit code is 128 plus the signal's number, as in shells.
_STOPS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "terminal closed"}

_SECONDS_FOR_THE_MAIN_PROCESS = 3.0
#: Errors of writing to an open file, which the operating system does not name: it may be standard output.
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def report_errors(work: Callable[[], int]) -> int:
    """Call `work` and return the exit code. Print an error that a user can cause, one line for each problem."""
    received: list[int] = []
    previous = _stop_like_ctrl_c(received)
    try:
        return work()
    except RetinaNetError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as stop:
        number = signal.Signals(received[0]) if received else signal.SIGINT
        return _fail(f"{_STOPS[number]}: {stop}".removesuffix(": "), 128 + number)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("retinanet", "retinanet_ops"):
            raise
        return _fail(
            f"the Python module {error.name} is not installed: run pip install 'retinanet-ops[model]'",
            UsageError.exit_code,
        )
    except BrokenPipeError:
        # The process that reads our output has ended, as in `| head`. Without the redirection, Python would report the
        # broken pipe again when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None and error.errno not in _WRITE_ERRORS:
            raise
        return _fail(f"{error.filename or 'output'}: {error.strerror}", UsageError.exit_code)
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith("DataLoader worker"):
            return _fail(
                f"a process that loads images has died ({one_line(error)}); choose fewer --workers, or smaller images "
                "if memory has run out",
                UsageError.exit_code,
            )
        if not is_out_of_memory(error):
            raise
        return _fail("out of memory: choose smaller images, a smaller batch, --crop or --tile", UsageError.exit_code)
    finally:
        for stop_signal, handler in previous.items():
            signal.signal(stop_signal, handler)


def _fail(message: str, code: int) -> int:
    message = worker_message(message)
    rank = launched_rank()
    if rank:
        # An error of the main process is usually an error of all. The launcher then ends this process while it waits.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_SECONDS_FOR_THE_MAIN_PROCESS)
    for line in message.splitlines():
        print(f"retinanet: error: {f'process {rank}: ' if rank else ''}{line}", file=sys.stderr)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun and accelerate launch repeat this reason in their summary.
        Path(report).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    if launched_processes() > 1:
        # The end of the interpreter would wait for connections to processes that have ended.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def worker_message(message: str) -> str:
    """Return an error's message without the traceback that a data loader's worker process adds to it."""
    if "Original Traceback" not in message:
        return message
    last = message.rstrip().splitlines()[-1]
    return last.partition(": ")[2] or last


def _stop_like_ctrl_c(received: list[int]) -> dict[int, Any]:
    """Make SIGTERM and SIGHUP append their number to `received` and raise KeyboardInterrupt.

    Returns:
        The previous handlers, by signal.
    """

    def stop(number: int, _frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    previous: dict[int, Any] = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        # `nohup` ignores SIGHUP, so that a program outlives its terminal.
        if signal.getsignal(number) != signal.SIG_IGN:
            try:
                previous[number] = signal.signal(number, stop)
            except ValueError:  # Outside the main thread, where Python allows no signal handlers.
                break
    return previous
