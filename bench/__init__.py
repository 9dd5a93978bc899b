"""Benchmarks that can be believed: `python -m bench cpu` and `gpu` measure, `report` writes the README's tables.

`cases` says what is raced, `contenders` and `peers` who races, `workload` builds the tensors, `race` holds the method,
`streams` and `allocations` measure what is not a race, `records` owns the one CSV format and `report` turns CSV rows
into tables and the plot. The `gpu_*` modules are their twins for a GPU; `sweep` compares shapes of kernels there, and
`gpu_run` does all there is to do on a machine that has one.
"""

import os

# torch's profiler (see allocations) prints two lines per use otherwise; it reads this when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
