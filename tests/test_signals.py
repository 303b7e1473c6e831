"""A wish to stop reaches who is told at once, also while the main thread is busy elsewhere."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from hpcai_cli.signals import StopRequest


def test_a_signal_is_told_while_the_main_thread_is_in_another_library():
    """Python's own handlers wait for its end, as they would for that of a compiled block of steps."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent("""
        import hashlib, os, signal, threading, time
        from hpcai_cli.signals import StopRequest
        with StopRequest() as stop:
            told = []
            stop.tell(lambda: told.append(time.monotonic()))
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            started = time.monotonic()
            # Some seconds in C, which no signal interrupts.
            hashlib.pbkdf2_hmac("sha256", b"some", b"salt", 3_000_000)
            ended = time.monotonic()
            time.sleep(0.1)
            print(stop.received, ended - told[0] > 0.5 * (ended - started))
        """)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["SIGTERM", "True"], done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_each_signal_is_a_wish(number):
    with StopRequest() as stop:
        assert stop.received == ""
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        assert stop.received == number.name


def test_a_second_interrupt_ends_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert stop.received == "SIGTERM"


def test_who_comes_late_is_told_too():
    stop, told = StopRequest(), []
    stop.ask("the time limit")
    stop.tell(lambda: told.append(1))
    stop.ask("another")
    assert (stop.received, told[0]) == ("the time limit", 1)


def test_everything_is_as_before_afterwards():
    before, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


def test_what_a_forked_process_receives_is_not_told_here():
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGUSR1, lambda *_: os._exit(7))
            time.sleep(20)
            os._exit(1)
        time.sleep(0.3)
        os.kill(child, signal.SIGUSR1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        time.sleep(0.2)
        assert stop.received == ""
