"""`cm3leon compare`: what changed between two evaluations."""

from pathlib import Path
from typing import Annotated

import typer


def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of an evaluation.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Folder of another one.")],
    pictures: Annotated[int, typer.Option(min=0, help="Prompts to show side by side.")] = 8,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("cm3leon-compare.png"),
):
    """
    Compare two evaluations.

    Prints every metric that both measured, the second's minus the first's, with intervals at 95 %, and whether that is
    better or worse; nothing stands there where the choice of prompts may explain the difference. Writes their pictures
    of the same prompts side by side.

    **Example**

    `cm3leon compare runs/evaluate-before runs/evaluate-after`
    """
    from .evaluation.comparison import are_paired, compare_runs, comparison_table, side_by_side
    from .grid import draw_grid

    print(comparison_table(compare_runs(first, second)))
    if not are_paired(first, second):
        print("the runs have different prompts: the intervals are wider than those of a paired comparison")
    shown, labels, columns = side_by_side(first, second, pictures)
    if shown:
        draw_grid(shown, labels, columns).save(out)
        print(out)
