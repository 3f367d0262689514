"""The result rows: one measured number a row, every column filled, one CSV file a device."""

import argparse
import csv
import datetime
import functools
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

import vllm_bamba

FOLDER = pathlib.Path(__file__).parent / "results"
NOT_APPLICABLE = "n/a"  # pandas reads it as NaN
COLUMNS = (
    *("benchmark", "variant", "model", "weights", "case", "batch", "prompt_tokens", "output_tokens"),
    *("shared_prefix", "rate", "concurrency", "metric", "value", "unit", "low", "high", "repeats"),
    *("verified", "details", "dtype", "state_dtype", "cache_mode", "seed", "device", "driver"),
    *("vllm", "torch", "transformers", "vllm_bamba", "commit", "command", "run", "time"),
)
OPTIONAL = ("batch", "prompt_tokens", "output_tokens", "shared_prefix", "rate", "concurrency", "low", "high")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=pathlib.Path, default=FOLDER, help="folder of the CSV files")
    parser.add_argument("--commit", help="commit to record where the checkout has no .git (default: ask git)")


@functools.cache
def device_name() -> str:
    """The GPU, or the processor and the cores that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    cores = usable_cores()
    return f"{names[0] if names else platform.machine()} CPU, {cores} core{'s' if cores > 1 else ''}"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def results_file(folder: pathlib.Path) -> pathlib.Path:
    """`folder`/<device>.csv."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-") + ".csv")


@functools.cache
def _driver() -> str:
    if not torch.cuda.is_available():
        return NOT_APPLICABLE
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def _commit() -> str:
    """The checkout's commit, with -modified where package or benchmarks differ from it."""
    here = pathlib.Path(__file__).parent.parent

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "vllm_bamba", "benchmarks/*.py").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("-modified" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit("the checkout has no git history to name its commit: pass --commit") from None


def _what_matters(argv: list[str]) -> list[str]:
    """Arguments without those that only say where rows and logs go and from which commit."""
    kept, rest = [], iter(argv)
    for argument in rest:
        if argument in ("--results", "--commit", "--logs"):
            next(rest)
        elif not argument.startswith(("--results=", "--commit=", "--logs=")):
            kept.append(argument)
    return kept


@dataclass
class Results:
    """Appends rows to the device's CSV file as they are measured, so that a broken run keeps what it had.

    Attributes:
        common: columns that are the same in all rows of this run.
    """

    benchmark: str
    folder: pathlib.Path
    common: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, benchmark: str, args: argparse.Namespace, argv: list[str], **common: Any) -> "Results":
        now = datetime.datetime.now(datetime.UTC)
        return cls(
            benchmark,
            args.results,
            {
                "seed": args.seed,
                "device": device_name(),
                "driver": _driver(),
                "vllm": vllm_bamba.installed_vllm(),
                "torch": torch.__version__,
                "transformers": metadata.version("transformers"),
                "vllm_bamba": vllm_bamba.__version__,
                "commit": args.commit or _commit(),
                "command": shlex.join(["python", f"benchmarks/{benchmark}.py", *_what_matters(argv)]),
                "run": f"{now:%Y%m%dT%H%M%S}-{os.getpid()}",
            }
            | common,
        )

    @property
    def file(self) -> pathlib.Path:
        return results_file(self.folder)

    def add(self, **values: Any) -> None:
        """Append one row.

        Raises:
            ValueError: a column is unknown, or empty although it must be known.
        """
        row = dict.fromkeys(OPTIONAL, NOT_APPLICABLE) | {"benchmark": self.benchmark} | self.common | values
        row["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        unknown, empty = set(row) - set(COLUMNS), [name for name in COLUMNS if row.get(name) in (None, "")]
        if unknown or empty:
            raise ValueError(f"result row: unknown columns {sorted(unknown)}, empty columns {empty}")
        new = not self.file.is_file()
        if new:
            self.folder.mkdir(parents=True, exist_ok=True)
        elif self.file.open().readline().strip() != ",".join(COLUMNS):
            raise SystemExit(f"{self.file} has other columns than this version writes: move it away")
        with self.file.open("a", newline="") as out:
            writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({name: _text(row[name]) for name in COLUMNS})

    def add_samples(self, samples: Any, **values: Any) -> None:
        """Append one row with the median, the spread and the number of `timing.Samples`."""
        self.add(value=samples.median, low=samples.low, high=samples.high, repeats=samples.count, **values)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def progress(message: str) -> None:
    """One line on stderr with the time of day, so that a long run shows where it is."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {message}", file=sys.stderr, flush=True)


def dtype_of(name: str) -> torch.dtype:
    """`torch.dtype` by its name; "auto" is bfloat16 on a GPU and float32 without."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise SystemExit(f"unknown dtype {name!r}: try bfloat16, float16 or float32")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
