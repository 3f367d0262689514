"""The two programs that `bench_transformers.py` compares, behind one interface: prompts in, token ids out."""

import gc
import os
import sys
from types import FrameType
from typing import Any, Protocol

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, whose memory comes back

import torch
from rows import dtype_name
from transformers import BambaForCausalLM
from transformers.models.bamba import modeling_bamba
from variants import columns
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

Tokens = list[list[int]]
KERNELS = ("mamba_ssm", "causal_conv1d")
DISPATCHED = ("causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan", "mamba2_selective_state_update")


class Engine(Protocol):
    """What the comparison needs of an engine.

    Attributes:
        name: variant in the result rows.
        details: what the numbers depend on: kernels, attention, mode.
        state_dtype: of the SSM state.
    """

    name: str
    details: str
    state_dtype: str

    def generate(self, prompts: Tokens, output: int) -> Tokens:
        """`output` greedy tokens for each prompt, all prompts at once."""

    def close(self) -> None:
        """Give the memory back."""


class Transformers:
    """`BambaForCausalLM.generate`; prompts of unequal length are padded on the left."""

    def __init__(self, model: str, dtype: torch.dtype, kernels: str, attention: str):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._dispatch = {name: vars(modeling_bamba)[name] for name in DISPATCHED if name in vars(modeling_bamba)}
        if kernels == "off":
            for name, function in self._dispatch.items():  # replaced by the plain torch function below the dispatch
                setattr(modeling_bamba, name, getattr(function, "__wrapped__", function))
        implementation = _attention(attention)
        self.model = BambaForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=implementation)
        self.model = self.model.to(self.device).eval()
        self.model.generation_config.eos_token_id = None  # every request runs to its full length
        ran = self._modules_that_run()
        missing = [name for name in KERNELS if name not in ran]
        if kernels == "off" and len(missing) < len(KERNELS):
            self.close()
            raise SystemExit(
                "--kernels off: this release of Transformers has no plain torch to switch to; leave it out"
            )
        if kernels == "on" and missing:
            self.close()
            raise SystemExit(
                f"--kernels on: Transformers did not call {' and '.join(missing)}. Install them on a machine with an "
                "NVIDIA GPU (pip install 'vllm-bamba[bench]' --no-build-isolation), or measure with --kernels off."
            )
        self.name = "transformers_torch" if missing else "transformers"
        kernel_names = ", ".join(name for name in KERNELS if name in ran) or "none, plain torch"
        self.details = f"kernels that ran: {kernel_names}; attention {self.model.config._attn_implementation}"
        if "flash" in implementation and not any(name.startswith("flash_attn") for name in ran):
            self.details += " (flash_attn was not called)"

    def _modules_that_run(self) -> set[str]:
        """Top-level packages whose functions a prompt and a decode step really call; sets `state_dtype` too.

        Whether a package is installed says little: Transformers falls back silently when an import fails.
        """
        seen: set[str] = set()

        def note(frame: FrameType, event: str, _: object) -> None:
            seen.add(frame.f_globals.get("__name__", "").partition(".")[0])

        prompt = torch.ones(1, 8, dtype=torch.long, device=self.device)
        sys.setprofile(note)
        try:
            with torch.no_grad():
                cache = self.model(prompt, use_cache=True).past_key_values
                self.model(prompt[:, :1], past_key_values=cache, use_cache=True)
        finally:
            sys.setprofile(None)
        states = [getattr(layer, "recurrent_states", None) for layer in cache.layers]
        self.state_dtype = next((dtype_name(s[0].dtype) for s in states if s is not None), "unknown")
        return seen

    @torch.no_grad()
    def generate(self, prompts: Tokens, output: int) -> Tokens:
        width = max(map(len, prompts))
        ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(2))
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": output, "pad_token_id": 0}
        tokens = self.model.generate(ids.to(self.device), attention_mask=mask.to(self.device), **options)
        return tokens[:, width:].tolist()

    def close(self) -> None:
        for name, function in self._dispatch.items():
            setattr(modeling_bamba, name, function)
        del self.model
        gc.collect()
        torch.cuda.empty_cache()


def _attention(wanted: str) -> str:
    """Transformers' name of the attention implementation; auto prefers flash-attn where it can be imported."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            return "sdpa"
        return "flash_attention_2"
    return "sdpa"


class Vllm:
    """`vllm.LLM` with this plugin; prefix caching is off, for the repeats are the same prompts."""

    name = "vllm_bamba"

    def __init__(self, model: str, dtype: torch.dtype, state_dtype: str, max_len: int, max_seqs: int, eager: bool):
        options: dict[str, Any] = {}
        if not torch.cuda.is_available():
            options = {"distributed_executor_backend": "uni", "kv_cache_memory_bytes": 256 << 20}
        self.llm = LLM(
            model=model,
            dtype=dtype_name(dtype),
            mamba_ssm_cache_dtype=state_dtype,
            max_model_len=max_len,
            max_num_seqs=max_seqs,
            enable_prefix_caching=False,
            enforce_eager=eager,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            **options,
        )
        config = self.llm.llm_engine.vllm_config
        self.state_dtype = columns(config)["state_dtype"]
        compilation = config.compilation_config
        self.details = f"compilation {compilation.mode.name.lower()}; CUDA graphs {_graphs(compilation)}"

    def generate(self, prompts: Tokens, output: int) -> Tokens:
        parameters = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
        answers = self.llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()


def _graphs(compilation: Any) -> str:
    mode = compilation.cudagraph_mode
    return mode.name.lower() if mode is not None and torch.cuda.is_available() else "none"
