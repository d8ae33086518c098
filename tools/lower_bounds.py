#!/usr/bin/env python3
"""Print the lower end of each range in settings.ini as a constraint for pip, but for the packages named."""

import re
import sys
from configparser import ConfigParser
from pathlib import Path


def lower_bounds(left_out=()):
    """Constraints such as `numpy==1.26`, one for each package whose range has a lower end."""
    config = ConfigParser(delimiters=["="])
    config.read(Path(__file__).resolve().parents[1] / "settings.ini")
    ranges = " ".join(
        value
        for key, value in config["DEFAULT"].items()
        if key.endswith("requirements")
    )
    ends = dict(re.findall(r"([\w-]+)>=([\d.]+)", ranges))
    return [
        f"{name}=={end}"
        for name, end in sorted(ends.items())
        if name not in left_out
    ]


if __name__ == "__main__":
    print(*lower_bounds(sys.argv[1:]), sep="\n")
