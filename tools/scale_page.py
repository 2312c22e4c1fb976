"""Write what `bench --scale` has found into the documents: the table of `scale.md`, and the curves.

    python tools/scale_page.py [FILE]      scale.md, or the curves where FILE is an SVG

The figures are those of `docs/explanation/scale.json`, which `make scale` measures anew. A test fails when page or
curves are not what this writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vfiouser_oob.lab.bench.curves import scale_svg
from vfiouser_oob.lab.bench.scale_figures import ScaleFigures, by_spread, scale_table

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "explanation"
PAGE, CURVES, FOUND = FOLDER / "scale.md", FOLDER / "scale.svg", FOLDER / "scale.json"
BEGIN, END = "<!-- figures: written by `make pages` from scale.json -->", "<!-- end of figures -->"
#: Functions of the host that is computed.
MANY = 1000


def table(document: Any) -> str:
    """The figures, and what they say of a host with many functions."""
    figures = [ScaleFigures.from_json(each) for each in document["scale"]]
    sizes = [each.functions for each in next(iter(by_spread(figures).values()))]
    heads = ["functions", *(f"{size:,}" for size in sizes), f"{MANY:,} (computed)"]
    machine = document["machine"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in scale_table(figures, MANY)]
    lines += ["", f"Measured with {machine['cpus']} processors and Python {machine['python']}."]
    if "remark" in document:  # of whoever committed figures that are not `make scale`'s of an idle machine
        lines += ["", f"**{document['remark']}**"]
    return "\n".join(lines)


def main() -> None:
    """Write the one that is asked for, or both."""
    document = json.loads(FOUND.read_text(encoding="utf-8"))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page = f"{before}{BEGIN}\n\n{table(document)}\n\n{END}{after}"
    curves = scale_svg([ScaleFigures.from_json(each) for each in document["scale"]])
    for target in map(Path, sys.argv[1:] or (PAGE, CURVES)):
        target.write_text(curves if target.suffix == ".svg" else page, encoding="utf-8")


if __name__ == "__main__":
    main()
