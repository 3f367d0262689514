"""Kernels are made before anybody waits for an answer: in threads, while vLLM has other things to do."""

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

THREADS = 8  # a compiler spends four fifths of its time outside of Python, where threads need not wait for each other

Call = Callable[[], object]  # makes some kernels; several may run side by side, in any order


class WarmUps:
    """Calls of kernels for the sake of having them made."""

    def __init__(self) -> None:
        self._begun: set[Hashable] = set()
        self._pending: list[Future[None]] = []
        self._threads: ThreadPoolExecutor | None = None

    def start(self, what: Hashable, calls: Callable[[], Iterable[Call]], device: torch.device) -> None:
        """Have kernels made, unless they were asked for before.

        Layers call this in vLLM's memory profile, which runs each of them on the longest batch before anything else is
        run or captured. The sampler's kernels are asked for before weights are loaded.

        Args:
            what: tells these kernels from all others.
            calls: gives the calls that make them; not asked again for the same `what`.
            device: that of the kernels. Without a GPU, as in Triton's interpreter, they are made before this returns.
        """
        if what in self._begun:
            return
        self._begun.add(what)
        if device.type != "cuda":
            for call in calls():
                call()
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="warm-up")
        self._pending += [self._threads.submit(_on, device, call) for call in calls()]

    def finish(self) -> None:
        """Wait until all are made; whoever runs or captures kernels calls this first.

        Raises:
            Exception: what the first call that failed raised.
        """
        if self._threads is None:
            return
        threads, pending = self._threads, self._pending
        self._threads, self._pending = None, []
        threads.shutdown()
        for made in pending:
            made.result()


def _on(device: torch.device, call: Call) -> None:
    with torch.cuda.device(device), torch.inference_mode():  # a thread has its own of both
        call()


warm_ups = WarmUps()
