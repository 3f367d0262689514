"""`vllm serve` with no flag but the address: what a user types, over HTTP, with the embedded checkpoint."""

import os
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import requests
from parity import Reference
from test_examples import run

pytestmark = pytest.mark.multiprocess

PROMPT = "Return a new list containing"


@pytest.fixture(scope="module")
def server(tiny):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        tiny,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            for _ in range(300):
                if process.poll() is not None:
                    break
                try:
                    requests.get(f"{url}/health", timeout=2).raise_for_status()
                    break
                except requests.RequestException:
                    time.sleep(1)
            else:
                process.kill()
            if process.poll() is not None:
                log.seek(0)
                pytest.fail(f"the server did not start:\n{log.read()[-4000:]}")
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def complete(url: str, prompt: object, **request: object) -> requests.Response:
    body = {"prompt": prompt, "temperature": 0.0, "max_tokens": 24} | request
    return requests.post(f"{url}/v1/completions", json=body, timeout=120)


def test_greedy_completion_is_transformers_own(server, tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    answer = complete(server, PROMPT, logprobs=0, return_tokens_as_token_ids=True).json()["choices"][0]
    generated = [int(token.removeprefix("token_id:")) for token in answer["logprobs"]["tokens"]]
    prompt = tokenizer(PROMPT)["input_ids"]
    logprobs = Reference(tiny).logprobs(prompt + generated)
    # the server runs in the checkpoint's bf16: its choice is fp32's best, or all but
    for step, token in enumerate(generated):
        choices = logprobs[len(prompt) - 1 + step]
        assert choices.max() - choices[token] < 0.1


def test_repeated_prompt_is_served_from_the_prefix_cache_with_the_same_answer(server):
    prompt = PROMPT + " the items of the sequence in reverse order." * 150
    first, second = (complete(server, prompt).json() for _ in range(2))
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert prefix_cache(server)["hits"] > 0


def prefix_cache(url: str) -> dict[str, int]:
    """Tokens that vLLM's metrics say were looked for in the prefix cache, and found."""
    lines = requests.get(f"{url}/metrics", timeout=10).text.splitlines()
    return {
        name: sum(int(float(v.rsplit(" ", 1)[1])) for v in lines if v.startswith(f"vllm:prefix_cache_{name}_total"))
        for name in ("queries", "hits")
    }


def chat(url: str, *messages: dict) -> dict:
    body = {"messages": messages, "max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("in_parts", [False, True], ids=["text", "parts"])
def test_the_second_chat_hits_the_system_message_of_the_first(server, tiny, in_parts):
    from transformers import AutoTokenizer

    text = f"You answer questions on lists, in parts: {in_parts}. " + "Be brief and name the function that helps. " * 4
    shared = len(AutoTokenizer.from_pretrained(tiny)(f"<s>System: {text}\n\nUser:")["input_ids"])
    system = {"role": "system", "content": [{"type": "text", "text": text}] if in_parts else text}
    before = prefix_cache(server)
    answers = [chat(server, system, {"role": "user", "content": question}) for question in ("What is it?", "How long?")]
    after = prefix_cache(server)
    assert after["queries"] - before["queries"] == sum(answer["usage"]["prompt_tokens"] for answer in answers)
    assert after["hits"] - before["hits"] == shared // 16 * 16 >= 48


def test_chat_follows_the_checkpoints_template(server):
    body = {"messages": [{"role": "user", "content": "What is a list?"}], "max_tokens": 8, "temperature": 0.0}
    answer = requests.post(f"{server}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 8


def test_prompt_beyond_the_context_is_a_client_error_and_the_server_lives(server):
    answer = complete(server, [5] * 9000)
    assert answer.status_code == 400
    assert "maximum context length is 8192 tokens" in answer.json()["error"]["message"]
    assert complete(server, PROMPT).status_code == 200


def test_the_chat_example_talks(server):
    questions = ["What is a list?", "And a tuple?", "And a dictionary?"]
    printed = run("chat.py", "--url", server, "--max-tokens", "24", *questions, timeout=120)
    assert printed.count("Assistant:") == 3
