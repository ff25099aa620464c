"""Bandwidth of the fused embedding kernel on one GPU, as a share of a copy's, by dim and skew.

.venv/bin/python benchmarks/tbe_gpu.py [--quick] [--json FILE] [--calibration FILE]

Bytes of a step: every looked-up row read once and every vector written (forward); every gradient
read, every distinct row and its accumulator read and written (backward). Needs a CUDA device and
the `fbgemm-gpu` wheel (`make ACCEL=gpu demo` installs it); without them it says so, exit code 2.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from environment import describe

from embedding.calibration import constants_for
from embedding.cluster_shape import ClusterShape
from embedding.part_timing import LookupCase, LookupTimes, copied_bytes_per_s, time_lookup
from embedding.topology import local_machine

DIMS = (32, 64, 128, 256)
EXPONENTS = (0.0, 0.8, 1.2)
ROWS, BATCH, POOLING = 10_000_000, 65_536, 10
ELEMENT_BYTES = 4


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--calibration", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write(
            "error: this benchmark needs a CUDA device, a CUDA build of torch and the fbgemm-gpu "
            "wheel, and torch sees no device; run it on a GPU host after `make ACCEL=gpu demo`\n"
        )
        return 2
    device = torch.device("cuda")
    copied = copied_bytes_per_s(device)
    machine = local_machine(device)
    shape = ClusterShape(machine=machine, ranks_per_host=1)
    constants = constants_for(shape, args.calibration)
    print(f"{torch.cuda.get_device_name()}: a copy moves {copied / 1e9:,.0f} GB/s")
    print(f"{'dim':>5}{'skew':>6}{'fwd+bwd ms':>12}{'GB/s':>8}{'of copy':>9}{'model error':>13}")
    rows = []
    for dim in DIMS[:2] if args.quick else DIMS:
        for exponent in EXPONENTS:
            case = LookupCase(ROWS, dim, POOLING, exponent, batch_size=BATCH)
            times = time_lookup(case, device)
            seconds = times.forward_s + times.backward_s
            rate = moved_bytes(case, times) / seconds
            error = predicted_s(case, times, constants.seconds) / seconds - 1
            rows.append(
                {
                    "dim": dim,
                    "exponent": exponent,
                    "seconds": seconds,
                    "bytes_per_s": rate,
                    "share_of_copy": rate / copied,
                    "model_error": error,
                }
            )
            print(
                f"{dim:>5}{exponent:>6}{1e3 * seconds:>12.3f}{rate / 1e9:>8,.0f}"
                f"{rate / copied:>9.0%}{error:>+13.0%}"
            )
    if args.json:
        found: dict[str, Any] = {"copy_bytes_per_s": copied, "constants": constants.source}
        args.json.write_text(json.dumps(describe() | found | {"tbe": rows}, indent=2))
    return 0


def moved_bytes(case: LookupCase, times: LookupTimes) -> float:
    """Bytes that a forward and a backward must move at least."""
    row = case.dim * ELEMENT_BYTES
    vectors = case.batch_size * row
    forward = times.num_ids * row + vectors
    backward = vectors + 2 * times.num_unique * (row + ELEMENT_BYTES)
    return forward + backward


def predicted_s(case: LookupCase, times: LookupTimes, seconds: dict[str, float]) -> float:
    """The cost model's seconds of the same work, calls included."""
    row = case.dim * ELEMENT_BYTES
    counts = {
        "lookup_calls": 1.0,
        "lookup_bags": case.batch_size,
        "lookup_ids": times.num_ids,
        "lookup_bytes": times.num_ids * row,
        "lookup_unique_bytes": times.num_unique * row,
        "update_ids": times.num_ids,
        "update_bytes": times.num_ids * row,
        "update_unique_rows": times.num_unique,
        "update_unique_bytes": times.num_unique * (row + ELEMENT_BYTES),
    }
    return sum(seconds.get(name, 0.0) * count for name, count in counts.items())


if __name__ == "__main__":
    sys.exit(main())
