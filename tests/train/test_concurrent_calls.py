"""Calls of the user's code in threads."""

import threading
from concurrent.futures import wait

from engine.train.user_code.concurrent_calls import ConcurrentCalls


def test_a_call_may_begin_while_the_thread_of_the_last_one_of_its_index_ends():
    begun = threading.Event()

    def quoted(_index):  # called when a call has raised, by its thread
        assert begun.wait(60)
        return ""

    def fails(_index):
        raise ValueError

    def returns(index):
        begun.set()
        assert wait([failed], 60).done
        return index

    calls = ConcurrentCalls(
        concurrency=2, limit=60.0, quoted=quoted, takes_long=lambda _index, _seconds: None
    )
    failed = calls.submit(3, fails)
    assert calls.submit(3, returns).result(60) == 3
    calls.close()
    assert isinstance(failed.exception(), ValueError)
