"""The plots and tables of what bench.py, e2e.py, quality.py and solver.py have found; no figure is typed by hand.

    python benchmarks/render.py

For every file of theirs in benchmarks/results this draws docs/NAME.png (quality.py draws for itself), and
rewrites what the README and the pages of docs have between

    <!-- begin benchmarks/results/NAME.csv -->
    <!-- end benchmarks/results/NAME.csv -->

Of rows that measured the same thing the last counts.
"""

import json
import re
from pathlib import Path

import record
from record import RESULTS, ROOT

DOCS = ROOT / "docs"
BASELINES = ("copy", "fill", "dense", "eager", "compile", "reference")  # providers that are no kernels of ours
FLUX = ("flux, sd3", "flux-dev")


def latest(path: Path) -> list[dict]:
    """Read a file of results, the last row of each that measured the same; nothing of another benchmark's file."""
    rows = record.read(path)
    if not rows or not {"provider", "method"} & rows[0].keys() or "p50_ms" not in rows[0]:
        return []
    return list({record.case(row): row for row in rows}.values())


def table(head: list[str], body: list[list[str]]) -> str:
    """Print a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quoted(label: str) -> str:
    """Quote the method in a label of `record.label`, not its switches."""
    method, *switches = label.split(", ")
    return ", ".join([f"`{method}`", *switches])


def find(rows: list[dict], **wanted) -> dict | None:
    """Return the first row whose columns have one of the values that are wanted; None without one."""
    return next((row for row in rows if all(row[key] in value for key, value in wanted.items())), None)


def values(rows: list[dict], key: str) -> list[str]:
    """List a column's values, numbers in order."""
    unique = dict.fromkeys(row[key] for row in rows if row[key])
    return sorted(unique, key=int) if all(value.isdigit() for value in unique) else list(unique)


def origin(rows: list[dict]) -> str:
    """Say where, when and with which versions rows were measured."""
    row = rows[-1]
    versions = [f"torch {row['torch']}", *([f"Triton {row['triton']}"] if row["cuda"] else [])]
    device = f"{row['device']}, {row['isa']}" if row["isa"] else row["device"]
    commits = " and ".join(values(rows, "commit"))
    return f"{device}; {', '.join(versions)}; commit {commits}; {row['date']}"


# ---- kernels ----


def kernels_on_cpu(rows: list[dict]) -> str:
    """Print the tables of bench.py's rows on a CPU."""
    timed = [row for row in rows if row["p50_ms"] and row["batch"] == "1" and row["model"] in FLUX]
    native = [row for row in timed if row["provider"] == "native"]
    sizes = [size for size in values(native, "pixels") if size in ("1024", "2048")] or values(native, "pixels")
    columns = [(dtype, threads) for dtype in values(native, "dtype") for threads in values(native, "threads")]
    body, floors = [], []
    for op in values(native, "op"):
        timings = [row for row in native if row["op"] == op]
        cells = []
        for dtype, threads in columns:
            by_size = [find(timings, pixels=(size,), dtype=(dtype,), threads=(threads,)) for size in sizes]
            cells.append(" / ".join(f"{float(row['eager_ratio']):.1f}" for row in by_size if row))
        body.append([f"`{op}`", *cells])
        single = [find(timings, pixels=(size,), dtype=("float32",), threads=("1",)) for size in sizes]
        filled = [row for row in single if row]
        grown = [find(rows, op=(op,), provider=(provider,), p50_ms=("",)) for provider in ("native", "eager")]
        dense = find(timed, op=(op,), provider=("dense",), pixels=("1024",), threads=("1",))
        beside = dense and find(timings, pixels=("1024",), dtype=("float32",), threads=("1",))
        if filled and filled[0]["fill_fraction"]:
            floors.append([
                f"`{op}`", " / ".join(f"{1 / float(row['fill_fraction']):.1f}" for row in filled),
                *(f"{float(row['memory']):.1f}" if row else "" for row in grown),
                f"{float(dense['p50_ms']) / float(beside['p50_ms']):.0f}" if beside else "",
            ])  # fmt: skip
    names = [f"{dtype}, {threads} thread{'s' if threads != '1' else ''}" for dtype, threads in columns]
    parts = [
        f"Times faster than eager PyTorch, images of {' / '.join(sizes)} pixels:", table(["", *names], body),
        "Compiled, float32, one thread:",
        table(["", "time over that of its random numbers alone", "memory grown, over the output", "eager's",
               "the release's dense covariance, over it"], floors),
    ]  # fmt: skip
    return "\n\n".join(parts if floors else parts[:2])


def kernels_on_gpu(rows: list[dict]) -> str:
    """Print the table of bench.py's rows on a GPU."""
    sizes = [size for size in values(rows, "pixels") if size in ("1024", "2048")] or values(rows, "pixels")
    usual = [row for row in rows if row["batch"] == "1" and row["model"] in FLUX and row["dtype"] != "float16"]
    head, body = ["", ""], []
    for size in sizes:
        head += [f"µs at {size}", "of a copy's bandwidth", "over eager", "over compile"]
    for op in values(usual, "op"):
        timings = [row for row in usual if row["op"] == op]
        dtype = "bfloat16" if "bfloat16" in values(timings, "dtype") else timings[0]["dtype"]
        for provider in (provider for provider in values(timings, "provider") if provider not in BASELINES):
            cells = []
            for size in sizes:
                row, compiled = (
                    find(timings, provider=(name,), pixels=(size,), dtype=(dtype,)) for name in (provider, "compile")
                )
                over = f"{float(compiled['p50_ms']) / float(row['p50_ms']):.1f}" if row and compiled else ""
                cells += [
                    f"{1e3 * float(row['p50_ms']):.1f}", f"{float(row['copy_fraction']):.0%}",
                    f"{float(row['eager_ratio']):.1f}", over,
                ] if row else [""] * 4  # fmt: skip
            body.append([f"`{op}`, {dtype}", provider, *cells])
    return "Images of FLUX, one in a batch; times faster than eager PyTorch and `torch.compile`:\n\n" + table(
        head, body
    )


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


# ---- whole images ----


def images(rows: list[dict], path: Path) -> str:
    """Print the tables of e2e.py's rows, and of the files beside them that explain them."""
    parts = []
    for model in values(rows, "model"):
        runs = [row for row in rows if row["model"] == model]
        batches, (first, *_) = values(runs, "batch"), runs
        body = []
        for label in dict.fromkeys(map(record.label, runs)):
            by_batch = sorted((row for row in runs if record.label(row) == label), key=lambda row: int(row["batch"]))
            row = by_batch[0]
            factors = ""
            if row["tflop"]:
                rate = float(row["tflop_per_s"]) / float(first["tflop_per_s"])
                share = float(row["transformer_share"]) / float(first["transformer_share"])
                factors = f"{float(row['flop_ratio']):.2f} × {rate:.2f} × {share:.2f}"
            body.append([
                quoted(label), row["calls"], f"{float(row['p50_ms']) / 1e3:.2f}", f"{float(row['speedup']):.2f}",
                factors, f"{float(row['outside_share']):.1%}",
                " / ".join(f"{float(one['images_per_s']):.2f}" for one in by_batch), row["peak_mib"],
            ])  # fmt: skip
        head = ["", "calls", "seconds", "speed-up", "= less work × rate × share", "outside the models"]
        head += [f"images/s in batches of {' / '.join(batches)}", "peak MiB"]
        parts += [f"`{model}`, {first['pixels']} pixels, {first['dtype']}:", table(head, body)]
        profile = path.with_name(f"{path.stem}-{model}.json")
        if profile.exists():
            parts += why(json.loads(profile.read_text()))
    return "\n\n".join(parts)


def why(profile: dict) -> list[str]:
    """Print the tables of one of e2e.py's explanations."""
    kinds = list(next(iter(profile["stages"].values()))["shares"])
    body = [
        [name, f"{1e3 * stage['tflop']:.3g}", f"{stage['ms']:.3g}", f"{1e3 * stage['tflop_per_s']:.3g}",
         *(f"{stage['shares'][kind]:.0%}" for kind in kinds)]
        for name, stage in profile["stages"].items()
    ]  # fmt: skip
    fixed, rate = profile["fixed_ms_per_call"], 1e3 * profile["tflop_per_s_beyond"]
    line = f"A transformer call: {fixed:.3g} ms however few its tokens, beyond that {rate:.3g} GFLOP/s (a line's fit)."
    parts = [line, table(["", "GFLOP", "ms", "GFLOP/s", *kinds], body)]
    calls = profile["ms_per_call"]
    if switched := [label for label in calls if ", " in label]:
        tokens = sorted({count for by_count in calls.values() for count in by_count}, key=int)
        times = [
            [quoted(label), *(f"{calls[label][count]:.3g}" if count in calls[label] else "" for count in tokens)]
            for label in switched
        ]
        parts.append(table(["ms a call", *(f"{count} tokens" for count in tokens)], times))
    return parts


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


# ---- what the images are worth ----


MEASURES = {"distance": "distance", "frechet": "Fréchet", "edge_error": "edge error", "blockiness": "blockiness"}


def quality(path: Path) -> str:
    """Print the table of a file of quality.py's."""
    rows = record.read(path)
    columns = {"drift": "drift", "flop_ratio": "less work", "seconds": "seconds"}
    columns = {name: title for name, title in columns.items() if any(row.get(name) for row in rows)}
    body = [
        [f"`{row['method']}`", f"{row['score']} ({row['score_low']} to {row['score_high']})",
         *(f"{row[name]} ± {row[f'{name}_se']}" for name in MEASURES), *(row[name] for name in columns)]
        for row in rows
    ]  # fmt: skip
    head = ["", "score", *MEASURES.values(), *columns.values()]
    row = rows[-1]
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    counts = ", ".join([f"{row['captions']} captions", f"seeds {row['seeds']}", *filter(None, [row.get("dtype")])])
    line = f"{counts}; torch {row['torch']}; commit {row['commit']}; {row['date']} ([{path.name}]({name}))."
    return f"{line}\n\n{table(head, body)}"


def draw_quality(rows: list[dict], path: Path):
    """Draw quality against work, a curve a method, with 95 % intervals; the grey line is what chance alone does."""
    import matplotlib.pyplot as plt

    (reference, chance), rows = rows[:2], rows[2:]
    step = float(reference["tflop"]) / int(re.search(r"\d+", reference["method"])[0])
    curves = values(rows, "curve")
    figure, grid = plt.subplots(1, 3, figsize=(15, 6), layout="constrained")
    for axes, name in zip(grid, ("frechet", "edge_error", "distance"), strict=True):
        for k, curve in enumerate(curves):
            of = sorted((float(row["tflop"]) / step, row) for row in rows if row["curve"] == curve)
            heights, errors = ([float(row[name + end]) for _, row in of] for end in ("", "_se"))
            plain, dashed = curve.startswith("fewer steps"), curve.endswith("Euler") or "+" in curve
            style = {"lw": 2.2, "color": "black"} if plain else {"lw": 1.2, "color": f"C{k}"}
            axes.errorbar(
                [work for work, _ in of], heights, [1.96 * error for error in errors], label=curve, **style,
                ls="--" if dashed else "-", marker="s" if "RALU" in curve else "o", ms=4, capsize=2, elinewidth=0.7,
            )  # fmt: skip
        axes.axhline(float(chance[name]), color="grey", lw=0.8)
        axes.set(xscale="log", xlabel="work of the transformer, in steps at full resolution", title=MEASURES[name])
        axes.set_yscale("linear" if name == "distance" else "log")
        axes.set_xticks(ticks := [2, 3, 4, 5, 7, 10, 14, 20, 28, 50], [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    row = rows[0]
    figure.suptitle(
        f"{row['captions']} captions, seeds {row['seeds']}, against {reference['method']}; commit {row['commit']}"
    )
    figure.savefig(path, dpi=100)


def solvers(path: Path) -> str:
    """Of solver.py's file: one line a method, standard deviations 1 / 0.5."""
    rows = record.read(path)
    names = list(rows[0])[2:]
    body = [
        [f"`{method}`", *(" / ".join(f"{100 * float(of[name]):+.1f}" for of in rows if of["method"] == method)
                          for name in names)]
        for method in values(rows, "method")
    ]  # fmt: skip
    return table(["", *(f"`{name}`" for name in names)], body)


def work(path: Path) -> str:
    """Print the tables of work.py's file."""
    rows, parts = record.read(path), []
    head = ["", "counted", "footing", "with attention", "ours", "paper's", "deviation", ""]
    for number, model in dict.fromkeys((row["table"], row["model"] if row["table"] == "1" else "") for row in rows):
        of = [row for row in rows if row["table"] == number and row["model"].startswith(model)]
        body = [
            [row["name"], quoted(row["method"]), f"{row['text_tokens']}, {row['passes']}", row["total"],
             row["ours"] + "×" * bool(row["over"]), row["paper"], f"{float(row['deviation']):+.1%}", row["note"]]
            for row in of
        ]  # fmt: skip
        parts += [f"Table {number}{f', {model}' if model else ''}:", table(head, body)]
    return f"torch {rows[-1]['torch']}; commit {rows[-1]['commit']}; {rows[-1]['date']}.\n\n" + "\n\n".join(parts)


def skipped(path: Path) -> str:
    """Print the table of a file of caches.py's: a line a cache, of each model the last row of it."""
    rows = {(row["model"], row["cache"]): row for row in record.read(path)}
    models, caches = (list(dict.fromkeys(key[k] for key in rows)) for k in (0, 1))
    cells = {key: f"{float(row['ms']):.1f}, {float(row['share']):.1%} / {float(row['host_share']):.1%}"
             for key, row in rows.items()}  # fmt: skip
    body = [[cache, *(cells.get((model, cache), "") for model in models)] for cache in caches]
    return f"{origin([*rows.values()])}.\n\n{table(['', *(f'`{model}`' for model in models)], body)}"


def pareto(path: Path) -> Path:
    """Name the picture of a file of quality against work."""
    return DOCS / f"{path.stem.replace('-mini', '')}.png"


# ---- the README ----


def block(path: Path) -> str | None:
    """Write what is said of a file of results; None for another benchmark's."""
    if path.name.startswith("quality-"):
        return quality(path)
    if path.name.startswith("pareto-"):
        return f"![Quality against work]({pareto(path).name})\n\n{quality(path)}"
    if path.name in (tables := {"solver-gaussian.csv": solvers, "work.csv": work}):
        return tables[path.name](path)
    if path.name.startswith("caches-"):
        return skipped(path)
    if not (rows := latest(path)):
        return None
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    if "provider" in rows[0]:
        body = (kernels_on_gpu if rows[0]["cuda"] else kernels_on_cpu)(rows)
    else:
        body = images(rows, path)
    return f"{origin(rows)} ([{path.name}]({name})).\n\n{body}\n\n![{path.stem}](docs/{path.stem}.png)"


def rendered(page: str, results: Path = RESULTS) -> str:
    """Return a page with every block as its file has it."""

    def fresh(match):
        path = results / Path(match[2]).name
        return f"{match[1]}\n\n{block(path)}\n\n{match[4]}"

    return re.sub(r"(<!-- begin (\S+\.csv) -->)(.*?)(<!-- end \2 -->)", fresh, page, flags=re.DOTALL)


def main():
    """Draw the plots and rewrite the tables of the README and of docs."""
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        page.write_text(rendered(page.read_text()))
    text = (ROOT / "README.md").read_text()
    for path in sorted(RESULTS.glob("pareto-*.csv")):
        draw_quality(record.read(path), pareto(path))
    for path in sorted(RESULTS.glob("*.csv")):
        if rows := latest(path):
            (draw_kernels if "provider" in rows[0] else draw_images)(rows, DOCS / f"{path.stem}.png")
            if f"<!-- begin benchmarks/results/{path.name} -->" not in text:
                print(f"{path.name}: the README has no place for it; see the top of {Path(__file__).name}")


if __name__ == "__main__":
    main()
