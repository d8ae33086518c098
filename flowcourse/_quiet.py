"""Ctrl-C while the command imports what it needs, which takes seconds: one line.

`flowcourse/__init__.py` imports this module first; `flowcourse/__main__.py` ends what it does. It does
nothing in any other program that imports flowcourse.
"""

import os
import signal
import sys


def _is_command():
    """Whether this process is `flowcourse` or `python -m flowcourse`."""
    words = sys.orig_argv
    if sys.argv[:1] == ["-m"] and "-m" in words[:-1]:
        return words[words.index("-m") + 1] == "flowcourse"
    return os.path.basename(sys.argv[0] if sys.argv else "") == "flowcourse"


def _stop(number, frame):
    """Leave at once: an exception in the middle of an import may become another one."""
    os.write(2, b"flowcourse: stopped by Ctrl-C\n")
    os._exit(128 + number)


# the shell has it ignored where the command runs in the background
if _is_command() and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _stop)
