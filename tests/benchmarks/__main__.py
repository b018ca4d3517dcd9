"""Runs the benchmarks: ``python -m tests.benchmarks [ROW ...]``; see ``--help``."""

import argparse
import contextlib
import importlib
import os
import sys
from typing import Any

ROWS = (
    "two_heads",
    "losses",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_losses",
    "segments",
    "accumulation",
    "contrastive",
    "eager",
    "trace_time",
    "compiles",
    "pad_ragged",
    "import_time",
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__
    )
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, 3 rounds")
    parser.add_argument("--rounds", type=int, default=15, help="at most (default: 15)")
    parser.add_argument(
        "--seconds", type=float, default=60, help="at most, for a case (default: 60)"
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: seconds of all cores together, which other work on the machine "
        "disturbs less; not for peers that spin while they wait, as PyTorch does",
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--plot", metavar="FILE", help="draw them to FILE")
    options = parser.parse_args(arguments)
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {ROWS}")

    # Before anything is allocated, and before JAX looks for devices.
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda,cpu"}[options.device]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # there are others
    from tests.benchmarks import report, timing

    kept = timing.keep_memory()
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(os.cpu_count() or 1)

    about = report.machine() | {
        "command": " ".join(
            ["python -m tests.benchmarks", *(arguments or sys.argv[1:])]
        ),
        "memory": "kept between calls" if kept else "as the C library does",
        "clock": options.clock,
    }
    print("\n".join(f"{name}: {value}" for name, value in about.items()), end="\n\n")
    rows: dict[str, dict[str, Any]] = {}
    for name in options.rows or ROWS:
        module = importlib.import_module(f"tests.benchmarks.{name}")
        timing.keep_memory()
        rows[name] = _run(name, module.cases(options.quick), options)
        print(report.table(module.TITLE, rows[name]), flush=True)
    if options.json:
        report.save(options.json, about, rows)
    if options.plot:
        report.plot(options.plot, rows)


def _run(
    name: str, cases: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    from tests.benchmarks import report, timing

    rounds = 3 if options.quick else options.rounds
    results = {}
    with _progress(name, rounds * len(cases)) as bar:
        for title, make in cases.items():
            case = make()
            if isinstance(case, timing.Counted):
                results[title] = report.counted(case)
                bar.update(rounds)
                continue
            runners = {n: f for n, f in case.contestants.items() if callable(f)}
            if case.limit is not None:
                runners[case.limit_name] = case.limit
            times = timing.race(
                runners,
                rounds=rounds,
                clock=options.clock,
                shortest=0.0 if options.quick or options.device == "cpu" else 0.02,
                seconds=options.seconds,
                on_round=lambda: bar.update(1),
            )
            results[title] = report.timed(case, times)
            del case, runners
            timing.release()
    return results


def _progress(name: str, total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext(argparse.Namespace(update=lambda n: None))
    return tqdm(total=total, desc=name, leave=False)


if __name__ == "__main__":
    main()
