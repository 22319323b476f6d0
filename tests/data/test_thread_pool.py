"""Threads that read: nobody waits for a slow one after a signal."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from remap.data.thread_pool import made_ahead, threads
from remap.errors import Interrupted, ThreadRefused


def test_a_block_that_is_left_early_waits_for_no_thread() -> None:
    """The read ends only once the block is behind us; the next one never begins."""
    left, ended, begun = threading.Event(), threading.Event(), []

    def read(number: int) -> None:
        begun.append(number)
        if left.wait(30):
            ended.set()

    with pytest.raises(Interrupted), threads(1) as pool:
        first = [pool.submit(read, number) for number in range(2)][0]
        while not begun:
            pass
        raise Interrupted("a signal", exit_code=143)
    left.set()
    first.result(30)
    assert ended.is_set() and begun == [0]


def test_a_block_that_ends_waits_for_all() -> None:
    done: list[int] = []
    with threads(2) as pool:
        for number in range(5):
            pool.submit(done.append, number)
    assert sorted(done) == [0, 1, 2, 3, 4]


def test_the_next_ones_are_made_while_one_is_worked_on() -> None:
    """Two are made ahead, in threads of their own and at once; what is asked for next is read by the caller."""
    together, readers = threading.Barrier(2, timeout=30), set()

    def make(number: int) -> int:
        together.wait()  # fails unless two are made at the same time
        return number * number

    def numbers() -> Iterator[int]:
        for number in range(6):
            readers.add(threading.current_thread())
            yield number

    assert list(made_ahead(make, numbers(), ahead=2)) == [(n, n * n) for n in range(6)]
    assert readers == {threading.current_thread()}


def test_a_system_that_starts_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")  # CPython's words

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ThreadRefused) as caught:
            list(made_ahead(abs, range(3)))
        with pytest.raises(ThreadRefused), threads(2) as pool:
            list(pool.map(abs, range(3)))
    assert caught.value.exit_code == 2 and "ulimit -u" in (caught.value.do or "")
    with pytest.raises(RuntimeError, match="after shutdown"), threads(2) as pool:  # any other error stays what it is
        pool.shutdown()
        pool.submit(abs, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_threads_of_a_forked_process_compute_at_once() -> None:
    """Without the hook, two first computations at once end with "Invalid thread pool!" every second time."""
    count = torch.get_num_threads()
    torch.set_num_threads(4)  # takes a while to make anew
    try:
        torch.ones(1_000_000).mul(2.0)  # so that there is a pool to lose
        assert [_compute_in_a_fork() for _ in range(20)] == [0] * 20
    finally:
        torch.set_num_threads(count)


def _compute_in_a_fork() -> int:
    """The status of a child whose first computations are two at once."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        together = threading.Barrier(2)

        def compute(number: int) -> float:
            together.wait(30)
            return float(torch.arange(400_000).index_select(0, torch.arange(300_000))[number])

        with threads(2) as pool:
            code = int(list(pool.map(compute, range(2))) != [0.0, 1.0])
    finally:
        os._exit(code)
