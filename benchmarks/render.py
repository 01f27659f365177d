"""Draw what the benchmarks have found, and write the tables of the README and the pages of docs from it.

    python benchmarks/render.py

For every file of bench.py, e2e.py and quality.py's curves in benchmarks/results this draws docs/NAME.png; what the
pages have of a file is tables.py's.
"""

import re
from pathlib import Path

import record
from record import RESULTS, ROOT
from tables import FLUX, MEASURES, latest, origin, pareto, rendered, values

DOCS = ROOT / "docs"


def draw_kernels(rows: list[dict], path: Path):
    """Draw a panel for an operation and a dtype: bandwidth by shape, a line a provider, 20th to 80th percentile."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["gbps"] and row["model"] in FLUX]
    threads = max((row["threads"] for row in rows), key=lambda count: int(count or 0))
    rows = [row for row in rows if row["threads"] == threads]
    panels = {(row["op"], row["dtype"]): None for row in rows}
    shapes = list(dict.fromkeys((int(row["pixels"]), int(row["batch"])) for row in rows))
    shapes.sort(key=lambda shape: (shape[0] ** 2 * shape[1], shape[0]))
    providers = values(rows, "provider")
    columns = min(2, len(panels))
    figure = Figure(figsize=(5.5 * columns, 2.6 * -(-len(panels) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    for axes, (op, dtype) in zip(grid, panels, strict=False):
        for provider in providers:
            line = {(int(row["pixels"]), int(row["batch"])): row for row in rows
                    if (row["op"], row["dtype"], row["provider"]) == (op, dtype, provider)}  # fmt: skip
            x = [i for i, shape in enumerate(shapes) if shape in line]
            p20, p50, p80 = ([float(line[shapes[i]][f"{q}_ms"]) for i in x] for q in ("p20", "p50", "p80"))
            middle = [float(line[shapes[i]]["gbps"]) for i in x]
            colour = "black" if provider == "copy" else f"C{providers.index(provider)}"
            axes.plot(x, middle, "o-", color=colour, markersize=3, label=provider)
            bounds = [[m * b / q for m, b, q in zip(middle, p50, edge, strict=True)] for edge in (p80, p20)]
            axes.fill_between(x, *bounds, color=colour, alpha=0.2, linewidth=0)
        axes.set(title=f"{op}, {dtype}", yscale="log", ylabel="GB/s", xticks=range(len(shapes)))
        axes.set_xticklabels([f"{pixels}px\n×{batch}" for pixels, batch in shapes], fontsize=7)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    lines = {line.get_label(): line for axes in grid for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=len(lines), frameon=False)
    figure.supxlabel(f"{origin(rows)}{f'; {threads} threads' if threads else ''}", fontsize=7)
    figure.savefig(path, dpi=110)


def draw_images(rows: list[dict], path: Path):
    """Draw a panel for a model: the smallest batch's runs, cut into their parts."""
    from matplotlib.figure import Figure

    models, parts = values(rows, "model"), ("transformer", "text", "preview", "decode", "outside")
    first = {model: [row for row in rows if row["model"] == model] for model in models}
    first = {model: [row for row in runs if row["batch"] == values(runs, "batch")[0]] for model, runs in first.items()}
    heights = [len(runs) for runs in first.values()]
    figure = Figure(figsize=(9, 0.28 * sum(heights) + 0.9 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), squeeze=False, height_ratios=heights).flatten()
    for axes, (model, runs) in zip(grid, first.items(), strict=True):
        names, left = [record.label(row) for row in runs], [0.0] * len(runs)
        for part in parts:
            seconds = [float(row[f"{part}_ms"]) / 1e3 for row in runs]
            axes.barh(names, seconds, left=left, label=part)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        for name, end, row in zip(names, left, runs, strict=True):
            axes.annotate(f" {float(row['speedup']):.2f}×", (end, name), va="center", fontsize=7)
        axes.invert_yaxis()
        axes.set(title=f"{model}, {runs[0]['pixels']} pixels, batch {runs[0]['batch']}", xlabel="seconds")
        axes.margins(x=0.1)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(parts), frameon=False)
    figure.supxlabel(origin(rows), fontsize=7)
    figure.savefig(path, dpi=110)


def draw_quality(rows: list[dict], path: Path):
    """Draw quality against work, a curve a method, with 95 % intervals; of several seeds a grey line is chance."""
    import matplotlib.pyplot as plt

    chance = next((row for row in rows if row["method"].endswith(", other seeds")), None)
    reference, rows = rows[0], [row for row in rows[1:] if row is not chance]
    step = float(reference["tflop"]) / int(re.search(r"\d+", reference["method"])[0])
    curves = values(rows, "curve")
    bases = {curve: curve.removeprefix("RALU + ").removesuffix(", ab2") for curve in curves}  # of one colour
    colours = [base for base in dict.fromkeys(bases.values()) if not base.startswith(("fewer steps", "converged"))]
    figure, grid = plt.subplots(1, 3, figsize=(15, 6), layout="constrained")
    for axes, name in zip(grid, ("frechet", "edge_error", "distance"), strict=True):
        for curve in curves:
            of = sorted((float(row["tflop"]) / step, row) for row in rows if row["curve"] == curve)
            heights, errors = ([float(row[name + end]) for _, row in of] for end in ("", "_se"))
            plain, dashed = curve.startswith("fewer steps"), curve.endswith("Euler") or "+" in curve
            dotted = not plain and curve.endswith(", ab2")
            style = {"lw": 2.2, "color": "black"} if plain else {"lw": 1.2, "color": f"C{colours.index(bases[curve])}"}
            axes.errorbar(
                [work for work, _ in of], heights, [1.96 * error for error in errors], label=curve, **style,
                ls="--" if dashed else ":" if dotted else "-", marker="s" if "RALU" in curve else "o", ms=4,
                capsize=2, elinewidth=0.7,
            )  # fmt: skip
        if chance:
            axes.axhline(float(chance[name]), color="grey", lw=0.8)
        axes.set(xscale="log", xlabel="work of the transformer, in steps at full resolution", title=MEASURES[name])
        if name != "distance":  # nothing below chance is told apart, and 0 is there
            axes.set_yscale("symlog", linthresh=float(chance["frechet"]) if chance else 1e-3)
            axes.set_ylim(bottom=0)
        axes.set_xticks(ticks := [2, 3, 4, 5, 7, 10, 14, 20, 28, 50], [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
    figure.legend(
        *grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, handlelength=4
    )
    row = rows[0]
    figure.suptitle(f"{row['captions']} captions, seeds {row['seeds']}, against {reference['method']}")
    figure.savefig(path, dpi=100)


def main():
    """Draw the plots and rewrite the tables of the README and of docs."""
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        page.write_text(rendered(page.read_text()))
    for path in sorted(RESULTS.glob("pareto-*.csv")):
        draw_quality(record.read(path), DOCS / pareto(path))
    text = "".join(page.read_text() for page in DOCS.glob("*.md"))
    for path in sorted(RESULTS.glob("*.csv")):
        if rows := latest(path):
            (draw_kernels if "provider" in rows[0] else draw_images)(rows, DOCS / f"{path.stem}.png")
            if f"<!-- begin benchmarks/results/{path.name} -->" not in text:
                print(f"{path.name}: no page of docs has a place for it; see the top of tables.py")


if __name__ == "__main__":
    main()
