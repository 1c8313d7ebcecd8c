"""``python -m lit_gpt_scratch.sweeps.child MODULE FLAGS``: a run that ends when the sweep does, even by a kill.

The sweep holds the other end of standard input; the system closes it whatever becomes of the sweep.
"""

import os
import runpy
import signal
import sys
import threading


def _end_with_parent() -> None:
    os.read(0, 1)  # no buffered reader: its lock would be held when Python shuts down
    os.killpg(0, signal.SIGKILL)  # other ranks and loaders, too


if __name__ == "__main__":
    module = sys.argv.pop(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
