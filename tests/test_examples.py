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


def run(name: str, *arguments: str) -> str:
    """What an example prints."""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_checkpoint_can_be_trained_again(tiny: str, tmp_path: pathlib.Path) -> None:
    """Two of its steps: the same model, tokenizer and report, and better than to guess."""
    run("train_tiny.py", "--out", str(tmp_path), "--steps", "2")
    of_repository, again = ({p.name for p in pathlib.Path(folder).iterdir()} for folder in (tiny, tmp_path))
    assert again <= of_repository
    config, old = (json.loads((pathlib.Path(folder) / "config.json").read_text()) for folder in (tmp_path, tiny))
    assert config | {"transformers_version": ""} == old | {"transformers_version": ""}
    report, recorded = (json.loads((pathlib.Path(folder) / "training.json").read_text()) for folder in (tmp_path, tiny))
    assert report.keys() == recorded.keys()
    assert (report["steps"], report["seed"]) == (2, 0)
    assert recorded["held_out_perplexity_per_token"] < report["held_out_perplexity_per_token"] < config["vocab_size"]
    trained = BambaForCausalLM.from_pretrained(tmp_path)
    assert sum(p.numel() for p in trained.parameters()) == sum(
        p.numel() for p in BambaForCausalLM.from_pretrained(tiny).parameters()
    )


def test_offline_batch() -> None:
    printed = run("offline.py", "--max-tokens", "8")
    assert printed.count("->") >= 2
    assert "tokens/s" in printed


def test_an_adapter_beside_the_model_that_it_changes() -> None:
    printed = run("lora.py")
    base, adapter = (line.split(None, 1)[1] for line in printed.splitlines() if line.startswith(("base:", "adapter:")))
    assert base != adapter
