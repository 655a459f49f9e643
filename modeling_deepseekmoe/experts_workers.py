# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Threads of the CPU that compute experts side by side, each expert by one of them.

Torch divides a single product among all threads and waits for the last one, once for every product of every expert.
While another process runs on one of the cores, each of these many waits can last as long as that process's share of
time. Here a thread takes one expert after the other and waits for nobody: a thread that gets less of its core takes
fewer of them.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
MAX_WORKERS = 1024  # a thread is started when there is none that is free


class _Pool:
    """The threads of this process. Those of its parent do not exist in a process that was forked."""

    threads: ThreadPoolExecutor | None = None

    @classmethod
    def get(cls) -> ThreadPoolExecutor:
        if cls.threads is None:
            cls.threads = ThreadPoolExecutor(MAX_WORKERS, thread_name_prefix="deepseekmoe-experts")
        return cls.threads

    @classmethod
    def forget(cls) -> None:
        cls.threads = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Pool.forget)


def _take(left: "deque[Item]") -> Item | None:
    """Take the next of the items that are left. A deque is safe among threads."""
    try:
        return left.popleft()
    except IndexError:
        return None


def run_in_workers(items: Sequence[Item], start: Callable[[], Callable[[Item], None]]) -> None:
    """Give every item to one of the workers, in the order of the items.

    There are as many workers as torch has threads, `torch.get_num_threads()`, but no more than items. They share these
    threads: with fewer items than threads each worker's operations have several. This thread is one of the workers.

    Args:
        items: what there is to compute, other than `None`. Items must not depend on each other.
        start: makes, in the worker's thread, the function that the worker computes its items with.

    Raises:
        Exception: the first that a worker raised. The others then finish the item they are at, and stop.
    """
    threads = torch.get_num_threads()
    count = max(min(threads, len(items)), 1)
    left = deque(items)
    # A thread has modes of its own, as it has a number of threads. In the inference mode tensors are of another kind.
    without_gradients = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    @without_gradients()
    def work() -> None:
        try:
            if torch.get_num_threads() != threads // count:
                torch.set_num_threads(threads // count)
            compute = start()
            if torch.is_autocast_enabled("cpu"):  # the calling thread: what the dtypes are has been decided
                compute = torch.autocast("cpu", enabled=False)(compute)
            while (item := _take(left)) is not None:
                compute(item)
        finally:  # after an error or an interrupt nobody needs the rest
            left.clear()

    futures = [_Pool.get().submit(work) for _ in range(count - 1)]
    try:
        work()
        for future in futures:
            if not future.cancel():  # it has begun
                future.result()
    finally:
        if count > 1:
            torch.set_num_threads(threads)  # for this thread, and for threads that are new


class OrderedSum:
    """A sum of rows that has the same bits in every run, whichever worker is the first to be done.

    Args:
        total (`torch.Tensor` of shape (T, D)): what the rows are added to, in place.
    """

    def __init__(self, total: torch.Tensor) -> None:
        self.total = total
        self.lock = threading.Lock()
        self.waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.next, self.adding = 0, False

    def add(self, number: int, places: torch.Tensor, rows: torch.Tensor) -> None:
        """Add rows (n, D) to some places (n,) of the total when all with a lower number have been added.

        The rows are kept until then: the caller must not write to them again. Numbers begin with 0.
        """
        with self.lock:
            self.waiting[number] = (places, rows)
            if self.adding:
                return  # the worker that is at it finds them
            self.adding = True
        while (ready := self._take()) is not None:
            self.total.index_add_(0, *ready)

    def _take(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        with self.lock:
            ready = self.waiting.pop(self.next, None)
            self.next += ready is not None
            self.adding = ready is not None
            return ready


__all__ = ["OrderedSum", "run_in_workers"]
