"""Speed, measured: ``python -m tests.benchmarks``, and what compilers say: `compiled`.

A row is a module with ``TITLE`` and ``cases(quick)``, which names its cases and makes
them one at a time: data is random, and large. `timing` runs the contestants of a case,
`report` prints, saves and draws. What came out, on which machine, is in ``RESULTS.md``.
"""
