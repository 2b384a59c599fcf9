"""How fast, how small and how exact the kernels are beside their peers. Run `python -m benchmarks list`.

`suites/` says what is measured, one file each; `peers/` who else takes part, one file each; everything else is the
harness, which knows neither. Only in a checkout: the wheel has no benchmarks.
"""
