"""`python -m flowcourse` is the command `flowcourse`."""

import sys

from flowcourse.cli import main

if __name__ == "__main__":
    sys.exit(main())
