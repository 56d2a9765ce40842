"""The figures of compiled programs, as a sentence per program and as Markdown tables."""

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
    rows = [titles]
    for entry in entries:
        gib = {name: f"{size / roofline.GIB:.2f}" for name, size in entry["memory"].items()}
        mesh = " x ".join(f"{axis} {size}" for axis, size in entry["mesh"].items() if size > 1) or "1"
        chips = f"{entry['slices']} x " * (entry["slices"] > 1) + entry["topology"]
        optimizer = f"{entry['memory']['optimizer'] / roofline.GIB:.3f}"
        share = entry["memory"]["total"] / roofline.CHIPS[entry["topology"].partition(":")[0]].memory
        row = [entry["program"], chips, mesh, str(entry["batch"]), gib["parameters"], optimizer]
        row += [gib.get("temporaries", ""), gib["base"], gib["total"]]
        row += [f"{100 * share:.0f} %" + " **too much**" * (share > 1)]
        if "step_seconds" in entry:
            links = f"{sum(entry['collectives'].values()) / 1e9:.3g} GB"
            network = f" + {entry['network'] / 1e9:.3g} GB between slices" * bool(entry["network"])
            row += [f"{entry['flops'] / 1e12:.3g}", f"{100 * entry['model_share']:.0f} %"]
            row += [f"{entry['bytes'] / 1e9:.3g} GB", links + network, f"{entry['step_seconds']:.3g} s"]
            row += [entry["bound"], f"{entry['compile_cpu_seconds']:.0f} s"]
        rows.append(row + [""] * (len(titles) - len(row)))
    return markdown_table(rows) + "\n"


def sent(entries: Sequence[Json]) -> str:
    """The second table of `precompile.md`: GB that a chip sends by kind, and the share of its peak at the bound."""
    counted = [entry for entry in entries if "step_seconds" in entry]
    kinds = [kind for kind in hlo.COLLECTIVES if any(entry["collectives"].get(kind) for entry in counted)]
    rows = [["program", "chips", *kinds, "between slices", "of the chip's peak at the bound"]]
    for entry in counted:
        network = f"{entry['network'] / 1e9:.3g}" if entry["network"] else "-"
        note = "" if not entry["network"] or "network" in entry["seconds"] else " (time unknown)"
        row = [entry["program"], f"{entry['slices']} x {entry['topology']}"]
        row += [f"{entry['collectives'].get(kind, 0.0) / 1e9:.3g}" for kind in kinds]
        rows.append([*row, network + note, f"{100 * entry['utilization']:.0f} %"])
    return markdown_table(rows) + "\n"
