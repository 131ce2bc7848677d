"""Random modules (`tests/fuzz`), compiled, proven and compared with themselves; what fails is shrunk and printed.

    python -m benchmarks.fuzz [--first SEED] [--count N] [--degree N]

A failure is printed as the fragment that makes it: it belongs into `KEPT` of `tests/fuzz/test_fuzz.py`.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import torch

from tests.fuzz.trial import GOOD, case, shrunk, tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, counts = time.monotonic(), Counter[str]()
    for seed in range(args.first, args.first + args.count):
        fragment, degree = case(seed)
        outcome = tried(fragment, degree)
        counts[outcome.status] += 1
        if outcome.status not in GOOD:
            print(f"seed {seed}, {degree} ranks: {outcome.status}: {outcome.why[:300]}", flush=True)
            print(f"    {shrunk(fragment, degree, outcome.status)}", flush=True)
    said = ", ".join(f"{n} {status}" for status, n in counts.most_common())
    print(f"{args.count} modules in {time.monotonic() - start:.0f} s: {said}", flush=True)


if __name__ == "__main__":
    main()
