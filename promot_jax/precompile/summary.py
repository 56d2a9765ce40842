"""What the compiled programs need, as a sentence per program and as Markdown tables."""

from collections.abc import Sequence
from typing import Any

from promot_jax.precompile import hlo, roofline
from promot_jax.report.markdown import markdown as markdown_table

Json = dict[str, Any]


def sentence(entry: Json) -> str:
    """One line for the terminal."""
    if "step_seconds" not in entry:
        return "; ".join([entry["verdict"], *entry.get("failed_checks", [])]) + "."
    return (
        f"{entry['verdict']}; at least {entry['step_seconds']:.3g} s per step, bound by {entry['bound']}; "
        f"compiled in {entry['compile_seconds']:.0f} s ({entry['compile_cpu_seconds']:.0f} s of CPU)."
    )


def markdown(entries: Sequence[Json]) -> str:
    """The table of `precompile.md`: GiB, FLOPs and seconds, all per chip."""
    titles = ["program", "chips", "mesh", "batch", "parameters", "optimizer", "temporaries", "base model", "total"]
    titles += ["of HBM", "TFLOP", "model's share", "HBM traffic", "sent", "step at least", "bound by", "CPU to compile"]
    lines = [titles]
    for entry in entries:
        chip = roofline.CHIPS[entry["topology"].partition(":")[0]]
        memory = {name: value / roofline.GIB for name, value in entry["memory"].items()}
        mesh = " x ".join(f"{axis} {size}" for axis, size in entry["mesh"].items() if size > 1) or "1"
        chips = f"{entry['slices']} x " * (entry["slices"] > 1) + entry["topology"]
        row = [entry["program"], chips, mesh, str(entry["batch"]), f"{memory['parameters']:.2f}"]
        row += [f"{memory['optimizer']:.3f}"]
        row += [f"{memory['temporaries']:.2f}" if "temporaries" in memory else ""]
        row += [f"{memory['base']:.2f}"]
        share = memory["total"] * roofline.GIB / chip.memory
        row += [f"{memory['total']:.2f}", f"{100 * share:.0f} %" + " **too much**" * (share > 1)]
        if "step_seconds" in entry:
            links = sum(entry["collectives"].values())
            row += [f"{entry['flops'] / 1e12:.3g}", f"{100 * entry['model_share']:.0f} %"]
            between = f" + {entry['network'] / 1e9:.3g} GB between slices" * bool(entry["network"])
            row += [f"{entry['bytes'] / 1e9:.3g} GB", f"{links / 1e9:.3g} GB{between}"]
            row += [f"{entry['step_seconds']:.3g} s"]
            row += [entry["bound"], f"{entry['compile_cpu_seconds']:.0f} s"]
        else:
            row += [""] * 7
        lines.append(row)
    return markdown_table(lines) + "\n"


def sent(entries: Sequence[Json]) -> str:
    """The second table of `precompile.md`: GB that a chip sends by kind, and what the bound leaves of its peak."""
    kinds = [kind for kind in hlo.COLLECTIVES if any(entry.get("collectives", {}).get(kind) for entry in entries)]
    rows = [["program", "chips", *kinds, "between slices", "of the chip's peak at the bound"]]
    for entry in entries:
        if "step_seconds" not in entry:
            continue
        network = f"{entry['network'] / 1e9:.3g}" if entry["network"] else "-"
        bound = "" if not entry["network"] or "network" in entry["seconds"] else " (time unknown)"
        row = [entry["program"], f"{entry['slices']} x {entry['topology']}"]
        row += [f"{entry['collectives'].get(kind, 0.0) / 1e9:.3g}" for kind in kinds]
        rows.append([*row, network + bound, f"{100 * entry['utilization']:.0f} %"])
    return markdown_table(rows) + "\n"
