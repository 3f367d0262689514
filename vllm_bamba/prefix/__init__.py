"""Prefix-aware state slots: what requests share is computed once.

A *slot* is the convolution and SSM state of a sequence after some number of its tokens. vLLM lays them on a grid of
some hundred tokens; here they lie where they are of use, at multiples of 16 tokens, and attention's keys and values
are found at the same positions.

| module | what it holds |
|---|---|
| `policy` | which positions get a slot and which slot goes: plain integers |
| `options` | when all this is on, what users can set |
| `chat` | how many of a chat's first tokens are its system messages, found where prompts are rendered |
| `slots` | which of vLLM's blocks a slot holds |
| `managers` | vLLM's cache managers: what gets a key, and when |
| `scheduler` | vLLM's schedulers: where a prefill stops, and whom of the managers to ask (without caching, too) |

`benchmarks/simulator.py` runs vLLM's real scheduler and these managers without a model.
"""
