"""The executor of one gRPC call."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from poolrpc_server.transports.grpc.interceptor import CallExecutor


class Call:
    """An admitted call that counts its releases."""

    released = 0

    def release(self):
        """Count."""
        self.released += 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_is_released_at_the_end_of_its_thread(fails):
    """What a call reserved is returned when its function has returned or raised, although no handler saw it."""
    call = Call()

    def function(number):
        assert call.released == 0
        if fails:
            raise KeyError
        return number

    with ThreadPoolExecutor(1) as threads:
        future = CallExecutor(threads, call).submit(function, 7)
        assert isinstance(future.exception(), KeyError) if fails else future.result() == 7
    assert call.released == 1


def test_a_call_that_gets_no_thread_is_released():
    """An executor that has ended takes no call."""
    call, threads = Call(), ThreadPoolExecutor(1)
    threads.shutdown()
    with pytest.raises(RuntimeError):
        CallExecutor(threads, call).submit(int)
    assert call.released == 1
