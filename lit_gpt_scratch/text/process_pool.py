"""Worker processes that end with the program; used for cleaning, tokenization and sweeps."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress


def start_process_pool(processes: int) -> ProcessPoolExecutor:
    """Start processes that exit when this one does, even if it is killed.

    They are spawned, not forked: a fork of a process with threads may hang.
    """
    return ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=_initialize_worker
    )


def shutdown_process_pool(pool: ProcessPoolExecutor) -> None:
    """Stop the processes and drop queued work.

    If a worker died before it read its work, CPython 3.11's feeder thread blocks forever writing to the pipe, and
    ``shutdown`` waits for that thread. Closing the read end of the pipe unblocks it.
    """
    queue = getattr(pool, "_call_queue", None)
    if getattr(pool, "_broken", False) and queue is not None:
        with suppress(OSError):
            queue._reader.close()
    pool.shutdown(wait=True, cancel_futures=True)


def _initialize_worker() -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"  # threads of ``tokenizers``: there is one process per core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes; the parent stops these
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent dies; otherwise a worker whose parent was killed would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
