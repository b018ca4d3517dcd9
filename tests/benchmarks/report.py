"""What came out, as a table, as JSON, and as a picture."""

import importlib.metadata
import json
import os
import platform
import time
from typing import Any

import jax
import numpy as np

from tests.benchmarks.timing import OURS, Case, Counted, ratio

Result = dict[str, Any]


def timed(case: Case, times: dict[str, np.ndarray]) -> Result:
    """Sums a race up: medians, and ratios to this package."""
    ours = times[OURS]
    result = {
        "unit": "ms",
        "values": {
            name: 1e3 * float(np.nanmedian(times[name])) if name in times else None
            for name in case.contestants
        },
        "ratios": {
            name: ratio(times[name], ours) if name in times else None
            for name in case.contestants
        },
        "absent": {
            name: reason
            for name, reason in case.contestants.items()
            if isinstance(reason, str)
        }
        | {
            name: "out of memory"
            for name, contestant in case.contestants.items()
            if callable(contestant) and name not in times
        },
    }
    if case.limit is not None:
        limit = case.scale * times[case.limit_name]
        result["limit"] = {
            "name": case.limit_name,
            "value": 1e3 * float(np.nanmedian(limit)),
            "share": ratio(limit, ours),
        }
    return result


def counted(case: Counted) -> Result:
    result: Result = {
        "unit": "",
        "values": case.counts,
        "ratios": {name: n / case.counts[OURS] for name, n in case.counts.items()},
        "absent": {},
    }
    if case.limit is not None:
        share = case.limit / case.counts[OURS]
        result["limit"] = {"name": case.limit_name, "value": case.limit, "share": share}
    return result


def table(title: str, results: dict[str, Result]) -> str:
    """One Markdown table for a row: a line a case, a column a contestant."""
    names = list(dict.fromkeys(n for one in results.values() for n in one["values"]))
    limits = list(
        dict.fromkeys(
            one["limit"]["name"] for one in results.values() if "limit" in one
        )
    )
    unit = next(iter(results.values()))["unit"]
    heads = [unit, *names, *(f"limit: {name}" for name in limits)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case, one in results.items():
        cells = [_cell(one, name) for name in names]
        for limit in limits:
            known = one.get("limit", {})
            cells.append(
                f"{_number(known['value'])} ({known['share']:.0%})"
                if known.get("name") == limit
                else ""
            )
        lines.append("| " + " | ".join([case, *cells]) + " |")
    return f"### {title}\n\n" + "\n".join(lines) + "\n"


def _cell(one: Result, name: str) -> str:
    if name in one["absent"]:
        return one["absent"][name]
    if name not in one["values"]:
        return ""
    value = _number(one["values"][name])
    return value if name == OURS else f"{value} ({one['ratios'][name]:.2f}x)"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> dict[str, str]:
    packages = (
        "jax",
        "jaxlib",
        "optax",
        "flax",
        "numpy",
        "torch",
        "tokamax",
        "liger_kernel",
        "cut_cross_entropy",
        "wloss_jax",
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": ", ".join(sorted({d.device_kind for d in jax.devices()})),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(x.split(":")[1].strip() for x in lines if "model name" in x)
    except (OSError, StopIteration):
        return platform.processor()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def save(path: str, about: dict[str, Any], rows: dict[str, dict[str, Result]]) -> None:
    with open(path, "w") as file:
        json.dump({"about": about, "rows": rows}, file, indent=2)


def plot(path: str, rows: dict[str, dict[str, Result]]) -> None:
    """Draws how many times ours each contestant takes, and the limit, for each case."""
    import matplotlib.pyplot as plt

    cases = [
        (row, name, one) for row, named in rows.items() for name, one in named.items()
    ]
    figure, axes = plt.subplots(
        len(cases), figsize=(8, 1 + 1.6 * len(cases)), squeeze=False, sharex=True
    )
    for axis, (row, name, one) in zip(axes[:, 0], cases, strict=True):
        bars = {n: r for n, r in one["ratios"].items() if r is not None}
        if "limit" in one:
            bars[f"limit: {one['limit']['name']}"] = one["limit"]["share"]
        colors = ["tab:orange" if n == OURS else "tab:blue" for n in bars]
        axis.barh(list(bars), list(bars.values()), color=colors)
        axis.axvline(1, color="tab:orange", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_title(f"{row}: {name}", fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel(f"time, {OURS} = 1 (less is faster)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
