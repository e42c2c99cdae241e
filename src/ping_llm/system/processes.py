"""The end of a parent process in, the end of its children out."""

from __future__ import annotations

import os
import threading
import time


def end_with_parent(parent: int, *_: object) -> None:
    """Run first in a child process, ends it once `parent`, a process id, is gone: even if that was killed.

    The parent passes its own id: it may be gone before the child could look it up.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
