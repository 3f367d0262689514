"""Serving speed and start-up, measured by vLLM's own commands: `vllm bench serve`, `throughput`, `latency`, `startup`.

    python benchmarks/bench_serving.py serve throughput latency startup --shape 9b
    python benchmarks/bench_serving.py serve --shape 9b --datasets prefix --prefixes 256 1024 4096 --cache-mode align
    python benchmarks/bench_serving.py serve --model examples/bamba-tiny --models bamba granite --num-prompts 8

Each model of `--models` gets the same requests in the same run: this plugin's Bamba, the hybrid that vLLM ships at the
same dimensions, and Llama at the same width and depth. Weights are random with --shape; with --model, `granite` is the
same checkpoint rewritten, and its answers must be the same.
"""

import argparse
import json
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from load import Requests, longest, requests
from rows import Results, add_arguments, dtype_name, dtype_of, progress
from shapes import MODELS, write_granite_twin, write_model
from startup import import_seconds, stages
from timing import Samples
from vllm_cli import prefix_cache_counters, run, server

METRICS, PERCENTILES = ("ttft", "tpot", "itl", "e2el"), (50, 90, 99)
VARIANTS = {"bamba": "vllm_bamba", "granite": "vllm_granite_hybrid", "llama": "vllm_llama"}


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["serve", "throughput", "latency", "startup"])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=pathlib.Path, help="folder of a Bamba checkpoint")
    source.add_argument("--shape", choices=["9b", "tiny"], default="9b", help="random weights of this shape")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--num-prompts", type=int, default=200, help="requests of a serve or throughput run")
    parser.add_argument("--input", type=int, default=1024, help="prompt tokens")
    parser.add_argument("--output", type=int, default=128, help="generated tokens")
    serve = parser.add_argument_group("serve")
    serve.add_argument("--datasets", nargs="+", choices=["random", "prefix", "multi_turn"], default=["random"])
    serve.add_argument("--rates", nargs="*", type=float, default=[1, 4, 16], help="requests a second")
    serve.add_argument("--concurrencies", nargs="*", type=int, default=[1, 8, 64], help="requests in flight")
    serve.add_argument("--prefixes", nargs="+", type=int, default=[256, 1024, 4096], help="shared prompt tokens")
    serve.add_argument("--num-prefixes", type=int, default=10, help="different shared prefixes")
    serve.add_argument("--conversations", type=int, default=16)
    serve.add_argument("--turns", type=int, default=6)
    serve.add_argument("--growth", type=int, default=278, help="tokens by which a conversation grows each turn")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128, 256], help="latency: batch sizes")
    parser.add_argument("--iterations", type=int, default=10, help="latency: timed batches")
    parser.add_argument("--cold", type=int, default=1, help="startup: starts with empty caches")
    parser.add_argument("--warm", type=int, default=2, help="startup: starts with filled caches")
    parser.add_argument(
        "--fill", type=int, default=1, help="startup: untimed starts that fill the caches for the warm ones"
    )
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on a GPU, float32 without")
    parser.add_argument("--state-dtype", default="auto", help="of the SSM state; auto: what each engine has by default")
    parser.add_argument(
        "--cache-mode",
        choices=["none", "align", "slots"],
        default="none",
        help="prefix caching off, vLLM's own, or, for this plugin's model, prefix-aware slots",
    )
    parser.add_argument("--engine-args", default="", help="more of vLLM's flags, as one string: --engine-args='--x 1'")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a server to get ready")
    parser.add_argument("--logs", type=pathlib.Path, help="folder for vLLM's output (default: a temporary one)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what vLLM would refuse minutes later."""
    if args.model and not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: there is no config.json in that folder")
    if min(args.num_prompts, args.input, args.output, args.growth, *args.batches, args.iterations) < 1:
        parser.error("numbers of requests and tokens must be positive")
    if min(args.cold, args.warm) < 1 or args.fill < 0:
        parser.error("startup: vllm bench needs at least one cold and one warm start")
    if any(rate <= 0 for rate in args.rates) or any(c < 1 for c in args.concurrencies):
        parser.error("--rates and --concurrencies must be positive")
    if "serve" in args.what and not (args.rates or args.concurrencies):
        parser.error("serve needs --rates or --concurrencies")
    if "prefix" in args.datasets and args.num_prompts < 2 * args.num_prefixes:
        parser.error("--datasets prefix: --num-prompts must be at least twice --num-prefixes, or nothing is shared")
    if "latency" in args.what and args.model:
        vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
        if vocabulary < 10000:
            parser.error(f"latency: vLLM draws token ids below 10000 and this model has {vocabulary}; use --shape tiny")


@dataclass
class Bench:
    """One run of this script."""

    args: argparse.Namespace
    results: Results
    work: pathlib.Path
    texts: dict[int, list[str]]  # request set -> the first model's answers

    def model_folder(self, model: str) -> pathlib.Path:
        folder = self.work / model
        if self.args.model is None:
            return write_model(folder, model, self.args.shape)
        if model == "llama":
            return write_model(folder, model, self.args.model)
        return self.args.model if model == "bamba" else write_granite_twin(self.args.model, folder)

    def engine_flags(self, model: str) -> list[str]:
        args = self.args
        flags = ["--dtype", dtype_name(dtype_of(args.dtype)), "--max-model-len", str(longest(self.args))]
        flags += ["--seed", str(args.seed)]
        if args.model is None or model == "llama":
            flags += ["--load-format", "dummy"]
        caching = args.cache_mode != "none"
        flags.append("--enable-prefix-caching" if caching else "--no-enable-prefix-caching")
        if model != "llama":
            flags += ["--mamba-ssm-cache-dtype", args.state_dtype]
            flags += ["--mamba-cache-mode", "align"] if caching else []
        if model == "bamba" and caching:
            flags += ["--additional-config", json.dumps({"bamba_prefix_slots": args.cache_mode == "slots"})]
        return flags + shlex.split(args.engine_args)

    def add(self, model: str, **columns: Any) -> None:
        random = self.args.model is None or model == "llama"
        common = {"variant": VARIANTS[model], "model": self.model_name(model)}
        common |= {"weights": "random" if random else "checkpoint", "details": shlex.join(self.engine_flags(model))}
        mode = self.args.cache_mode
        common["cache_mode"] = "align" if mode == "slots" and model != "bamba" else mode
        if model == "bamba" and self.args.state_dtype == "auto":
            common["state_dtype"] = "auto"  # as `vllm_bamba.step_options` says of the GPU
        self.results.add(**common | {"verified": "n/a: random weights" if random else "n/a"} | columns)

    def model_name(self, model: str) -> str:
        source = self.args.shape if self.args.model is None else self.args.model.name
        return f"{model}-{source}"

    def serve(self, model: str) -> None:
        folder = self.model_folder(model)
        with server(folder, self.engine_flags(model), self.work / f"{model}-server.log", self.args.timeout) as url:
            for number, asked_for in enumerate(requests(self.args, folder, self.work)):
                self._load(model, folder, url, number, asked_for)

    def _load(self, model: str, folder: pathlib.Path, url: str, number: int, asked_for: Requests) -> None:
        name = f"{model}-serve-{number}"
        before = prefix_cache_counters(url)
        command = ["bench", "serve", "--base-url", url, "--model", str(folder), *asked_for.flags]
        command += ["--seed", str(self.args.seed + number), "--ignore-eos", "--temperature", "0"]
        command += ["--percentile-metrics", ",".join(METRICS), "--save-result", "--save-detailed"]
        command += ["--metric-percentiles", ",".join(map(str, PERCENTILES))]
        command += ["--result-dir", str(self.work), "--result-filename", f"{name}.json"]
        run(command, self.work / f"{name}.log")
        result = json.loads((self.work / f"{name}.json").read_text())
        asked, had = (after - b for after, b in zip(prefix_cache_counters(url), before, strict=True))
        columns = asked_for.columns | {"output_tokens": self.args.output, "repeats": result["completed"]}
        columns["verified"] = self.compare(model, number, result)
        for metric in METRICS:
            for p in PERCENTILES:
                self.add(model, metric=f"{metric}_p{p}", value=result[f"p{p}_{metric}_ms"], unit="ms", **columns)
        for metric, unit in (("output_throughput", "tokens/s"), ("request_throughput", "requests/s")):
            self.add(model, metric=metric, value=result[metric], unit=unit, **columns)
        if self.args.cache_mode != "none":
            rate = had / asked if asked else 0.0
            self.add(model, metric="prefix_cache_hit_rate", value=rate, unit="ratio", **columns)
        print(
            f"{model:8} {columns['case']:10} prefix {columns.get('shared_prefix', '-'):>5}  rate {columns['rate']:>5}  "
            f"concurrency {columns['concurrency']:>9}  TTFT {result['p50_ttft_ms']:.1f} ms  "
            f"TPOT {result['p50_tpot_ms']:.2f} ms  {result['output_throughput']:.1f} tokens/s  ({columns['verified']})"
        )

    def compare(self, model: str, number: int, result: dict[str, Any]) -> str:
        """Whether all requests were answered, and as the first model answered them."""
        if result["failed"]:
            return f"RED: {result['failed']} requests failed"
        if self.args.model is None or model == "llama":
            return "all answered; random weights, answers not comparable"
        texts = result["generated_texts"]
        expected = self.texts.setdefault(number, texts)
        if expected is texts:
            return "all answered; the answers that others are compared with"
        same = sum(a == b for a, b in zip(texts, expected, strict=True))
        return f"same text in {same} of {len(texts)} requests"

    def throughput(self, model: str) -> None:
        args, out = self.args, self.work / f"{model}-throughput.json"
        command = ["bench", "throughput", "--model", str(self.model_folder(model)), "--dataset-name", "random"]
        command += ["--random-input-len", str(args.input), "--random-output-len", str(args.output)]
        command += ["--num-prompts", str(args.num_prompts), "--output-json", str(out), *self.engine_flags(model)]
        run(command, out.with_suffix(".log"))
        result = json.loads(out.read_text())
        columns = {"case": "offline throughput", "prompt_tokens": args.input, "output_tokens": args.output}
        columns |= {"repeats": result["num_requests"]}
        self.add(model, metric="total_throughput", value=result["tokens_per_second"], unit="tokens/s", **columns)
        self.add(model, metric="request_throughput", value=result["requests_per_second"], unit="requests/s", **columns)
        print(f"{model:8} offline throughput {result['tokens_per_second']:.1f} tokens/s, prompts counted")

    def latency(self, model: str) -> None:
        args, folder = self.args, self.model_folder(model)
        for batch in args.batches:
            out = self.work / f"{model}-latency-{batch}.json"
            command = [
                "bench",
                "latency",
                "--model",
                str(folder),
                "--batch-size",
                str(batch),
                "--output-json",
                str(out),
            ]
            command += ["--input-len", str(args.input), "--output-len", str(args.output), *self.engine_flags(model)]
            command += ["--num-iters", str(args.iterations), "--num-iters-warmup", "2"]
            run(command, out.with_suffix(".log"))
            samples = Samples(tuple(json.loads(out.read_text())["latencies"]))
            columns = {"case": "offline latency", "batch": batch, "prompt_tokens": args.input}
            columns |= {"output_tokens": args.output, "low": samples.low, "high": samples.high}
            self.add(model, metric="latency", value=samples.median, unit="s", repeats=samples.count, **columns)
            print(f"{model:8} latency of a batch of {batch}: {samples.median:.3f} s")

    def startup(self, model: str) -> None:
        args, out = self.args, self.work / f"{model}-startup.json"
        command = ["bench", "startup", "--model", str(self.model_folder(model)), "--output-json", str(out)]
        command += [
            "--num-iters-cold",
            str(args.cold),
            "--num-iters-warmup",
            str(args.fill),
            "--num-iters-warm",
            str(args.warm),
        ]
        log = run([*command, *self.engine_flags(model)], out.with_suffix(".log"))
        for case, stage, seconds in stages(json.loads(out.read_text()), log, args.fill, import_seconds()):
            columns = {"low": seconds.low, "high": seconds.high, "repeats": seconds.count, "case": f"{case} start"}
            self.add(model, metric=f"startup_{stage}", value=seconds.median, unit="s", **columns)
            print(f"{model:8} {case} start, {stage:14} {seconds.median:8.2f} s")


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    dtype = dtype_of(args.dtype)
    state_dtype = dtype if args.state_dtype == "auto" else dtype_of(args.state_dtype)
    results = Results.of(
        "bench_serving",
        args,
        list(argv),
        dtype=dtype_name(dtype),
        state_dtype=dtype_name(state_dtype),
    )
    with tempfile.TemporaryDirectory() as temporary:
        work = args.logs or pathlib.Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, results, work, {})
        for what in args.what:
            for number, model in enumerate(args.models):
                progress(f"{what}: {model} ({number + 1} of {len(args.models)})")
                getattr(bench, what)(model)
    progress(f"rows are in {results.file}")


if __name__ == "__main__":
    main(sys.argv[1:])
