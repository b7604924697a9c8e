"""Ctrl-C heard while the main thread is deaf."""

import os
import signal
import threading
from contextlib import contextmanager


@contextmanager
def heard(first, again):
    """Within: the first SIGINT or SIGTERM calls first(), each later one again(), in a thread.

    Python runs its own handlers in the main thread, between two lines of Python, that is only when
    XLA returns from a compiled chunk, perhaps minutes later. Elsewhere than in the main thread of a
    program nothing is heard and nothing changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def listen():
        calls = first
        while byte := os.read(ear, 1):
            if byte[0] in before:
                calls()
                calls = again
        os.close(ear)

    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(mouth)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(mouth)
