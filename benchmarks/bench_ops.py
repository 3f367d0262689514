"""Each operator against vLLM's, mamba-ssm's and the bytes and operations that it cannot do without.

    python benchmarks/bench_ops.py --shape 9b
    python benchmarks/bench_ops.py --shape tiny --tokens 64 --batches 2    # on a CPU

A speed-up is printed and recorded only for an operator whose tests pass and whose output, at these sizes and on this
device, agrees with the package's reference.
"""

import argparse
import inspect
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
from op_cases import CASES, OURS, VLLM, Case
from op_inputs import Problem
from rows import Results, add_arguments, dtype_name, dtype_of, progress
from timing import Limits, Samples, interleaved, measure_limits

TESTS = pathlib.Path(__file__).parent.parent / "tests" / "ops"
CHECKED_TOKENS = 300  # more than one chunk; the reference walks token by token
CHECKED_ROWS = 9  # as few as suffice for what is done for larger batches


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--shape", choices=["9b", "tiny"], default="9b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 8192], help="prompt lengths")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128, 256], help="decode batches")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on a GPU, float32 without")
    parser.add_argument("--state-dtype", default="auto", help="of the SSM state; auto: as --dtype")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls of each implementation")
    parser.add_argument(
        "--tests",
        choices=["run", "skip"],
        default="run",
        help="run tests/ops/test_<op>.py before timing; skip: rely on the comparison with the reference alone",
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    for name in ("tokens", "batches"):
        if min(getattr(args, name)) < 1:
            parser.error(f"--{name} must be positive")
    if args.repeats < 1:
        parser.error("--repeats must be positive")
    return args


def tests_pass(operator: str) -> bool:
    """Run the operator's own tests in a process of their own."""
    file = TESTS / f"test_{operator}.py"
    if not file.is_file():
        progress(f"{operator}: {file.relative_to(TESTS.parent.parent)} is missing, which counts as red")
        return False
    progress(f"{operator}: running its tests")
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(file)], capture_output=True, text=True)
    if run.returncode:
        print(run.stdout[-2000:] + run.stderr[-2000:], file=sys.stderr)
    return run.returncode == 0


def wrong_ones(build: Callable[[Problem], Case], problem: Problem) -> dict[str, str]:
    """Implementations whose outputs are wrong on a small problem, each with what is wrong.

    An error against the fp64 reference may be twice that of the same plain code in the problem's own precision, and
    what the case says of its states.
    """

    def fresh() -> Case:  # the same random inputs each time: calls overwrite them
        return build(Problem(problem.shape, problem.tokens, problem.dtype, problem.state_dtype, problem.seed))

    case = fresh()
    truth = case.reference(torch.float64)
    scale = truth.abs().max().item()
    limit = 2 * (case.reference(problem.dtype) - truth).abs().max().item() / scale + 8 * _epsilon(problem)
    limit += case.rounding
    wrong = {}
    for implementation in case.calls:
        y = fresh().calls[implementation]()
        error = (y.double() - truth).abs().max().item() / scale
        if not error <= limit:  # NaN is wrong too
            wrong[implementation] = f"is off by {error:.1e} (limit {limit:.1e})"
    return wrong


def _epsilon(problem: Problem) -> float:
    return max(torch.finfo(problem.dtype).eps, torch.finfo(problem.state_dtype).eps)


def underneath(name: str) -> str:
    """Whose code our operator runs: "vllm" while its backend module calls vLLM's operators, else "own"."""
    operator = CASES[name][0]
    package = sys.modules[f"vllm_bamba.ops.{operator}"]
    backends = {module for f in vars(package).values() if (module := inspect.getmodule(f)) is not None}
    backends = {m for m in backends if m.__name__.startswith(f"vllm_bamba.ops.{operator}.")}
    names = [getattr(f, "__module__", None) or "" for m in backends for f in vars(m).values() if callable(f)]
    return "vllm" if any("vllm.model_executor.layers.mamba.ops" in module for module in names) else "own"


def record(
    results: Results, name: str, problem: Problem, times: dict[str, Samples], case: Case, limits: Limits, verified: str
) -> None:
    """Write and print one problem's rows; a speed-up only if `verified`."""
    phase = CASES[name][1]
    size = {"prompt_tokens": problem.tokens} if phase == "prefill" else {"batch": problem.tokens}
    green = not verified.startswith("RED")
    common = {"case": name, "verified": verified, **size}
    floor = limits.floor_ms(case.bytes_moved, case.operations)
    print(f"\n{name}, {problem.tokens} {'tokens' if phase == 'prefill' else 'sequences'} ({verified})")
    for variant, samples in times.items():
        bandwidth = case.bytes_moved / samples.median / 1e6
        code = underneath(name) if variant == OURS else variant
        details = f"code {code}; {case.bytes_moved} bytes; {case.operations} operations; cold cache"
        results.add_samples(samples, variant=variant, metric="time", unit="ms", details=details, **common)
        print(
            f"  {variant:12} {samples.median:9.4f} ms  ({samples.low:.4f} to {samples.high:.4f})"
            f"  {bandwidth:8.1f} GB/s  {floor / samples.median:6.1%} of the limit"
        )
    reached = f"{limits.bytes_per_second / 1e9:.0f} GB/s and {limits.flops / 1e12:.2f} TFLOP/s, measured in this run"
    results.add(variant="floor", metric="time", unit="ms", value=floor, repeats=1, details=reached, **common)
    print(f"  {'floor':12} {floor:9.4f} ms")
    if not green:
        print("  no speed-up is reported: the operator is not verified")
        return
    for other in (v for v in times if v != OURS):
        ratio = times[other].median / times[OURS].median
        low, high = times[other].low / times[OURS].high, times[other].high / times[OURS].low
        within = low <= 1 <= high
        same = ", our operator runs vLLM's code underneath: expect 1" if underneath(name) == other == VLLM else ""
        results.add(
            variant=OURS,
            metric=f"speed_up_over_{other}",
            unit="ratio",
            value=ratio,
            low=low,
            high=high,
            repeats=times[OURS].count,
            details=f"code {underneath(name)}; {'within' if within else 'beyond'} the spread",
            **common,
        )
        print(f"  {ratio:.2f}x {other}{' (within the spread)' if within else ''}{same}")


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    dtype = dtype_of(args.dtype)
    state_dtype = dtype if args.state_dtype == "auto" else dtype_of(args.state_dtype)
    results = Results.of(
        "bench_ops",
        args,
        list(argv),
        model=f"bamba-{args.shape}",
        weights="random inputs",
        dtype=dtype_name(dtype),
        state_dtype=dtype_name(state_dtype),
        cache_mode="none",
    )
    progress("measuring what this device reaches")
    limits = measure_limits(dtype, seed=args.seed)
    tested: dict[str, bool] = {}
    for name in args.ops:
        operator, phase, build = CASES[name]
        if args.tests == "run" and operator not in tested:
            tested[operator] = tests_pass(operator)
        small = Problem.of(
            args.shape, CHECKED_TOKENS if phase == "prefill" else CHECKED_ROWS, dtype, state_dtype, args.seed
        )
        wrong = ", ".join(f"{which} {what}" for which, what in wrong_ones(build, small).items())
        verified = f"agrees with the reference, tests {'green' if args.tests == 'run' else 'not run'}"
        if wrong or not tested.get(operator, True):
            verified = f"RED: {wrong or 'the tests of ' + operator + ' do not pass'}"
        for tokens in args.tokens if phase == "prefill" else args.batches:
            progress(f"{name}: {tokens} {'tokens' if phase == 'prefill' else 'sequences'}")
            problem = Problem.of(args.shape, tokens, dtype, state_dtype, args.seed)
            case = build(problem)
            record(results, name, problem, interleaved(case.calls, args.repeats, args.seed), case, limits, verified)
    progress(f"rows are in {results.file}")


if __name__ == "__main__":
    main(sys.argv[1:])
