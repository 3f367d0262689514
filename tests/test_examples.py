"""The examples do what they say; `quickstart.sh` installs what it needs, and `chat.py` is tested with the server."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from transformers import BambaForCausalLM

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.multiprocess


def run(name: str, *arguments: str, timeout: float = 600) -> str:
    """What an example prints."""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def read(folder: str | pathlib.Path, name: str) -> dict[str, object]:
    return json.loads((pathlib.Path(folder) / name).read_text())


def test_the_checkpoint_can_be_trained_again(tiny: str, tmp_path: pathlib.Path) -> None:
    """Two of its steps: the same model, tokenizer and report, and better than to guess."""
    run("train_tiny.py", "--out", str(tmp_path), "--steps", "2")
    of_repository, again = ({p.name for p in pathlib.Path(folder).iterdir()} for folder in (tiny, tmp_path))
    assert again <= of_repository
    config, old = read(tmp_path, "config.json"), read(tiny, "config.json")
    assert config | {"transformers_version": ""} == old | {"transformers_version": ""}
    report, recorded = read(tmp_path, "training.json"), read(tiny, "training.json")
    assert report.keys() == recorded.keys()
    assert (report["steps"], report["seed"]) == (2, 0)
    assert recorded["held_out_perplexity_per_token"] < report["held_out_perplexity_per_token"] < config["vocab_size"]
    trained, old_model = (BambaForCausalLM.from_pretrained(folder) for folder in (tmp_path, tiny))
    assert trained.num_parameters() == old_model.num_parameters()


def test_offline_batch() -> None:
    printed = run("offline.py", "--max-tokens", "8")
    answers = printed.split(" ->\n")[1:]
    assert len(answers) == 4
    assert "\n32 tokens in " in answers[-1]


def test_an_adapter_beside_the_model_that_it_changes() -> None:
    printed = run("lora.py")
    base, adapter = (line.split(None, 1)[1] for line in printed.splitlines() if line.startswith(("base:", "adapter:")))
    assert base != adapter
