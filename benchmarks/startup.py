"""Where the seconds of a start go, from the JSON and the log of `vllm bench startup`.

| stage | from |
|---|---|
| import | a process of its own that imports `vllm.LLM`, as happens before vLLM's clock starts |
| weights | the log: building the model and loading its weights |
| compile | the JSON: torch.compile, or loading its cache |
| warm_up | the log: the first run of the model, in which kernels are compiled and tuned |
| graph_capture | the log: CUDA graphs |
| other | the rest of vLLM's total: importing plugin and model, configuration, memory for the cache |
| total | import and vLLM's total |

A stage that the log does not mention (CPU engines name fewer) is left out and its seconds are in `other`.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from timing import Samples

END_OF_START = re.compile(r"init engine \(profile, create kv cache, warmup model\) took")
IN_LOG = {
    "weights": re.compile(r"Model loading took .* and ([\d.]+) seconds"),
    "warm_up": re.compile(r"Initial profiling/warmup run took ([\d.]+) s"),
    "graph_capture": re.compile(r"Graph capturing finished in ([\d.]+) secs"),
}
PARTS_OF_WEIGHTS = (  # where there is no line for the whole
    re.compile(r"Initializing model took ([\d.]+) seconds"),
    re.compile(r"Loading weights took ([\d.]+) seconds"),
)
IMPORT = """
import time
start = time.perf_counter()
from vllm import LLM
print(time.perf_counter() - start)
"""


def import_seconds() -> float:
    """Time of importing vLLM in a fresh process.

    Raises:
        SystemExit: the import failed.
    """
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"importing vLLM failed:\n{run.stderr[-2000:]}")
    return float(run.stdout.split()[-1])


def stages(result: dict[str, Any], log: str, filling_starts: int, imports: float) -> Iterator[tuple[str, str, Samples]]:
    """Yield ("cold" or "warm", stage, seconds of each start).

    Args:
        result: JSON of `vllm bench startup`.
        log: its output; starts follow each other: the cold ones, those that fill the caches, the warm ones.
        filling_starts: number of those in between, which are not timed.
        imports: seconds of `import_seconds`.

    Raises:
        SystemExit: log and JSON tell of different numbers of starts.
    """
    starts = END_OF_START.split(log)[:-1]
    cold, warm = (result[f"{case}_startup_times"] for case in ("cold", "warm"))
    if len(starts) != len(cold) + filling_starts + len(warm):
        raise SystemExit(
            f"vllm bench startup made {len(cold)} + {filling_starts} + {len(warm)} starts "
            f"but its log shows {len(starts)}"
        )
    for case, totals, logs in (("cold", cold, starts[: len(cold)]), ("warm", warm, starts[-len(warm) :])):
        found = {stage: values for stage, values in _from_logs(logs).items() if values}
        found["compile"] = result[f"{case}_compilation_times"]
        named = [sum(values) for values in zip(*found.values(), strict=True)]
        found["import"] = [imports] * len(totals)
        found["other"] = [total - part for total, part in zip(totals, named, strict=True)]
        found["total"] = [imports + total for total in totals]
        for stage, values in found.items():
            yield case, stage, Samples(tuple(values))


def _from_logs(logs: list[str]) -> dict[str, list[float]]:
    """Stage -> seconds in each start; an empty list unless every start names the stage."""
    found = {}
    for stage, pattern in IN_LOG.items():
        values = [sum(map(float, pattern.findall(log))) for log in logs]
        if stage == "weights" and not all(values):
            values = [sum(float(v) for part in PARTS_OF_WEIGHTS for v in part.findall(log)) for log in logs]
        found[stage] = values if all(values) else []
    return found
