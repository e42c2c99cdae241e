"""The end of a parent process in, the end of its children out."""

from __future__ import annotations

import os
import threading
import time


def end_with_parent(parent: int, *_: object) -> None:
    """Run first in a child process, ends it once `parent` is gone: killed, it could not tell; the child would wait for ever.

    The parent tells its own number: it may be gone before this process comes to ask for it.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
