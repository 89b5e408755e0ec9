"""Measures decoding against stock transformers and against the time it takes to read the weights once.

    python recipes/benchmark/decode.py --out runs/benchmark

Every row of the table is a process of its own, so that its peak memory is its own; all have the same shape, random
weights and the same number of tokens. Other programs and other machines' guests slow memory down for minutes, so rows
take turns, several to a group, with a measurement of the floor between any two, and the middle turn counts. The first
group holds the rows that the figures compare. The last line is JSON. Run it on an otherwise idle machine.
"""

import json
import multiprocessing
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median

from decode_measure import bytes_per_step, draw, peak_bytes, prepare, read_bandwidth
from decode_models import our_config
from decode_report import figures, plot, table
from decode_rows import ROWS, DecodeArguments, Row
from decode_shipped import shipped_model_figures
from tqdm import tqdm
from trl import TrlParser

LACKING = (ImportError, RuntimeError, ValueError, NotImplementedError)  # raised for a format that this device lacks


def measure_in_turns(rows: list[Row], args: DecodeArguments, failed: dict[str, str], progress: tqdm) -> dict[str, dict]:
    """Milliseconds a step, tokens a second, peak memory and floor of each row; those that fail are told in `failed`."""
    processes = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        floor, *workers = (stack.enter_context(processes.Pool(1)) for _ in range(1 + len(rows)))
        measured = {}
        for row, worker in zip(rows, workers):
            progress.set_postfix_str(row.name)
            try:
                measured[row] = worker, [worker.apply(prepare, (row, args))], []
            except LACKING as error:
                failed[row.name] = str(error).splitlines()[0]
                tqdm.write(f"{row.name}: {failed[row.name]}")
            progress.update()
        before = floor.apply(read_bandwidth)
        for turn in range(args.repeats):
            progress.set_postfix_str(f"turn {turn + 1} of {args.repeats}")
            for row, (worker, seconds, bandwidths) in measured.items():
                seconds.append(worker.apply(draw, (row,)))
                behind = floor.apply(read_bandwidth)
                bandwidths.append(max(before, behind))
                before = behind
        results = {}
        for row, (worker, (first, *seconds), bandwidths) in measured.items():
            results[row.name] = {
                "ms_per_step": 1e3 * median(seconds) / args.grid**2,
                "floor_ms": 1e3 * bytes_per_step(our_config(args)) / median(bandwidths),
                "tokens_per_second": row.batch * args.grid**2 / median(seconds),
                "first_run_seconds": first,
                "peak_gb": worker.apply(peak_bytes) / 1e9,
            }
        return results


def main(args: DecodeArguments) -> None:
    rows = [row for row in ROWS if args.only in row.name]
    if not rows:
        raise ValueError(f"expected --only to be part of a row's name, got {args.only!r}; {ROWS[0].name} is one")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results, failed = {}, {}
    with tqdm(total=len(rows), desc="rows") as progress:
        for start in range(0, len(rows), args.together):
            results |= measure_in_turns(rows[start : start + args.together], args, failed, progress)
    print(table(results))
    if results:
        plot(results, out / "decode.png")
    summary = figures(results) | (shipped_model_figures() if not args.only else {})
    record = {"arguments": asdict(args), "rows": results, "failed": failed, "figures": summary}
    (out / "decode.json").write_text(json.dumps(record, indent=2))
    print(json.dumps(summary))


if __name__ == "__main__":
    main(*TrlParser(DecodeArguments).parse_args_and_config())
