"""The benchmarks measure: rows are written, every column is filled, and what is compared gives the same tokens.

How fast anything is says nothing here: the models are tiny and the machine may be busy.
"""
# ruff: noqa: E402  the benchmarks are scripts beside each other, found after the path is set

import csv
import gzip
import itertools
import json
import pathlib
import shutil
import sys
from typing import ClassVar

import pytest
import torch

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_accuracy
import bench_decode
import bench_ops
import bench_prefix
import bench_scheduler
import bench_serving
import bench_transformers
import rows
import shapes
import startup
import timing
import variants
from parity import Engine, assert_same, save_random
from transformers import AutoTokenizer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the benchmarks themselves")
ENGINE = "--enforce-eager --kv-cache-memory-bytes 67108864 --max-num-seqs 4"


@pytest.fixture(autouse=True)
def one_thread_limits(monkeypatch):
    """Measuring the device's limits is tried once, in its own test."""
    limits = timing.Limits(bytes_per_second=1e9, flops=1e9)
    for module in (bench_decode, bench_ops, bench_transformers):
        monkeypatch.setattr(module, "measure_limits", lambda *_, **__: limits)


def read(folder: pathlib.Path, benchmark: str) -> list[dict[str, str]]:
    """Rows of one benchmark, all columns there and filled, all values numbers."""
    with rows.results_file(folder).open() as file:
        found = [row for row in csv.DictReader(file) if row["benchmark"] == benchmark]
    assert found
    for row in found:
        assert tuple(row) == rows.COLUMNS
        assert all(row.values()), f"empty columns in {row}"
        # a step is the difference of two answers, which on a busy machine may be anything
        assert float(row["value"]) >= 0 or row["metric"] == "decode_step"
        assert row["commit"] == "smoke"
        assert row["command"].startswith(f"python benchmarks/{benchmark}.py ")
    return found


def values(found: list[dict[str, str]], column: str) -> set[str]:
    return {row[column] for row in found}


def common(folder: pathlib.Path) -> list[str]:
    return ["--results", str(folder), "--commit", "smoke"]


def test_ops_are_timed_against_vllms_and_the_floor(tmp_path, capsys):
    sizes = ["--shape", "tiny", "--tokens", "40", "--batches", "2", "--repeats", "2", "--tests", "skip"]
    bench_ops.main([*sizes, *common(tmp_path)])
    found = read(tmp_path, "bench_ops")
    assert values(found, "case") == set(bench_ops.CASES)
    for case in bench_ops.CASES:
        of_case = [row for row in found if row["case"] == case]
        assert values(of_case, "variant") == {"vllm_bamba", "vllm", "floor"}
        assert values(of_case, "metric") == {"time", "speed_up_over_vllm"}
    assert all(row["verified"].startswith("agrees with the reference") for row in found)
    assert "of the limit" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["tests are red", "output is wrong"])
def test_ops_that_are_not_verified_get_no_speed_up(what, tmp_path, monkeypatch, capsys):
    arguments = ["--ops", "gated_norm_step", "--shape", "tiny", "--batches", "2", "--repeats", "2"]
    if what == "tests are red":
        monkeypatch.setattr(bench_ops, "tests_pass", lambda operator: False)
    else:
        build = bench_ops.CASES["gated_norm_step"][2]

        def broken(problem):
            case = build(problem)
            right = case.calls[bench_ops.OURS]
            case.calls[bench_ops.OURS] = lambda: right() * 1.01
            return case

        monkeypatch.setitem(bench_ops.CASES, "gated_norm_step", ("gated_norm", "decode", broken))
        arguments += ["--tests", "skip"]
    bench_ops.main([*arguments, *common(tmp_path)])
    found = read(tmp_path, "bench_ops")
    assert values(found, "metric") == {"time"}
    assert all(row["verified"].startswith("RED") for row in found)
    assert "no speed-up is reported" in capsys.readouterr().out


def test_transformers_and_this_plugin_give_the_same_tokens(tmp_path, tiny):
    work = ["--batches", "2", "--prompts", "20", "--output", "4", "--repeats", "1"]
    mixed = ["--mixed", "4", "--mixed-lengths", "3", "30", "--static-batch", "2"]
    bench_transformers.main(["--model", tiny, "--eager", *work, *mixed, *common(tmp_path)])
    found = read(tmp_path, "bench_transformers")
    assert values(found, "variant") == {"transformers_torch", "vllm_bamba", "roofline"}
    ours = [row for row in found if row["variant"] == "vllm_bamba"]
    assert values(ours, "verified") == {"same tokens in 2 of 2 requests", "same tokens in 4 of 4 requests"}
    assert "speed_up_over_transformers_torch" in values(ours, "metric")
    theirs = [row for row in found if row["variant"] == "transformers_torch"]
    assert all("kernels that ran: none, plain torch; attention sdpa" in row["details"] for row in theirs)
    padding = [row for row in theirs if row["metric"] == "answers_changed_by_padding"]
    assert len(padding) == 1


def test_kernels_that_do_not_run_are_an_error_when_demanded(tiny, tmp_path):
    with pytest.raises(SystemExit, match="did not call mamba_ssm and causal_conv1d"):
        bench_transformers.main(["--model", tiny, "--kernels", "on", *common(tmp_path)])


def test_granite_twin_gives_the_same_tokens(tiny, tmp_path):
    twin = shapes.write_granite_twin(pathlib.Path(tiny), tmp_path)
    prompts = shapes.random_prompts([5, 300, 17], vocab_size=1024, seed=0)
    answers = []
    for model in (tiny, str(twin)):
        with Engine(model, enable_prefix_caching=False) as engine:
            answers.append(engine.answers(prompts, prompt_logprobs=False))
    assert_same(*answers)


@pytest.mark.multiprocess
def test_serving_reports_all_percentiles(tmp_path, tiny):
    model = ["--model", tiny, "--models", "bamba", f"--engine-args={ENGINE}"]
    load = ["--datasets", "prefix", "--prefixes", "32", "--num-prefixes", "2", "--rates", "--concurrencies", "2"]
    sizes = ["--num-prompts", "4", "--input", "16", "--output", "4"]
    bench_serving.main(["serve", *model, *load, *sizes, *common(tmp_path)])
    found = [row for row in read(tmp_path, "bench_serving") if row["case"] == "prefix"]
    expected = {f"{metric}_p{p}" for metric in ("ttft", "tpot", "itl", "e2el") for p in (50, 90, 99)}
    assert values(found, "metric") == expected | {"output_throughput", "request_throughput"}
    assert values(found, "verified") == {"all answered; the answers that others are compared with"}


def test_serving_compares_answers(tmp_path):
    args = bench_serving.arguments(["serve", "--shape", "tiny"])
    args.model = tmp_path
    bench = bench_serving.Bench(args, rows.Results("bench_serving", tmp_path), tmp_path, {})
    answer = {"failed": 0, "generated_texts": ["a", "b"]}
    assert bench.compare("bamba", 0, answer).startswith("all answered")
    assert bench.compare("granite", 0, answer | {"generated_texts": ["a", "c"]}) == "same text in 1 of 2 requests"
    assert bench.compare("granite", 0, answer | {"failed": 1}) == "RED: 1 requests failed"
    assert "not comparable" in bench.compare("llama", 0, answer)


@pytest.mark.multiprocess
@pytest.mark.parametrize("what", ["throughput", "latency", "startup"])
def test_offline_commands_write_rows(what, tmp_path):
    sizes = ["--num-prompts", "2", "--input", "8", "--output", "2", "--batches", "2", "--iterations", "1"]
    starts = ["--cold", "1", "--fill", "0", "--warm", "1"]
    models = ["--shape", "tiny", "--models", "bamba", f"--engine-args={ENGINE}"]
    bench_serving.main([what, *models, *sizes, *starts, *common(tmp_path)])
    found = read(tmp_path, "bench_serving")
    expected = {
        "throughput": {"total_throughput", "request_throughput"},
        "latency": {"latency"},
        "startup": {"startup_import", "startup_weights", "startup_other", "startup_total"},
    }
    assert expected[what] <= values(found, "metric")


@pytest.mark.multiprocess
def test_decode_steps_of_whole_engines(tmp_path, capsys):
    engines = ["--variants", "vllm_operators", "vllm_operators_slots", "--eager"]
    work = ["--prompts", "equal", "mixed", "--batches", "1", "3", "--steps", "64", "--repeats", "3", "--offline", "2"]
    bench_decode.main(["--shape", "tiny", *engines, *work, *common(tmp_path)])
    found = read(tmp_path, "bench_decode")
    for row in found:
        expected = {"vllm_operators_slots": "slots"}.get(row["variant"], "none")
        assert row["cache_mode"] == expected
        assert row["state_dtype"] == "float32"
    steps = [row for row in found if row["metric"] == "decode_step"]
    assert [row["batch"] for row in steps] == ["1"] * 6 + ["3"] * 6, "each batch is written when it is done"
    equal, mixed = ("decode step", "32"), ("decode step, mixed lengths", "32-47")
    assert [(row["case"], row["prompt_tokens"]) for row in steps] == ([equal] * 3 + [mixed] * 3) * 2
    assert [row["variant"] for row in steps] == ["floor", "vllm_operators", "vllm_operators_slots"] * 4
    assert all(" bytes" in row["details"] for row in steps if row["variant"] != "floor")
    speed_ups = [row for row in found if row["metric"] == "speed_up_over_vllm_operators"]
    assert values(speed_ups, "variant") <= {"vllm_operators_slots"}  # none where a step has taken less than nothing
    assert "batch 3, prompts mixed: floor" in capsys.readouterr().out
    runs = [row for row in found if row["case"] == "offline"]
    assert [(row["batch"], row["prompt_tokens"]) for row in runs[::2]] == [
        *(("1", "256"), ("1", "256-257"), ("3", "256"), ("3", "256-261"))
    ]
    assert all(row["metric"] == "throughput" and float(row["value"]) > 0 for row in runs)


def test_bytes_of_a_step_are_those_of_its_states() -> None:
    """Bamba-9B's: 4.2 MB of bf16 states a layer and sequence, read and written, or read and written once in 16."""
    config, bf16 = bench_decode.bamba_config("9b"), torch.bfloat16
    at_least = bench_decode.bytes_moved(config, bf16, bf16)
    moved = {}
    for name in ("vllm_operators", "fused", "fused_int8", "fused_every_step"):
        few, many = (bench_decode.step_bytes(at_least, config, bf16, name, batch, 0) for batch in (1, 101))
        moved[name] = (many - few) / 2900
    state, conv, scales, ring = 128 * 64 * 128, 8448 * 2, 128 * 64 * 4, 16 * (8192 + 128) * 2 + 16 * 128 * 4
    assert moved["vllm_operators"] == 2 * (2 * state + 3 * conv)
    assert moved["fused"] == 2 * state * 17 / 16 + 4 * conv * 5 / 4 + ring * 9 / 16
    assert moved["fused_int8"] == (state + scales) * 17 / 16 + 4 * conv * 5 / 4 + ring * 9 / 16
    assert moved["fused_every_step"] == 4 * state + 4 * conv * 5 / 4


@pytest.mark.multiprocess
def test_shared_prefixes_are_found_and_change_no_token(tmp_path, tiny):
    engines = ["--variants", "vllm_operators", "vllm_operators_slots", "--eager"]
    work = ["--shared", "40", "300", "--own", "20", "--repeats", "2", "--turns", "3", "--turn-generated", "20"]
    bench_prefix.main(["--model", tiny, *engines, *work, *common(tmp_path)])
    found = read(tmp_path, "bench_prefix")
    assert values(found, "metric") == {"ttft", "cached_tokens"}
    assert values(found, "verified") == {"same tokens from all variants in 2 of 2 requests"}
    cached = {"none": [], "slots": []}
    for row in found:
        if row["metric"] == "cached_tokens":
            cached[row["cache_mode"]].append((row["case"], row["shared_prefix"], float(row["value"])))
    assert {value for *_, value in cached["none"]} == {0}
    assert cached["slots"] == [
        ("shared prefix", "40", 0),  # where prompts part there is a slot only if it saves 128 tokens
        ("shared prefix", "300", 288),
        ("chat turn 1", "0", 0),
        ("chat turn 2", "80", 64),  # the last token of an answer is never computed
        ("chat turn 3", "160", 144),
    ]


def test_tokens_of_variants_are_compared():
    def measured(**tokens):
        answers = {name: [variants.Answer(1.0, (1.0,), (0,), ([t],)) for t in given] for name, given in tokens.items()}
        return bench_prefix.Measured(answers)

    same, other = measured(a=[1, 2], b=[1, 2]), measured(a=[1, 2], b=[1, 3])
    assert same.verified(random_weights=True, exact=False) == "same tokens from all variants in 2 of 2 requests"
    assert other.verified(random_weights=True, exact=True) == "n/a: random weights"
    assert other.verified(random_weights=False, exact=False) == "same tokens from all variants in 1 of 2 requests"
    assert other.verified(random_weights=False, exact=True).startswith("RED: same tokens from all variants in 1 of 2")
    assert measured(a=[1]).verified(random_weights=False, exact=True) == "n/a: nothing to compare with"


@pytest.mark.parametrize(
    ("variant", "block", "blocks"),
    [
        ("vllm_operators", 528, 11),
        ("vllm_operators_align", 528, 11),  # no request is as long as a block
        ("vllm_operators_slots", 528, 31),
        ("fused", 608, 11),
        ("fused_slots", 608, 21),
        ("fused_int8", 352, 11),
    ],
)
def test_engines_are_given_the_cache_that_their_requests_need(variant, block, blocks):
    """Bamba-9B in bf16: keys and values of a token are 12 KiB, states are 10 blocks."""
    args = bench_decode.arguments(["--dtype", "bfloat16", "--batches", "128"])
    options = bench_decode.options_of(args, variant, "folder")
    assert options["kv_cache_memory_bytes"] == (128 * blocks + 8) * block * 12 * 1024
    args = bench_decode.arguments(["--cache-gib", "1.5"])
    assert bench_decode.options_of(args, variant, "folder")["kv_cache_memory_bytes"] == 1.5 * 2**30


@pytest.mark.parametrize(("variant", "block", "blocks"), [("vllm_operators", 544, 51), ("fused", 624, 11)])
def test_drafts_need_states_on_vllms_operators_alone(variant, block, blocks):
    args = bench_decode.arguments(["--dtype", "bfloat16", "--batches", "128", "8", "--drafts", "4"])
    options = bench_decode.options_of(args, variant, "folder")
    assert options["kv_cache_memory_bytes"] == (128 * blocks + 8) * block * 12 * 1024
    assert options["speculative_config"]["num_speculative_tokens"] == 4
    assert options["compilation_config"]["cudagraph_capture_sizes"] == [40, 640]


@pytest.mark.multiprocess
def test_an_engine_that_does_not_start_ends_the_run(tmp_path):
    broken = ["--variants", "vllm_operators", "--engine", '{"tensor_parallel_size": 3}']
    with pytest.raises(SystemExit, match="vllm_operators: its engine has ended"):
        bench_decode.main(["--shape", "tiny", *broken, *common(tmp_path)])


def test_startup_stages_add_up():
    start = (
        "Model loading took 18.4 GiB memory and 20.500000 seconds\n"
        "Initial profiling/warmup run took 30.00 s\n"
        "Graph capturing finished in 12 secs, took 1.00 GiB\n"
        "init engine (profile, create kv cache, warmup model) took 60.00 s (compilation: 15.00 s)\n"
    )
    result = {"cold_startup_times": [90.0], "cold_compilation_times": [15.0]}
    result |= {"warm_startup_times": [80.0, 82.0], "warm_compilation_times": [5.0, 6.0]}
    found = {(case, stage): s for case, stage, s in startup.stages(result, start * 4, 1, 10.0)}
    seconds = {stage: samples.median for (case, stage), samples in found.items() if case == "cold"}
    assert seconds.pop("total") == 100.0 == sum(seconds.values())
    assert seconds == {"import": 10, "weights": 20.5, "compile": 15, "warm_up": 30, "graph_capture": 12, "other": 12.5}
    assert found["warm", "total"].values == (90.0, 92.0)
    with pytest.raises(SystemExit, match=r"made 1 \+ 1 \+ 2 starts but its log shows 3"):
        list(startup.stages(result, start * 3, 1, 10.0))


def test_plots_are_drawn_from_the_rows_alone(tmp_path):
    import plot

    file = tmp_path / "amd-epyc-cpu-2-cores.csv"
    shutil.copy(rows.FOLDER / file.name, file)
    drawn = {png.stem.removeprefix(f"{file.stem}-") for png in plot.main([str(file)])}
    assert {"throughput", "prefill", "speed_up", "ttft_shared_prefix"} <= drawn
    assert "startup" not in drawn
    for colour in {plot.TEXT, *plot.COLOURS.values(), *plot.STAGES.values()}:
        for page in ("#ffffff", "#0d1117"):
            assert contrast(colour, page) >= 3, f"{colour} on {page}"


def contrast(left: str, right: str) -> float:
    """WCAG 2 contrast ratio of two colours; 3 is asked of graphics and large text."""

    def luminance(colour: str) -> float:
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted(map(luminance, (left, right)))
    return (light + 0.05) / (dark + 0.05)


def test_rows_with_an_empty_or_unknown_column_are_refused(tmp_path):
    results = rows.Results("bench_ops", tmp_path, {})
    with pytest.raises(ValueError, match="empty columns"):
        results.add(metric="time", value=1.0)
    with pytest.raises(ValueError, match=r"unknown columns \['speed'\]"):
        results.add(speed=1)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (bench_decode.main, ["--batches", "0"], "must be positive"),
        (bench_ops.main, ["--repeats", "0"], "--repeats must be positive"),
        (bench_prefix.main, ["--model", "/nowhere"], "there is no config.json"),
        (bench_prefix.main, ["--own", "0"], "must be positive"),
        (bench_transformers.main, ["--model", "/nowhere"], "there is no config.json"),
        (bench_transformers.main, ["--output", "1"], "--output must be at least 2"),
        (bench_serving.main, ["serve", "--rates", "-1"], "must be positive"),
        (bench_serving.main, ["serve", "--datasets", "prefix", "--num-prompts", "10"], "nothing is shared"),
    ],
)
def test_bad_arguments_are_explained(main, arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_samples_and_limits():
    assert timing.Samples((3.0, 1.0, 2.0)).median == 2.0
    assert (timing.Samples((3.0, 1.0, 2.0)).low, timing.Samples((3.0, 1.0, 2.0)).high) == (1.0, 3.0)
    calls = []
    times = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 5, seed=0, warm_up=0)
    assert sorted(calls) == ["a"] * 5 + ["b"] * 5
    assert calls != ["a"] * 5 + ["b"] * 5, "the variants must be interleaved"
    assert {s.count for s in times.values()} == {5}
    limits = timing.Limits(bytes_per_second=2e9, flops=1e12)
    assert limits.floor_ms(4e6) == 2.0
    assert limits.floor_ms(0, 5e9) == 5.0


def test_kernels_of_a_step_are_what_a_longer_profile_has_more(tmp_path, capsys):
    class Engine:
        """Leaves a trace: 40 us of kernels for the prompts, 100 us for each token, and what is no kernel."""

        name = "fused"
        columns: ClassVar = {"variant": name, "state_dtype": "bfloat16", "cache_mode": "none", "details": "graphs"}
        profiles = 0

        def generate(self, prompts, tokens, profile):
            events = [{"cat": "kernel", "dur": 40.0}, {"cat": "cpu_op", "dur": 9000.0}, {"name": "no category"}]
            events += [{"cat": "kernel", "dur": 100.0}] * tokens
            self.profiles += profile
            folder = tmp_path / "profile" / self.name
            folder.mkdir(parents=True, exist_ok=True)
            with gzip.open(folder / f"rank0.{self.profiles}.pt.trace.json.gz", "wt") as file:
                json.dump({"traceEvents": events}, file)

    argv = ["--profile", str(tmp_path / "profile"), *common(tmp_path)]
    args = bench_decode.arguments(argv)
    what = {"model": "bamba-9b", "weights": "random", "dtype": "bfloat16"}
    results = rows.Results.of("bench_decode", args, argv, output_tokens=32, **what)
    case = bench_decode.Case("mixed", 8, 0, {"fused": 3e8}, timing.Limits(bytes_per_second=4e12, flops=1e12))
    bench_decode.report_kernels(args, results, Engine(), case, itertools.repeat([[1]]))
    (row,) = read(tmp_path, "bench_decode")
    assert (row["metric"], row["case"], row["batch"]) == ("decode_step_kernels", "decode step, mixed lengths", "8")
    assert float(row["value"]) == pytest.approx(0.1)
    assert row["details"] == "graphs; 300000000 bytes, 3000 GB/s, 75% of a copy's"
    with pytest.raises(SystemExit, match="has left no trace"):
        variants.kernel_milliseconds(tmp_path)


def test_prompts_of_long_words_are_not_too_long_for_vllm():
    """It refuses a text of more characters than its tokens times the longest word's."""
    tokenizer = shapes.word_tokenizer(128_256)
    text = tokenizer.decode([128_255] * 100)
    assert tokenizer(text)["input_ids"] == [128_255] * 100
    assert len(text) <= 100 * max(map(len, tokenizer.get_vocab()))


def test_bytes_of_the_9b_shape():
    """9,780,235,392 parameters; 62 MB of bf16 state and 12 KB of KV a sequence and token."""
    moved = shapes.bytes_moved(shapes.bamba_config("9b"), torch.bfloat16, torch.bfloat16)
    assert moved.weights == 2 * (9_780_235_392 - 128256 * 4096)
    assert moved.state == 29 * 2 * (8448 * 3 + 128 * 64 * 128)
    assert moved.kv_per_token == 3 * 2 * 8 * 128 * 2


@pytest.fixture(scope="module")
def readable(tiny, tmp_path_factory) -> list[str]:
    """Options that make a walk of a few seconds: a random model of one Mamba layer, and text that it can read."""
    folder = tmp_path_factory.mktemp("readable")
    one_layer = {"num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_heads": 2, "mamba_d_head": 64}
    model = save_random(folder / "model", vocab_size=1024, **one_layer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pathlib.Path(tiny) / name, model)
    (folder / "text").write_text("A slot holds a checkpoint of the state and a ring of the tokens since.")
    return ["--model", model, "--text", str(folder / "text"), "--tokens", "20", "--texts", "1", "--generated", "4"]


def test_accuracy_judges_every_precision_of_the_state(readable, tmp_path, capsys):
    bench_accuracy.main([*readable, *common(tmp_path)])
    found = read(tmp_path, "bench_accuracy")
    states = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
    kept = {("float32", state, f"replay_{replay}") for state in states for replay in (0, 16)}
    kept.add(("bfloat16", "float32", "replay_0"))
    metrics = {"perplexity", "kl_mean", "kl_p99", "kl_worst"}
    of = {(row["dtype"], row["state_dtype"], row["variant"], row["metric"]): row for row in found}
    assert set(of) == {(*how, metric) for how in kept for metric in metrics}
    assert len(found) == len(of)
    for (dtype, state, variant, _), row in of.items():
        verdict, walk = row["verified"].split("; ")
        if (state, variant) == ("float32", "replay_0"):
            assert verdict == ("reference" if dtype == "float32" else "yardstick")
        else:
            assert verdict in ("pass", "fail")
        assert float(walk.removeprefix("fp32 walks within ").removesuffix(" of Transformers")) <= 1e-4
    kl = {how[1:3]: float(row["value"]) for how, row in of.items() if how[0] == "float32" and how[3] == "kl_mean"}
    assert kl["float32", "replay_0"] == 0
    assert kl["float32", "replay_16"] < 1e-10 < kl["bfloat16", "replay_16"] < kl["bfloat16", "replay_0"]
    assert of["float32", "float32", "replay_16", "kl_mean"]["verified"].startswith("pass")
    assert "reference" in capsys.readouterr().out


def test_accuracy_reports_nothing_where_the_walk_is_not_the_model(readable, tmp_path, monkeypatch):
    def wrong(projected, weights, *rest):
        mixer_step(projected, weights._replace(D=weights.D + 0.01), *rest)

    mixer_step = bench_accuracy.mixer_step
    monkeypatch.setattr(bench_accuracy, "mixer_step", wrong)
    monkeypatch.setattr(bench_accuracy, "CHECKED", 3)
    with pytest.raises(SystemExit, match="the walk is not Transformers' forward pass"):
        bench_accuracy.main([*readable, *common(tmp_path)])
    assert not rows.results_file(tmp_path).exists()


def test_accuracy_says_what_text_it_lacks(readable, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="tokens of text are too few for 1 texts of 4096: pass a longer --text"):
        bench_accuracy.main([*readable, "--tokens", "4096", *common(tmp_path)])
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(SystemExit, match="this Python comes without its documentation"):
        bench_accuracy.main(["--tokens", "20", *common(tmp_path)])


def test_conversations_have_the_tokens_that_they_say(tiny, tmp_path):
    """Also with a tokenizer that does not give back the tokens of any text."""
    file, turns, first, growth = tmp_path / "conversations.jsonl", 3, 40, 60
    assert shapes.write_conversations(file, tiny, 4, turns, first, growth, seed=0) == 4 * turns
    prompts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for turn in range(turns):
        for conversation in range(4):
            prompt = prompts[4 * turn + conversation]
            tokens = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            assert abs(tokens - (first + turn * growth)) <= 3
            assert prompt.startswith(prompts[conversation])


@pytest.mark.parametrize("more", [[], ["--together", "--synchronous"]])
def test_scheduler_is_timed_in_every_mode(more, tmp_path, capsys):
    size = ["--batch", "4", "--blocks", "120", "--prompt", "20", "--answer", "24", "--steps", "30", "--turns", "2"]
    bench_scheduler.main([*size, *more, "--profile", str(tmp_path / "profile"), *common(tmp_path)])
    assert not rows.results_file(tmp_path).exists(), "the profiler's overhead is no result"
    bench_scheduler.main([*size, *more, *common(tmp_path)])
    found = read(tmp_path, "bench_scheduler")
    modes = [(row["variant"], row["cache_mode"]) for row in found]
    ours = [("vllm_bamba", mode) for mode in ("none", "slots", "anchored slots")]
    assert modes == [("vllm", "none"), ("vllm", "align"), *ours]
    assert values(found, "metric") == {"scheduler_step"}
    assert values(found, "repeats") == {"60"}
    assert len(list((tmp_path / "profile").glob("*.prof"))) == 5
    assert "p99" in capsys.readouterr().out
