"""The kernel sweep: which shape of kernel moves an optimizer's streams fastest. `python -m bench.sweep` builds and runs
it. The program stands alone; its mathematics are the project's own stages."""
