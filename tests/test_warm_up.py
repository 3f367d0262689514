"""Kernels made in threads; what stands for them here counts, and waits."""

import threading
from contextlib import nullcontext

import pytest
import torch

from vllm_bamba.warm_up import WarmUps

GPU = torch.device("cuda", 0)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


@pytest.mark.usefixtures("without_gpu")
def test_calls_run_side_by_side_once_and_are_waited_for() -> None:
    warm_ups, together, seen = WarmUps(), threading.Barrier(2, timeout=30), []

    def call() -> None:
        together.wait()  # passed by nobody alone
        seen.append((threading.current_thread(), torch.is_inference_mode_enabled()))

    for _ in range(3):
        warm_ups.start(("a", 1), lambda: [call, call], GPU)
    warm_ups.finish()
    assert len({thread for thread, _ in seen}) == 2
    assert threading.current_thread() not in {thread for thread, _ in seen}
    assert all(inference for _, inference in seen)
    warm_ups.start(("a", 1), lambda: pytest.fail("made before"), GPU)
    warm_ups.finish()
    warm_ups.start(("a", 2), lambda: [call, call], GPU)  # after the first ones have been waited for
    warm_ups.finish()
    assert len(seen) == 4


@pytest.mark.usefixtures("without_gpu")
def test_what_a_call_raises_comes_out_when_all_have_ended() -> None:
    warm_ups, ended = WarmUps(), threading.Event()

    def fail() -> None:
        raise ValueError("no such kernel")

    warm_ups.start("broken", lambda: [fail, ended.set], GPU)
    with pytest.raises(ValueError, match="no such kernel"):
        warm_ups.finish()
    assert ended.is_set()
    warm_ups.finish()  # nothing is left


def test_without_a_gpu_calls_have_run_before_start_returns() -> None:
    warm_ups, threads = WarmUps(), []
    warm_ups.start("a", lambda: [lambda: threads.append(threading.current_thread())], torch.device("cpu"))
    assert threads == [threading.current_thread()]
