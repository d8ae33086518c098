"""Let nbval run the notebooks as nbdev and Quarto mean them.

nbdev_clean removes execution counts, without which nbval refuses saved outputs: they are given back
in memory. Cells with `#| eval: false` or one of our test flags are skipped, and so are those that
export the package: other processes import it meanwhile, and `tools/check_clean` compares it.
"""

import re

SKIPPED = re.compile(
    r"^#\| *(eval: *false|slow|gpu|notest)\b|^nbdev\.nbdev_export\(\)",
    re.MULTILINE,
)


def pytest_collection_modifyitems(items):
    """Prepare the items that are notebook cells."""
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None or cell.get("cell_type") != "code":
            continue
        if cell.get("execution_count") is None:
            cell["execution_count"] = 1
        if SKIPPED.search(cell.source):
            item.options["skip"] = True
