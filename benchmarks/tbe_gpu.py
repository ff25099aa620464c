"""Bandwidth of the fused embedding kernel on one GPU, as a share of a copy's, by dim and skew.

.venv/bin/python benchmarks/tbe_gpu.py [--quick] [--json FILE]

Bytes of a step: every looked-up row read once and every vector written (forward); every vector's
gradient read, every distinct row and its accumulator read and written (backward). Skewed ids look
the same rows up again and again, and caches serve most of that, so a second figure counts each
distinct row of the forward once: what memory itself has to move.

The cost model's error is that of constants fitted in the same run to other cases: other dims, table
sizes, list lengths, batch sizes and skews than those shown. Needs a CUDA device and the
`fbgemm-gpu` wheel (`make ACCEL=gpu demo` installs it); without them it says so, exit code 2.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from environment import describe, require_gpu

from embedding.limits import ELEMENT_BYTES
from embedding.planning.lookup_timing import (
    LookupCase,
    LookupConstants,
    LookupTimes,
    calibration_cases,
    fit_lookups,
    time_lookup,
)
from embedding.planning.part_timing import copied_bytes_per_s

DIMS = (32, 64, 128, 256)
EXPONENTS = (0.0, 0.8, 1.2)
ROWS, BATCH, POOLING = 10_000_000, 65_536, 10


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two dims, fewer cases to calibrate")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    require_gpu()
    device = torch.device("cuda")
    copied = copied_bytes_per_s(device)
    fitted_to = calibration_cases(device)[:: 3 if args.quick else 1]
    fitted_times = [time_lookup(case, device) for case in fitted_to]
    constants = fit_lookups(fitted_to, fitted_times)
    shown = [
        LookupCase(ROWS, dim, POOLING, exponent, batch_size=BATCH)
        for dim in (DIMS[:2] if args.quick else DIMS)
        for exponent in EXPONENTS
    ]
    times = [time_lookup(case, device) for case in shown]
    rows = [_row(case, found, copied, constants) for case, found in zip(shown, times, strict=True)]
    residuals = [
        _row(case, found, copied, constants)
        for case, found in zip(fitted_to, fitted_times, strict=True)
    ]
    _print(rows, residuals, copied)
    if args.json:
        found: dict[str, Any] = {
            "copy_bytes_per_s": copied,
            "constants": asdict(constants),
            "tbe": rows,
            "calibration": residuals,
        }
        args.json.write_text(json.dumps(describe() | found, indent=2))
    return 0


def moved_bytes(case: LookupCase, times: LookupTimes, *, rows_read: int) -> float:
    """Bytes of a forward that reads `rows_read` rows, and of its backward."""
    row = case.dim * ELEMENT_BYTES
    vectors = case.batch_size * row
    forward = rows_read * row + vectors
    backward = vectors + 2 * times.num_unique * (row + ELEMENT_BYTES)
    return forward + backward


def _row(
    case: LookupCase, times: LookupTimes, copied: float, constants: LookupConstants
) -> dict[str, Any]:
    seconds = times.forward_s + times.backward_s
    predicted = constants.predict(case, times)
    looked_up = moved_bytes(case, times, rows_read=times.num_ids) / seconds
    distinct = moved_bytes(case, times, rows_read=times.num_unique) / seconds
    return {
        **asdict(case),
        **asdict(times),
        "seconds": seconds,
        "bytes_per_s": looked_up,
        "share_of_copy": looked_up / copied,
        "distinct_share_of_copy": distinct / copied,
        "model_error": sum(predicted) / seconds - 1,
        "model_forward_error": predicted[0] / times.forward_s - 1,
        "model_backward_error": predicted[1] / times.backward_s - 1,
    }


def _print(rows: list[dict[str, Any]], residuals: list[dict[str, Any]], copied: float) -> None:
    print(f"{torch.cuda.get_device_name()}: a copy moves {copied / 1e9:,.0f} GB/s")
    print(
        f"{'dim':>5}{'skew':>6}{'fwd ms':>9}{'bwd ms':>9}{'GB/s':>8}{'of copy':>9}"
        f"{'distinct':>10}{'model':>8}{'fwd':>7}{'bwd':>7}"
    )
    for row in rows:
        print(
            f"{row['dim']:>5}{row['exponent']:>6}{1e3 * row['forward_s']:>9.3f}"
            f"{1e3 * row['backward_s']:>9.3f}{row['bytes_per_s'] / 1e9:>8,.0f}"
            f"{row['share_of_copy']:>9.0%}{row['distinct_share_of_copy']:>10.0%}"
            f"{row['model_error']:>+8.0%}{row['model_forward_error']:>+7.0%}"
            f"{row['model_backward_error']:>+7.0%}"
        )
    errors = {
        name: statistics.median(abs(row["model_error"]) for row in part)
        for name, part in (("shown", rows), ("fitted to", residuals))
    }
    print("median error of the model: " + ", ".join(f"{v:.1%} {k}" for k, v in errors.items()))


if __name__ == "__main__":
    sys.exit(main())
