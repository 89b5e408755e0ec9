"""Measures decoding against stock transformers and against the time it takes to read the weights once.

    python recipes/benchmark/decode.py --out runs/benchmark

Every row of the table is a process of its own, so that its peak memory is its own; all have the same shape, random
weights and the same number of tokens; the floor is that of the moments before and behind the row. The last line is
JSON. Run it on an otherwise idle machine.
"""

import json
import multiprocessing
from dataclasses import asdict
from pathlib import Path

from decode_measure import bytes_per_step, measure, read_bandwidth
from decode_models import our_config
from decode_report import figures, plot, table
from decode_rows import ROWS, DecodeArguments
from decode_shipped import shipped_model_figures
from tqdm import tqdm
from trl import TrlParser


def main(args: DecodeArguments) -> None:
    rows = [row for row in ROWS if args.only in row.name]
    if not rows:
        raise ValueError(f"expected --only to be part of a row's name, got {args.only!r}; {ROWS[0].name} is one")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results, failed = {}, {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:

        def floor() -> float:
            return 1e3 * bytes_per_step(our_config(args)) / pool.apply(read_bandwidth)

        for row in tqdm(rows, desc="rows"):
            before = floor()
            try:
                result = pool.apply(measure, (row, args))
            except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:  # a format this device lacks
                failed[row.name] = str(error).splitlines()[0]
                tqdm.write(f"{row.name}: {failed[row.name]}")
                continue
            results[row.name] = result | {"floor_ms": min(before, floor())}  # others may use the same memory
    print(table(results))
    if results:
        plot(results, out / "decode.png")
    summary = figures(results) | (shipped_model_figures() if not args.only else {})
    record = {"arguments": asdict(args), "rows": results, "failed": failed, "figures": summary}
    (out / "decode.json").write_text(json.dumps(record, indent=2))
    print(json.dumps(summary))


if __name__ == "__main__":
    main(*TrlParser(DecodeArguments).parse_args_and_config())
