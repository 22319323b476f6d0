"""Threads that read: nobody waits for a slow one after a signal."""

import threading

import pytest

from remap.data.thread_pool import threads
from remap.errors import Interrupted


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
