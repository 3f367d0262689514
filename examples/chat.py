"""Talk to a served Bamba through the OpenAI chat API; every turn sends the whole conversation again.

    vllm serve examples/bamba-tiny --enable-prompt-tokens-details   # on a CPU after: export VLLM_CPU_KVCACHE_SPACE=1
    python examples/chat.py --url http://127.0.0.1:8000
    python examples/chat.py "What is a list?" "And a tuple?"

Without questions on the command line it reads them from the terminal, until an empty one. With
`--enable-prompt-tokens-details` the server says how much of a prompt it found in its prefix cache.
"""

import argparse
from collections.abc import Iterable

import requests


def chat(url: str, questions: Iterable[str], max_tokens: int) -> None:
    model = requests.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
    messages = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        request = {
            "model": model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stop": ["\nUser:"],  # a base model would write the user's next question too
        }
        response = requests.post(f"{url}/v1/chat/completions", json=request, timeout=600)
        if not response.ok:
            raise SystemExit(f"{url} answered {response.status_code}: {response.text}")
        body = response.json()
        answer = body["choices"][0]["message"]["content"].strip()
        messages.append({"role": "assistant", "content": answer})

        usage = body["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        of_cache = "" if cached is None else f", {cached} of them cached"
        print(f"User: {question}\nAssistant: {answer}")
        print(f"[prompt {usage['prompt_tokens']} tokens{of_cache}; answer {usage['completion_tokens']} tokens]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Talk to a served Bamba through the OpenAI chat API.")
    parser.add_argument("questions", nargs="*", help="asked in turn (default: read from the terminal)")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where `vllm serve` listens")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    try:
        chat(args.url.rstrip("/"), args.questions or iter(lambda: input("? "), ""), args.max_tokens)
    except requests.ConnectionError:
        raise SystemExit(f"nothing answers at {args.url}: start one with `vllm serve examples/bamba-tiny`") from None


if __name__ == "__main__":
    main()
