#!/usr/bin/env bash
# Installs everything into .venv, serves the embedded checkpoint and asks it to complete a sentence.
#
#     bash examples/quickstart.sh [PROMPT]
#
# MODEL names another checkpoint (a folder or a hub name), STARTUP_SECONDS how long the server may take to start.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
model="${MODEL:-$root/examples/bamba-tiny}"
prompt="${1:-This module provides}"
startup_seconds="${STARTUP_SECONDS:-1200}"
python="$root/.venv/bin/python"
server=""
log=""

fail() { # a line each: what is wrong, then what to do
    printf 'error: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '       %s\n' "$@" >&2
    if [ -s "$log" ]; then
        printf -- '---- the first errors in %s\n' "$log" >&2
        grep -m 5 -E '(Error|Exception)\b' "$log" >&2 || true
        printf -- '---- and its last lines\n' >&2
        tail -n 30 "$log" >&2
    fi
    exit 1
}

# The server leads a process group of its own, so that its workers go with it.
stop_server() {
    local waited=0
    [ -n "$server" ] || return 0
    kill -TERM -- "-$server" 2>/dev/null || true
    while kill -0 -- "-$server" 2>/dev/null && [ "$waited" -lt 20 ]; do
        sleep 1
        waited=$((waited + 1))
    done
    kill -KILL -- "-$server" 2>/dev/null || true
    server=""
}

free_port() {
    "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# vLLM's CPU engine compiles the model with a C++ compiler and Python's headers; without them it can still run eagerly.
can_compile() {
    grep -q '^cuda' "$root/.venv/.installed-engine" && return 0
    { command -v g++ || command -v clang++; } >/dev/null || return 1
    "$python" -c 'import pathlib, sys, sysconfig as s; sys.exit(not pathlib.Path(s.get_path("include"), "Python.h").exists())'
}

start_server() {
    local -a options=(--host 127.0.0.1 --port "$port" --served-model-name bamba)
    if ! can_compile; then
        printf 'No C++ compiler with the headers of Python here: serving without compilation (--enforce-eager)\n'
        options+=(--enforce-eager)
    fi
    log="$(mktemp "${TMPDIR:-/tmp}/bamba-quickstart.XXXXXX")"
    printf 'Starting vllm serve %s on port %s, log in %s\n' "$model" "$port" "$log"
    # GiB of cache on a CPU, where vLLM would otherwise ask for 92 % of the memory, more than many a desktop has free
    export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
    set -m # a process group for the background job
    VLLM_NO_USAGE_STATS=1 "$root/.venv/bin/vllm" serve "$model" "${options[@]}" >"$log" 2>&1 </dev/null &
    server=$!
    set +m
}

# In bash alone: starting a program every two seconds would take time from the server that is starting.
is_healthy() (
    exec 3<>"/dev/tcp/127.0.0.1/$port"
    printf 'GET /health HTTP/1.0\r\n\r\n' >&3
    IFS= read -r -t 5 status <&3
    [[ "$status" == *" 200 "* ]]
) 2>/dev/null

wait_for_server() {
    local start=$SECONDS
    until is_healthy; do
        kill -0 "$server" 2>/dev/null || fail "the server stopped while starting."
        [ $((SECONDS - start)) -lt "$startup_seconds" ] || fail "the server was not ready after $startup_seconds s." \
            "Give it longer with STARTUP_SECONDS=3600 bash $0"
        printf '.'
        sleep 2
    done
    printf ' ready after %s s\n' "$((SECONDS - start))"
}

ask() {
    "$python" - "$url" "$prompt" <<'PYTHON'
import json
import sys
import time
import urllib.request

url, prompt = sys.argv[1:]
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def complete(max_tokens):
    request = {"model": "bamba", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    with opener.open(urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=600) as response:
        return json.load(response)


complete(4)  # what is done once is not what is measured
start = time.perf_counter()
answer = complete(64)
seconds = time.perf_counter() - start
tokens = answer["usage"]["completion_tokens"]
print(f"\nprompt: {prompt}\nanswer: {answer['choices'][0]['text'].strip()}\n")
print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s for one request at a time")
PYTHON
}

bash "$root/tests/environment.sh"
port="$(free_port)"
url="http://127.0.0.1:$port"
trap stop_server EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
start_server
wait_for_server
ask || fail "the server did not answer as expected."
stop_server
rm -f "$log"
cat <<EOS

That was a small model. The released one has 9.8 billion parameters, 20 GB in bf16, and is served the same way:

    $root/.venv/bin/vllm serve ibm-ai-platform/Bamba-9B-v2
EOS
