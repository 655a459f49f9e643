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
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Item = TypeVar("Item")
MAX_WORKERS = 1024
AHEAD = 8  # blocks for each worker that may wait for one that is slower


def _begin() -> None:
    """Give the new thread one thread of torch's."""
    torch.get_num_threads()  # without this torch would set the program's number when it is first used
    torch.set_num_threads(1)


class _Pool:
    """The threads of this process, each of which torch gives one thread. A forked process has none of its parent's."""

    lock = threading.Lock()
    executor: ThreadPoolExecutor | None = None
    size = 0

    @classmethod
    def of(cls, count: int) -> ThreadPoolExecutor:
        """Return the threads, at least so many."""
        with cls.lock:
            if cls.executor is None:
                cls.executor = ThreadPoolExecutor(MAX_WORKERS, "deepseekmoe-experts", _begin)
            if cls.size < count:
                # How many threads torch uses is a thread's own, but what is set last is also what new threads of the
                # program begin with: it is put back when all of these have begun.
                threads, all_there = torch.get_num_threads(), threading.Barrier(count + 1)
                for _ in range(count):
                    cls.executor.submit(all_there.wait)
                all_there.wait()
                torch.set_num_threads(threads)
                cls.size = count
            return cls.executor

    @classmethod
    def forget(cls) -> None:
        cls.lock, cls.executor, cls.size = threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Pool.forget)


def run_in_workers(
    items: Sequence[Item],
    start: Callable[[], Callable[[Item], None]],
    *,
    divisible: bool = False,
    stop: Callable[[], None] | None = None,
) -> None:
    """Give every item to one of the workers, in the order of the items.

    There are as many workers as torch has threads, `torch.get_num_threads()`, but no more than items. With one worker,
    or where the program is ending, this thread computes.

    Args:
        items: what there is to compute, other than `None`. Items must not depend on each other.
        start: makes, in the worker's thread, the function that the worker computes its items with.
        divisible: whether one item's operations can use several threads. With many more threads than items this thread
            then computes one item after the other, with all threads.
        stop: called when a worker has raised, so that no other one waits for it.

    Raises:
        Exception: the first that a worker raised. The others then finish the item they are at, and stop.
    """
    threads = torch.get_num_threads()
    count = min(threads, len(items))
    left = deque(items)
    # A thread has modes of its own. In the inference mode tensors are of another kind.
    without_gradients = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    @without_gradients()
    def work() -> None:
        compute = start()
        try:
            while (item := _take(left)) is not None:
                compute(item)
        except BaseException:
            left.clear()
            if stop is not None:
                stop()
            raise

    if count > 1 and not (divisible and 2 * len(items) <= threads) and _run_in_pool(work, count, left):
        return
    if torch.is_autocast_enabled("cpu"):  # what the dtypes are has been decided
        with torch.autocast("cpu", enabled=False):
            work()
    else:
        work()


def _run_in_pool(work: Callable[[], None], count: int, left: deque) -> bool:
    """Let threads work, and wait for them. Return False if there can be none any more."""
    futures: list[Future] = []
    try:
        try:
            pool = _Pool.of(count)
            for _ in range(count):
                futures.append(pool.submit(work))
        except RuntimeError:  # the interpreter starts no threads while it ends; those that there are do it
            if not futures:
                return False
        for future in futures:
            future.result()
    finally:
        if futures:  # after an error or an interrupt nobody needs the rest
            left.clear()
            for future in futures:
                future.cancel()
            wait(futures)
    return True


def _take(left: "deque[Item]") -> Item | None:
    """Take the next of the items that are left. A deque is safe among threads."""
    try:
        return left.popleft()
    except IndexError:
        return None


class OrderedSum:
    """A sum of rows that has the same bits in every run, whichever worker is the first to be done.

    A worker that is far ahead of the slowest one waits, so that few rows are kept.

    Args:
        total (`torch.Tensor` of shape (T, D)): what the rows are added to, in place.
    """

    def __init__(self, total: torch.Tensor) -> None:
        self.total = total
        self.condition = threading.Condition()
        self.waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.ahead = AHEAD * torch.get_num_threads()
        self.next, self.adding, self.closed = 0, False, False

    def add(self, number: int, places: torch.Tensor, rows: torch.Tensor) -> None:
        """Add rows (n, D) to some places (n,) of the total when all with a lower number have been added.

        The rows are kept until then: the caller must not write to them again. Numbers begin with 0, and a worker that
        has a number adds it before it begins a higher one.
        """
        with self.condition:
            self.condition.wait_for(lambda: self.closed or number < self.next + self.ahead)
            self.waiting[number] = (places, rows)
            if self.adding:
                return  # the worker that is at it finds them
            self.adding = True
        while (ready := self._take()) is not None:
            self.total.index_add_(0, *ready)

    def _take(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        with self.condition:
            ready = self.waiting.pop(self.next, None)
            self.adding = ready is not None
            if self.adding:
                self.next += 1
                self.condition.notify_all()
            return ready

    def close(self) -> None:
        """Let nobody wait any more: a number will never come."""
        with self.condition:
            self.closed = True
            self.condition.notify_all()


__all__ = ["OrderedSum", "run_in_workers"]
