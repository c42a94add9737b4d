#!/usr/bin/env python3
"""Writes what torch.randn gives on the CPU, for generators that are asked several times.

    python3 models/scripts/make_random.py models/fixtures/torch-random

An array of cases.npz is called `SEED/CALL/COUNT`; the calls of a seed are made in order on one generator.
Counts below 16 and from 16 on take different paths in PyTorch, and a count that is no multiple of 16 computes
its last 16 values again.
"""

import pathlib
import sys

import numpy
import torch

SEEDS = [0, 1, 42, 2**32 - 1, 2**40 + 3]
# An odd count below 16 leaves a value behind, which the next count below 16 begins with.
COUNTS = [1, 7, 15, 16, 17, 33, 1000, 2, 16, 1]


def main(folder):
    arrays = {}
    for seed in SEEDS:
        generator = torch.Generator("cpu").manual_seed(seed)
        for call, count in enumerate(COUNTS):
            values = torch.randn(count, generator=generator, dtype=torch.float32)
            arrays[f"{seed}/{call}/{count}"] = values.numpy()
    folder.mkdir(parents=True, exist_ok=True)
    numpy.savez_compressed(folder / "cases.npz", **arrays)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
