"""Processes that share the work on a text."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress


def start_process_pool(processes: int) -> ProcessPoolExecutor:
    """Processes that end with this one, even if it is killed.

    They are spawned: a fork of a process with threads may hang.
    """
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


def shutdown_process_pool(pool: ProcessPoolExecutor) -> None:
    """End them; what still waits is not done.

    If one has died before it read its work, a thread of CPython 3.11's waits for ever to write that into a pipe, and
    whoever ends the pool waits for the thread. Closing the pipe's other end frees it.
    """
    queue = getattr(pool, "_call_queue", None)
    if getattr(pool, "_broken", False) and queue is not None:
        with suppress(OSError):
            queue._reader.close()
    pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"  # of ``tokenizers``: each process is one of as many as there are cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the one that began them ends them
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, a process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
