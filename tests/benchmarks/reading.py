"""What reading a stored map costs: the conclusion, the plots and the page of `demerge analyze`.

    OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/reading.py --json

takes a map of 20 bins x 16 groups from disk and writes all files of an analysis, in turns with a
floor: the same map's similarity with errors, 10 times. `reading` and `summary` (the conclusion
alone) are CPU seconds, the median over the turns. `reading_ratio` is the median over the turns of
the reading's seconds over the floor's in the same turn. Imports and a first turn are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from demerge.analysis import Reading, summarize, write_report
from demerge.analysis.similarity import similarity
from demerge.conflict import ConflictMap, Origin
from demerge.timesteps import Partition

FLOOR = 10


def make_map(bins: int, groups: int) -> ConflictMap:
    """Return a map whose bins have one direction per quarter, with noise."""
    rng = np.random.default_rng(0)
    edges = [0, bins // 10, bins // 4, bins // 2 + 1, bins]
    directions = np.repeat(np.eye(4, 12), np.diff(edges), axis=0)
    s = directions[:, None] + 0.4 * rng.standard_normal((bins, groups, 12))
    origin = Origin("model", "data", 12, "exact", "shared", False, "euclid", 4, 0)
    gram = np.einsum("imd,jnd->imjn", s, s)
    return ConflictMap(Partition.uniform(1000, bins), gram, np.linspace(9, -10, 1000), origin)


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of a piece of work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bins", type=int, default=20)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stored = make_map(options.bins, options.groups).save(Path(folder) / "map.safetensors")

        def conclude() -> None:
            summarize(Reading(ConflictMap.load(stored))).lines()

        def read() -> None:
            summary = summarize(Reading(ConflictMap.load(stored)))
            write_report(summary, Path(folder) / "out")

        def floor() -> None:
            for _ in range(FLOOR):
                similarity(ConflictMap.load(stored))

        rows = {"floor": floor, "summary": conclude, "reading": read}
        for work in rows.values():
            work()
        turns = [
            {name: seconds(work) for name, work in rows.items()} for _ in range(options.repeat)
        ]
    medians = {name: statistics.median(turn[name] for turn in turns) for name in rows}
    ratio = statistics.median(turn["reading"] / turn["floor"] for turn in turns)
    print(f"{medians}, ratio {ratio:.1f}", file=sys.stderr)
    if options.json:
        settings = {"bins": options.bins, "groups": options.groups, "repeat": options.repeat}
        json.dump({**settings, "reading_ratio": ratio, "seconds": medians}, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
