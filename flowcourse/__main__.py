"""The command `flowcourse`; `python -m flowcourse` is the same."""

import os
import signal
import sys


def run() -> int:
    """Run the command that was typed; whatever stops it is told in a line."""
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"  # tyro sends no codes to such a terminal
    from flowcourse.cli import main

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main()
        if sys.stdout is not None:  # as `>&-` leaves it
            sys.stdout.flush()
    except BrokenPipeError:
        # whoever read has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    finally:
        # everything is written: Ctrl-C has nothing to stop any more
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return status


if __name__ == "__main__":
    sys.exit(run())
