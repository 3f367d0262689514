"""Draw the result rows: PNGs from the CSV files alone, and only what there are rows for.

    python benchmarks/plot.py                      # every CSV file in benchmarks/results
    python benchmarks/plot.py benchmarks/results/nvidia-h200.csv

Backgrounds are transparent and every colour stands out from white and from a dark page alike. Of a measurement that was
repeated on another day the latest run is drawn, also if states had another precision by default then.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from rows import COLUMNS, FOLDER, NOT_APPLICABLE

TEXT = "#7d8590"
COLOURS = {
    "vllm_bamba": "#2f81f7",
    "transformers": "#c2730a",
    "transformers_torch": "#a67c00",
    "vllm": "#8e6bdc",
    "vllm_granite_hybrid": "#8e6bdc",
    "vllm_llama": "#2a9d5c",
    "vllm_operators": "#c2559d",
    "vllm_operators_align": "#c2730a",
    "vllm_operators_slots": "#6a8f1a",
    "fused": "#d9534f",
    "fused_int8": "#2f81f7",
    "fused_slots": "#118fa3",
    "mamba_ssm": "#d9534f",
    "roofline": TEXT,
    "floor": TEXT,
}
STAGES = {
    "import": "#2f81f7",
    "weights": "#2a9d5c",
    "compile": "#c2730a",
    "warm_up": "#d9534f",
    "graph_capture": "#8e6bdc",
    "other": TEXT,
}
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": TEXT,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
WHAT = ["benchmark", "variant", "model", "case", "batch", "prompt_tokens", "output_tokens", "shared_prefix", "rate"]
WHAT += ["concurrency", "metric", "dtype", "state_dtype", "cache_mode"]


def load(file: pathlib.Path) -> pd.DataFrame:
    """The rows of one device, each measurement's latest.

    Raises:
        SystemExit: the file is not one that `rows.py` wrote.
    """
    rows = pd.read_csv(file, na_values=[NOT_APPLICABLE], keep_default_na=False)
    if list(rows.columns) != list(COLUMNS):
        raise SystemExit(f"{file} does not have the columns of a result file")
    what = rows[WHAT].astype(str)
    what.loc[rows.benchmark == "bench_decode", "output_tokens"] = ""  # by how many tokens a step was measured
    what.loc[rows.benchmark.isin(["bench_transformers", "bench_serving"]), "state_dtype"] = ""  # the default's
    return rows[~what.duplicated(keep="last")]


def numbers(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows whose `column` is a number, ordered by it."""
    values = pd.to_numeric(rows[column], errors="coerce")
    return rows.assign(**{column: values})[values.notna()].sort_values(column, kind="stable")


def lines(axes: Axes, rows: pd.DataFrame, x: str) -> bool:
    """One line a variant over `x`, with the spread where there is one; False without rows."""
    rows = numbers(rows, x)
    for variant, points in rows.groupby("variant", sort=False):
        colour = COLOURS.get(str(variant), TEXT)
        style = "--" if variant in ("roofline", "floor") else "o-"
        axes.plot(points[x], points["value"], style, color=colour, label=str(variant))
        low, high = (pd.to_numeric(points[c], errors="coerce") for c in ("low", "high"))
        axes.fill_between(points[x], low, high, color=colour, alpha=0.2, linewidth=0)
    if rows.empty:
        return False
    axes.set_xscale("log", base=2)
    ticks = sorted(rows[x].unique())
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.legend()
    return True


def throughput(axes: Axes, rows: pd.DataFrame) -> bool:
    """Decode throughput against batch, at the shortest prompt measured, below the roofline."""
    rows = numbers(
        rows[(rows.benchmark == "bench_transformers") & (rows.metric == "decode_throughput")], "prompt_tokens"
    )
    if rows.empty:
        return False
    rows = rows[rows.prompt_tokens == rows.prompt_tokens.min()]
    axes.set(xlabel="batch", ylabel="decode, tokens/s", yscale="log")
    axes.set_title(f"Decode throughput, prompts of {rows.prompt_tokens.min():g} tokens")
    return lines(axes, rows, "batch")


def speed_up(axes: Axes, rows: pd.DataFrame) -> bool:
    """Every speed-up over others that was recorded, as a bar from 1 with its spread, likes beside each other."""
    among_ours = rows.metric == "speed_up_over_fused"
    rows = rows[rows.metric.str.startswith("speed_up_over_") & ~among_ours].copy()
    if rows.empty:
        return False
    rows["other"] = rows.metric.str.removeprefix("speed_up_over_")
    sizes = ("prompt_tokens", "batch")
    rows = rows.sort_values(
        ["other", "variant", "case", *sizes],
        key=lambda column: pd.to_numeric(column, errors="coerce") if column.name in sizes else column,
    )
    labels = rows.apply(_speed_up_label, axis=1)
    low, high = (pd.to_numeric(rows[c], errors="coerce").fillna(rows.value) for c in ("low", "high"))
    axes.barh(labels, rows.value - 1, left=1, color=rows.other.map(lambda other: COLOURS.get(other, TEXT)))
    axes.errorbar(rows.value, labels, xerr=[rows.value - low, high - rows.value], fmt="none", ecolor=TEXT, capsize=3)
    axes.set_xlim(0, 1.15 * max(1.0, rows.value.max()))  # a spread may be wider than the plot
    axes.axvline(1, color=TEXT)
    axes.invert_yaxis()
    axes.figure.set_size_inches(10, 1.2 + 0.28 * len(rows))  # type: ignore[union-attr]
    axes.tick_params(axis="y", labelsize=8)  # long labels leave little for the bars
    axes.set_title("Speed-up: times as fast")
    return True


def _speed_up_label(row: pd.Series) -> str:
    work = [] if pd.isna(row.batch) else [f"batch {float(row.batch):g}"]
    if pd.notna(row.prompt_tokens):
        work.append(f"{str(row.prompt_tokens).removesuffix('.0')} tokens")
    who = "" if row.variant == "vllm_bamba" else f"{row.variant}: "
    return f"{who}{row['case']}, {', '.join(work)}, over {row.other}"


def shared_prefix(axes: Axes, rows: pd.DataFrame) -> bool:
    """Median TTFT of requests alone against the length of the prefix that they share."""
    axes.set(xlabel="shared prefix, tokens", ylabel="TTFT, median, ms")
    axes.set_title("Time to first token, requests alone")
    alone = (rows.benchmark == "bench_prefix") & (rows.case == "shared prefix") & (rows.metric == "ttft")
    return lines(axes, rows[alone], "shared_prefix")


def served_prefix(axes: Axes, rows: pd.DataFrame) -> bool:
    """Tokens a second of servers with prefix caching, at the most requests at once, against what these share."""
    served = (rows.benchmark == "bench_serving") & (rows.case == "prefix") & (rows.metric == "output_throughput")
    served = numbers(rows[served & (rows.cache_mode != "none")], "concurrency")
    most = served.concurrency.max()
    axes.set(xlabel="shared prefix, tokens", ylabel="output, tokens/s")
    axes.set_title(f"Server with prefix caching, {most:g} requests at once")
    drawn = lines(axes, served[served.concurrency == most], "shared_prefix")
    axes.set_ylim(bottom=0)
    return drawn


def prefill(axes: Axes, rows: pd.DataFrame) -> bool:
    """Prefill throughput against prompt length at the smallest batch measured."""
    rows = numbers(rows[(rows.benchmark == "bench_transformers") & (rows.metric == "prefill_throughput")], "batch")
    if rows.empty:
        return False
    rows = rows[rows.batch == rows.batch.min()]
    axes.set(xlabel="prompt, tokens", ylabel="prefill, tokens/s")
    axes.set_title(f"Prefill throughput, batch {rows.batch.min():g}")
    return lines(axes, rows, "prompt_tokens")


def decode(axes: Axes, rows: pd.DataFrame) -> bool:
    """Tokens a second of whole engines by the clock, below what the bytes allow."""
    rows = _of_one_length(rows)
    rows = numbers(rows[rows.metric == "decode_step"], "batch").drop_duplicates(["variant", "batch"], keep="last")
    rows = rows[rows.batch.duplicated(keep=False)]  # of a batch with nothing to compare there is nothing to see
    if rows.batch.nunique() < 2:  # no line
        return False
    return _tokens_per_second(axes, rows, "Decode by the clock")


def decode_kernels(axes: Axes, rows: pd.DataFrame) -> bool:
    """Tokens a second of whole decode steps, were there nothing but their kernels, below what the bytes allow."""
    rows = _of_one_length(rows)
    of_kernels = rows.metric == "decode_step_kernels"
    if not of_kernels.any():
        return False
    return _tokens_per_second(
        axes, numbers(rows[of_kernels | (rows.variant == "floor")], "batch"), "Decode: kernels of whole steps"
    )


def _of_one_length(rows: pd.DataFrame) -> pd.DataFrame:
    """Decode steps of prompts of one length."""
    return rows[(rows.benchmark == "bench_decode") & (rows["case"] == "decode step")]


def _tokens_per_second(axes: Axes, steps: pd.DataFrame, title: str) -> bool:
    """Of rows whose values are milliseconds of a decode step."""
    slow, fast = (pd.to_numeric(steps[c], errors="coerce") for c in ("high", "low"))
    of_step = 1e3 * steps.batch
    axes.set(xlabel="batch", ylabel="tokens/s", yscale="log")
    axes.set_title(f"{title}; floor: with bf16 states written every step")
    return lines(axes, steps.assign(value=of_step / steps.value, low=of_step / slow, high=of_step / fast), "batch")


def decode_operator(axes: Axes, rows: pd.DataFrame) -> bool:
    """The operators between a mixer's projections against batch: vLLM's, and of ours the fastest launch."""
    rows = numbers(rows[(rows.benchmark == "tune_mixer_step") & (rows.metric == "time")], "batch")
    if rows.empty:
        return False
    theirs = rows[rows.variant == "vllm"].drop_duplicates("batch")
    ours = rows[rows.variant != "vllm"].sort_values("value").drop_duplicates(["batch", "state_dtype"])
    floors = ours.assign(value=ours.details.str.extract(r"floor ([\d.]+) ms", expand=False).astype(float))
    axes.plot(theirs.batch, theirs.value, "o-", color=COLOURS["vllm"], label="vLLM, 16-bit states")
    for of, name, style in ((ours, "fused", "-"), (floors, "floor of its bytes", "--")):
        for state, points in of.sort_values("batch").groupby("state_dtype", sort=False):
            bits = {"int8": "8-bit", "float32": "32-bit"}.get(str(state), "16-bit")
            colour = COLOURS["fused_int8" if bits == "8-bit" else "fused"]
            axes.plot(points.batch, points.value, f"o{style}", color=colour, label=f"{name}, {bits} states")
    ticks = sorted(rows.batch.unique())
    axes.set(xlabel="batch", ylabel="ms a layer", yscale="log", xscale="log")
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_title("Decode: convolution and state update of one layer")
    axes.legend()
    return True


def startup(axes: Axes, rows: pd.DataFrame) -> bool:
    """Stages of a start, stacked, for each model cold and warm."""
    rows = rows[rows.metric.str.startswith("startup_")]
    if rows.empty:
        return False
    table = rows.assign(stage=rows.metric.str.removeprefix("startup_"), start=rows.variant + "\n" + rows["case"])
    table = table.pivot_table(index="start", columns="stage", values="value", sort=False)
    left = pd.Series(0.0, index=table.index)
    for stage in (s for s in STAGES if s in table):
        seconds = table[stage].fillna(0)
        axes.barh(table.index, seconds, left=left, color=STAGES[stage], label=stage.replace("_", " "))
        left += seconds
    axes.invert_yaxis()
    axes.legend(ncols=-(-len(STAGES) // 2), loc="upper center", bbox_to_anchor=(0.5, -0.18))
    axes.set(xlabel="seconds")
    axes.set_title("Start-up")
    return True


PLOTS: dict[str, Callable[[Axes, pd.DataFrame], bool]] = {
    "throughput": throughput,
    "speed_up": speed_up,
    "ttft_shared_prefix": shared_prefix,
    "server_shared_prefix": served_prefix,
    "prefill": prefill,
    "decode": decode,
    "decode_kernels": decode_kernels,
    "decode_operator": decode_operator,
    "startup": startup,
}


def draw(file: pathlib.Path) -> list[pathlib.Path]:
    """Draw what the rows of `file` allow; returns the PNGs, which lie beside it."""
    rows, written = load(file), []
    for name, plot in PLOTS.items():
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(8, 4.5))
            if plot(axes, rows):
                png = file.with_name(f"{file.stem}-{name}.png")
                versions = ", ".join(sorted(rows.vllm.unique()))
                caption = f"{rows.device.iloc[-1]}; vLLM {versions}; rows, with commits: {file.name}"
                figure.text(0.01, 0.005, caption, fontsize=8, color=TEXT)
                figure.tight_layout(rect=(0, 0.03, 1, 1))
                figure.savefig(png, dpi=144, transparent=True)
                written.append(png)
                print(png)
            else:
                print(f"{name}: no rows in {file.name}, not drawn", file=sys.stderr)
            plt.close(figure)
    return written


def main(argv: Sequence[str]) -> list[pathlib.Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="CSV files (default: all in benchmarks/results)")
    args = parser.parse_args(argv)
    files = args.files or sorted(FOLDER.glob("*.csv"))
    if not files:
        parser.error(f"there are no CSV files in {FOLDER}: run a benchmark first")
    for file in files:
        if not file.is_file():
            parser.error(f"{file} does not exist")
    return [png for file in files for png in draw(file)]


if __name__ == "__main__":
    main(sys.argv[1:])
