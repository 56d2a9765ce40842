"""The paper's curves as SVG files: ICL, format share and target score against step, and target score against ICL.

The same results give the same bytes, with the same version of Matplotlib.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promot_jax import tables
from promot_jax.analysis import bootstrap, tradeoff

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Json = dict[str, Any]

# Okabe and Ito's palette, safe for the colour-blind; markers tell methods apart in print.
STYLES = {"finetune": ("#D55E00", "o"), "promot": ("#0072B2", "s"), "prompt_tuning": ("#009E73", "^")}
SPARE_STYLES = (
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#6B4C9A", "<"),
    ("#8C564B", ">"),
    ("#000000", "X"),
)
REFERENCE = "#555555"
RC: Any = {
    "svg.hashsalt": "promot_jax",  # ids in the file would differ from run to run
    "svg.fonttype": "path",  # looks the same whatever fonts the reader has
    "text.parse_math": False,  # names may contain a dollar sign
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """A figure on disk.

    Attributes:
        path: the SVG file.
        title: one line, for the heading.
        alt: what it shows, with numbers, for readers who do not see it.
    """

    path: Path
    title: str
    alt: str


@dataclass(frozen=True)
class Series:
    """One method's curves: `values[seed][step]`, on [0, 100]."""

    method: str
    values: dict[int, dict[int, float]]

    def common(self) -> list[int]:
        """Steps that every seed has: a mean over changing seeds would show jumps that no run has."""
        return sorted(set.intersection(*(set(curve) for curve in self.values.values())))

    def spread(self, step: int) -> bootstrap.Spread:
        """Mean and range over seeds at a common step."""
        spread = bootstrap.across_seeds(curve[step] for curve in self.values.values())
        assert spread is not None  # a common step has a value for each seed
        return spread


def write(results: Json, folder: Path) -> list[Picture]:
    """Draws every figure that the results have points for.

    Args:
        results: a comparison (`results.as_comparison`).
        folder: where the SVG files go; created.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    with matplotlib.rc_context(RC):
        for name, draw in FIGURES.items():
            drawn = draw(results)
            if drawn is not None:
                figure, title, alt = drawn
                path = folder / f"{name}.svg"
                figure.savefig(path, format="svg", metadata={"Date": None, "Title": title, "Description": alt})
                pictures.append(Picture(path, title, alt))
    return pictures


def series(results: Json, key: str, *, stages: Sequence[str] = tradeoff.MODEL_TUNING) -> list[Series]:
    """One key of the curves (`target`, `icl`, `format_share`, `loss`) per method, for the methods that have points."""
    found = []
    for method in tables.ordered(results["methods"]):
        values = {}
        for run in results["methods"][method]:
            points = [point for point in run["curve"] if point["stage"] in stages and point.get(key) is not None]
            if points:
                values[run["seed"]] = {point["step"]: point[key] for point in points}
        if values:
            found.append(Series(method, values))
    return found


def _icl(results: Json) -> "tuple[Figure, str, str] | None":
    title = "ICL normalised average against step"
    return _against_step(results, "icl", title, f"ICL normalised average{_shots(results)}", start="pretrained")


def _format_share(results: Json) -> "tuple[Figure, str, str] | None":
    title = "Format share against step"
    return _against_step(results, "format_share", title, "ICL outputs in the target's label set (%)", start=None)


def _target(results: Json) -> "tuple[Figure, str, str] | None":
    panels = {
        "Step of stage 1 (updates of the prompt)": series(results, "target", stages=("stage1",)),
        "Step (updates of the model)": series(results, "target"),
    }
    panels = {axis: curves for axis, curves in panels.items() if curves}
    if not panels:
        return None
    title = f"Target score{_target_name(results)} against step"
    figure, axes = _figure(len(panels))
    for ax, (axis, curves) in zip(axes, panels.items(), strict=True):
        _lines(ax, curves, results)
        ax.set_xlabel(axis)
    axes[0].set_ylabel("Target score, validation (0 to 100)")
    _finish(figure, axes, title)
    told = " ".join(f"{axis}: {_described(curves)}" for axis, curves in panels.items())
    return figure, title, f"Line chart. {told}"


def _tradeoff(results: Json) -> "tuple[Figure, str, str] | None":
    targets = {one.method: one for one in series(results, "target")}
    figure, axes = _figure(1)
    told = [
        _path(axes[0], targets[icl.method], icl, results) for icl in series(results, "icl") if icl.method in targets
    ]
    told = [sentence for sentence in told if sentence]
    if not told:
        return None
    title = "Trade-off: target score against ICL, one point per checkpoint"
    axes[0].set_xlabel(f"Target score{_target_name(results)}, validation (0 to 100)")
    axes[0].set_ylabel(f"ICL normalised average{_shots(results)}")
    _finish(figure, axes, title)
    key = "Up and to the right is better. Hollow marks: before any update of the model. Dots: single seeds."
    return figure, title, f"Scatter plot with paths. {' '.join(told)} {key}"


def _path(ax: "Axes", target: Series, icl: Series, results: Json) -> str:
    """Draws one method's checkpoints, mean over seeds, and each seed's as dots; returns a sentence about the mean."""
    color, marker = _style(target.method, results)
    seeds = [seed for seed in target.values if seed in icl.values]
    steps = {seed: sorted(set(target.values[seed]) & set(icl.values[seed])) for seed in seeds}
    shared = sorted(set.intersection(*map(set, steps.values()))) if seeds else []
    if not shared:
        return ""
    if len(seeds) > 1:
        dots = [(target.values[seed][step], icl.values[seed][step]) for seed in seeds for step in steps[seed]]
        ax.scatter([x for x, _ in dots], [y for _, y in dots], s=10, color=color, alpha=0.35, linewidths=0)
    xs, ys = ([sum(one.values[seed][step] for seed in seeds) / len(seeds) for step in shared] for one in (target, icl))
    ax.plot(xs, ys, color=color, marker=marker, markersize=5, linewidth=1.5, label=tables.label(target.method))
    if shared[0] == 0:
        ax.plot(xs[0], ys[0], color=color, marker=marker, markersize=8, markerfacecolor="white")
    ends = [f"step {shared[end]}: target {xs[end]:.1f}, ICL {ys[end]:.1f}" for end in (0, -1)]
    return f"{tables.label(target.method)} from {ends[0]} to {ends[1]}."


def _against_step(
    results: Json, key: str, title: str, axis: str, *, start: str | None
) -> "tuple[Figure, str, str] | None":
    curves = series(results, key)
    if not curves:
        return None
    figure, axes = _figure(1)
    _lines(axes[0], curves, results)
    first = [curve[0] for one in curves for curve in one.values.values() if 0 in curve]
    if start and first:
        # Step 0 without a prompt is the pretrained model, evaluated on the examples of the curve.
        axes[0].axhline(sum(first) / len(first), color=REFERENCE, linestyle=":", linewidth=1.5, label=start)
    axes[0].set_xlabel("Step (updates of the model)")
    axes[0].set_ylabel(axis)
    _finish(figure, axes, title)
    return figure, title, f"Line chart. {_described(curves)}"


def _lines(ax: "Axes", curves: Sequence[Series], results: Json) -> None:
    for one in curves:
        color, marker = _style(one.method, results)
        steps = one.common()
        spreads = [one.spread(step) for step in steps]
        means = [spread.mean for spread in spreads]
        ax.plot(steps, means, color=color, marker=marker, markersize=5, linewidth=1.8, label=tables.label(one.method))
        if len(one.values) > 1:
            lows, highs = [spread.low for spread in spreads], [spread.high for spread in spreads]
            ax.fill_between(steps, lows, highs, color=color, alpha=0.18 if len(curves) <= 4 else 0.08, linewidth=0)
        for curve in one.values.values():
            if set(curve) != set(steps):  # a seed that is further than the others
                ax.plot(sorted(curve), [curve[step] for step in sorted(curve)], color=color, linestyle=":", linewidth=1)


def _figure(panels: int) -> "tuple[Figure, list[Axes]]":
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 if panels == 1 else 9.0, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False, sharey=True)[0])


def _finish(figure: "Figure", axes: "Sequence[Axes]", title: str) -> None:
    handles: dict[str, Any] = {}
    for ax in axes:
        handles |= {text: handle for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
        ax.margins(x=0.03, y=0.06)
        ax.set_ylim(0, max(10, ax.get_ylim()[1]))  # a cut or stretched axis would make any change look large
        ax.locator_params(axis="x", integer=True)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)))
    figure.suptitle(title, fontsize=11)


def _style(method: str, results: Json) -> tuple[str, str]:
    others = [name for name in results["methods"] if name not in STYLES and name != tables.PRETRAINED]
    if method in STYLES:
        return STYLES[method]
    return SPARE_STYLES[others.index(method) % len(SPARE_STYLES)] if method in others else (REFERENCE, "*")


def _described(curves: Sequence[Series]) -> str:
    """`fine-tuning from 52.5 at step 0 to 22.1 at step 60 (mean of 3 seeds).` for each method."""
    sentences = []
    for one in curves:
        seeds = "1 seed" if len(one.values) == 1 else f"mean of {len(one.values)} seeds"
        steps = one.common()
        ends = [f"{one.spread(step).mean:.1f} at step {step}" for step in (steps[0], steps[-1])] if steps else []
        sentences.append(
            f"{tables.label(one.method)} {'from ' + ' to '.join(ends) if ends else 'no common step'} ({seeds})."
        )
    return " ".join(sentences)


def _target_name(results: Json) -> str:
    names = {run["target"]["task"] for runs in results["methods"].values() for run in runs if run.get("target")}
    return f" ({names.pop()})" if len(names) == 1 else ""


def _shots(results: Json) -> str:
    """The unit, and the number of shots where the settings say at how many the curves were evaluated."""
    runs = [run for members in results["methods"].values() for run in members]
    shots = {(run.get("settings") or {}).get("curve_shots") for run in runs} - {None}
    return f" (0 to 100{f', {shots.pop()}-shot' if len(shots) == 1 else ''})"


FIGURES: "dict[str, Callable[[Json], tuple[Figure, str, str] | None]]" = {
    "icl": _icl,
    "format_share": _format_share,
    "target": _target,
    "tradeoff": _tradeoff,
}
