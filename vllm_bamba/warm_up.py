"""Kernels are made before anybody waits for an answer: in threads, while vLLM has other things to do."""

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

THREADS = 8  # a compiler spends four fifths of its time outside of Python, where threads need not wait for each other

Call = Callable[[], object]  # makes some kernels, without need of another


class WarmUps:
    """Calls of kernels for the sake of having them made."""

    def __init__(self) -> None:
        self._begun: set[Hashable] = set()
        self._pending: list[Future[None]] = []
        self._threads: ThreadPoolExecutor | None = None

    def start(self, what: Hashable, calls: Callable[[], Iterable[Call]], device: torch.device) -> None:
        """Have kernels made, but for those that have been before.

        vLLM's memory profile is when to call this: it runs each layer on the longest batch before anything else is run
        or captured.

        Args:
            what: makes these kernels what they are.
            calls: gives what makes them; asked where they are new.
            device: that of the kernels. What is no GPU, such as Triton's interpreter, makes them before this returns.
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
