"""Handlers of signals last as long as their block, but for what is to be ignored to the end."""

import os
import signal

from ping_llm.system.signals import ignore_from_now_on, on_signals


def test_handlers_are_put_back_unless_the_block_has_set_others():
    before, seen = signal.getsignal(signal.SIGTERM), []
    try:
        with on_signals((signal.SIGTERM,), seen.append):
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is before
        with on_signals((signal.SIGTERM, signal.SIGUSR1), seen.append):
            ignore_from_now_on(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # would end the tests
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN and seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
