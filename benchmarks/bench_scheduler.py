"""What a step takes of the scheduler's process where no prefix is found: vLLM's scheduler and ours, caching or not.

    python benchmarks/bench_scheduler.py
    python benchmarks/bench_scheduler.py --together
    python benchmarks/bench_scheduler.py --modes vllm_align slots --profile /tmp/scheduler

vLLM's real scheduler and cache managers run at Bamba-9B's geometry, without a model and on no GPU. Each mode is an
engine that generates for as many requests as a batch has: one that ends makes room for the next, no two prompts begin
alike, and the cache has been filled before. A step is what `schedule` and `update_from_output` take; the engines take
turns.
"""

import argparse
import cProfile
import gc
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rows import Results, add_arguments, progress
from simulator import Geometry, Simulator
from timing import Samples
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

import vllm_bamba

# mode -> whose scheduler, how prefixes are cached, what the simulator is asked for
MODES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vllm_none": ("vllm", "none", {"caching": False, "slots": False}),
    "vllm_align": ("vllm", "align", {"slots": False}),
    "none": ("vllm_bamba", "none", {"caching": False}),
    "slots": ("vllm_bamba", "slots", {}),
    "anchored": ("vllm_bamba", "anchored slots", {"anchored": True}),
}
CHUNKS = 8192  # tokens of a step


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=[*MODES], default=[*MODES])
    parser.add_argument("--batch", type=int, default=128, help="requests that run")
    parser.add_argument("--blocks", type=int, default=12_000, help="of the cache; of 6.2 MiB each")
    parser.add_argument("--prompt", type=int, default=600, help="tokens")
    parser.add_argument("--answer", type=int, default=400, help="tokens")
    parser.add_argument("--together", action="store_true", help="all requests of a batch start, and end, at once")
    parser.add_argument("--synchronous", action="store_true", help="schedule a step when the one before is done")
    parser.add_argument("--steps", type=int, default=48, help="that an engine makes in its turn")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--profile", type=pathlib.Path, help="folder: write what Python's profiler sees, and no rows")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if min(args.batch, args.blocks, args.prompt, args.answer, args.steps, args.turns) < 1:
        parser.error("numbers of requests, blocks, tokens, steps and turns must be positive")
    return args


class Busy(Simulator):
    """An engine whose batch is always full.

    Attributes:
        wall: milliseconds of the steps.
        cpu: milliseconds of this process in them.
    """

    def __init__(self, args: argparse.Namespace, mode: str):
        longest = max(2048, args.prompt + args.answer)
        geometry = Geometry(blocks=args.blocks, max_tokens=longest, max_batch=CHUNKS, max_requests=args.batch)
        super().__init__(geometry, asynchronous=not args.synchronous, **MODES[mode][2])
        self.args, self.tokens = args, random.Random(args.seed)
        self.profiler = cProfile.Profile() if args.profile else None
        self.wall: list[float] = []
        self.cpu: list[float] = []
        for _ in range(-(-args.blocks // (geometry.mamba_groups + 1))):  # each leaves a state and its text
            self._ask(1)
        self.finish()
        for i in range(args.batch):
            self._ask(args.answer if args.together else 1 + i * args.answer // args.batch)
        while self.scheduler.waiting:
            self.step()
        for method in (self.scheduler.schedule, self.scheduler.update_from_output):
            setattr(self.scheduler, method.__name__, self._timed(method))

    def keep_busy(self, steps: int) -> None:
        """Make this many steps."""
        for _ in range(steps):
            missing = self.args.batch - self.scheduler.get_num_unfinished_requests()
            if missing and (not self.args.together or missing == self.args.batch):
                for _ in range(missing):
                    self._ask(self.args.answer)
            self.wall.append(0.0)
            self.cpu.append(0.0)
            self.step()

    def _ask(self, answer: int) -> None:
        self.add([self.tokens.randrange(3, 500) for _ in range(self.args.prompt)], answer)

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            if self.profiler:
                self.profiler.enable()
            cpu, wall = time.process_time(), time.perf_counter()
            result = method(*args)
            self.wall[-1] += (time.perf_counter() - wall) * 1e3
            self.cpu[-1] += (time.process_time() - cpu) * 1e3
            if self.profiler:
                self.profiler.disable()
            return result

        return timed

    def _run(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Compute nothing: requests whose prompt is done get a token."""
        names = list(output.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[] if request.is_prefill_chunk else [3] for request in requests],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )


def measure(args: argparse.Namespace) -> dict[str, Busy]:
    """The engines, with the times of their steps."""
    engines = {}
    for mode in args.modes:
        progress(f"{mode}: filling the cache")
        engines[mode] = Busy(args, mode)
    gc.collect()
    gc.freeze()  # as an engine does when it has started
    order = random.Random(args.seed)
    for turn in range(args.turns):
        progress(f"turn {turn + 1} of {args.turns}")
        for mode in order.sample(args.modes, len(args.modes)):
            engines[mode].keep_busy(args.steps)
    gc.unfreeze()
    return engines


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    vllm_bamba.register()
    results = Results.of(
        "bench_scheduler", args, list(argv), model="bamba-9b", weights="none", batch=args.batch,
        case="batch starts at once" if args.together else "batch always full", prompt_tokens=args.prompt,
        output_tokens=args.answer, dtype="bfloat16", state_dtype="bfloat16", verified="n/a: no model",
    )  # fmt: skip
    print("caching      median     mean      p99   of the process: median     mean   [ms of a step]")
    for mode, engine in measure(args).items():
        wall, cpu = Samples(tuple(engine.wall)), Samples(tuple(engine.cpu))
        mean, p99 = statistics.mean(wall.values), sorted(wall.values)[wall.count * 99 // 100]
        cpu_mean = statistics.mean(cpu.values)
        print(f"{mode:10} {wall.median:8.2f} {mean:8.2f} {p99:8.2f} {cpu.median:24.2f} {cpu_mean:8.2f}", flush=True)
        if engine.profiler:  # which slows down what it sees: no rows
            args.profile.mkdir(parents=True, exist_ok=True)
            engine.profiler.dump_stats(args.profile / f"{mode}.prof")
            continue
        details = f"mean {mean:.3f}, p99 {p99:.3f}; of the process: median {cpu.median:.3f}, mean {cpu_mean:.3f}"
        variant, cache_mode, _ = MODES[mode]
        columns = {"variant": variant, "cache_mode": cache_mode, "details": details}
        results.add_samples(wall, metric="scheduler_step", unit="ms", **columns)
    progress(f"profiles are in {args.profile}" if args.profile else f"rows are in {results.file}")


if __name__ == "__main__":
    main(sys.argv[1:])
