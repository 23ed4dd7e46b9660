"""What a GPU run prints."""

from __future__ import annotations

from typing import Any

from ..tables import aligned, milliseconds, ratio, verdict


def headline(result: dict[str, Any]) -> str:
    """Device and versions in a line."""
    machine, versions = result["machine"], result["versions"]
    return (
        f"{machine['gpu'] or machine['cpu']}, driver {machine['driver'] or 'unknown'}; torch "
        f"{versions['torch']}, CUDA {versions['cuda'] or 'none'}, Triton {versions['triton'] or 'none'}"
    )


def ceilings(found: dict[str, Any]) -> str:
    """What the device reached."""

    def number(name: str) -> str:
        value = found.get(name)
        return "-" if value is None else f"{value / 1e12:.3g}"

    return (
        f"Measured: copy {number('copy_bytes_per_s')} TB/s (read + write), read "
        f"{number('read_bytes_per_s')} TB/s; matmul bf16 {number('bf16_flops')}, "
        f"TF32 {number('tf32_flops')}, FP32 {number('fp32_flops')}, FP64 {number('fp64_flops')} TFLOP/s"
    )


def text_table(case: dict[str, Any]) -> str:
    """One case, one row a contender."""
    if "error" in case:
        return f"{case['name']} ({case['about']}): FAILED ({case['error']})"
    heads = [
        "",
        "median ms",
        "quartiles",
        "graph ms",
        "host us",
        "launches",
        "of floor",
        "vs best peer",
        "counts",
    ]
    rows = [heads, *(_row(c, case["matrices"]) for c in case["contenders"])]
    head = f"{case['name']} ({case['about']}), {case['dtype']}, rtol {case['rtol']:g}"
    floor = case["floor_ms"]
    if floor:
        head += (
            f"; floor {milliseconds(floor['total'])} ms (read {milliseconds(floor['read'])}, Gram "
            f"{milliseconds(floor['gram_math'])}, lambda_max {milliseconds(floor['lambda_max'])}, "
            f"LDLt {milliseconds(floor['ldlt'])})"
        )
    return "\n".join([head, *aligned(rows), *_kernel_lines(case)])


def _row(c: dict[str, Any], matrices: int) -> list[str]:
    name = ("* " if c["ours"] else "  ") + c["name"]
    if "error" in c:
        return [name, *["-"] * 7, f"FAILED ({c['error']})"]
    graph = c.get("graph", {})
    said = verdict(c["check"], matrices)
    if graph.get("wrong"):
        said += f"; WRONG in the graph: {graph['wrong']}"
    if "error" in graph:
        said += f"; no graph ({graph['error']})"
    share = c.get("fraction_of_floor")
    return [
        name,
        milliseconds(c["median_ms"]),
        f"{milliseconds(c['lower_quartile_ms'])} - {milliseconds(c['upper_quartile_ms'])}",
        milliseconds(graph["median_ms"]) if "median_ms" in graph else "-",
        f"{c['host_us']:.1f}" if "host_us" in c else "-",
        f"{c['launches']:g}" if "launches" in c else "-",
        "-" if share is None else f"{share:.0%}",
        ratio(c["vs_best_peer"]),
        said,
    ]


def _kernel_lines(case: dict[str, Any]) -> list[str]:
    return [
        f"    {c['name']}: {k['us']:.1f} us in {k['launches']:g} x {k['name']}"
        for c in case["contenders"]
        for k in c.get("kernels", ())[:4]
    ]


def late_line(case: str, row: dict[str, Any]) -> str:
    """One late contender."""
    said = row["error"] if "error" in row else f"{milliseconds(row['median_ms'])} ms, one call"
    return f"{case}: {row['name']}: {said}"
