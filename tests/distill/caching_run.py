"""Caches a teacher as `hf-minitron cache-teacher` does: `caching_run.py TEACHER TEXT OUTPUT [SECONDS]`.

Two folders in OUTPUT, one of either kind.
SECONDS are waited before each shard, so that a test can kill the process in the middle. Run by test_cache_stage.py.
"""

from __future__ import annotations

import sys
import time

import torch

from hf_minitron.distill import cache_writer
from hf_minitron.distill.cache_stage import CacheTeacherArguments, cache_teacher


def main(teacher: str, text: str, output: str, seconds: float = 0.0) -> None:
    torch.set_num_threads(1)
    write = cache_writer._Writer.write_shard

    def slow(self, folder, number):
        time.sleep(seconds)
        write(self, folder, number)

    cache_writer._Writer.write_shard = slow
    cache_both(teacher, text, output)


def cache_both(teacher: str, text: str, output: str) -> None:
    for kind in ("topk", "exact"):
        cache_teacher(
            CacheTeacherArguments(
                teacher_model=teacher, dataset=text, output_dir=f"{output}/{kind}", kind=kind, top_k=16, max_length=32,
                max_shard_bytes=24_000, batch_size=4, teacher_dtype="float32", dtype="float32",
            )
        )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(float, sys.argv[4:]))
