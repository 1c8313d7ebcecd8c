"""Process pools whose workers exit with the main process, for cleaning, tokenization and sweeps."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress


def start_process_pool(processes: int) -> ProcessPoolExecutor:
    """Start a pool whose worker processes exit when the current process exits, even if it is killed.

    Workers are spawned, not forked: forking a process that has threads may cause a deadlock.
    """
    return ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=_initialize_worker
    )


def shutdown_process_pool(pool: ProcessPoolExecutor) -> None:
    """Stop the worker processes and discard queued work.

    If a worker died before it read its work item, the feeder thread of CPython 3.11 blocks forever while writing to the
    pipe, and ``shutdown`` waits for this thread. Closing the read end of the pipe unblocks the thread.
    """
    queue = getattr(pool, "_call_queue", None)
    if getattr(pool, "_broken", False) and queue is not None:
        with suppress(OSError):
            queue._reader.close()
    pool.shutdown(wait=True, cancel_futures=True)


def _initialize_worker() -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"  # threads of ``tokenizers``: there is already one process per core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes; the parent stops workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent process exits; otherwise, a worker whose parent was killed would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
