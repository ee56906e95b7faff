"""Signals that end a job: noted in a process of its own, kept from those that help it."""

import multiprocessing
import os
import signal
import subprocess
import time

import pytest

from xcon import signals


def test_inside_signals_are_noted_and_outside_all_is_as_before() -> None:
    before = [signal.getsignal(number) for number in signals.ENDING]
    with signals.Received() as received:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert received.numbers == [signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1]
    assert [signal.getsignal(number) for number in signals.ENDING] == before


def test_signals_are_held_and_come_afterwards() -> None:
    with signals.Received() as received:
        with signals.held():
            signal.raise_signal(signal.SIGTERM)  # to this thread: the process may have others, which hold nothing
            assert received.numbers == []
        assert received.numbers == [signal.SIGTERM]


def help_out() -> None:
    signals.end_with_parent()
    time.sleep(60)


@pytest.mark.parametrize("number", signals.ENDING)
def test_a_helper_is_ended_by_its_parent_alone(number: signal.Signals) -> None:
    """Sent by another process first: by `kill`. Those two signals pending at once would count as one."""
    with signals.held():
        helper = multiprocessing.get_context("fork").Process(target=help_out)
        helper.start()
    assert helper.pid is not None
    subprocess.run(["kill", f"-{number.name.removeprefix('SIG')}", str(helper.pid)], check=True)
    helper.join(0.3)
    assert helper.is_alive()
    helper.terminate()
    helper.join(30)
    assert helper.exitcode == 0
