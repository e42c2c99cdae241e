"""A service at a port of this machine, and a browser that looks at its page and minds what must not happen there."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright
from servers import wait_for
from waiting import HANG_S

from ping_llm.inference.model import PingModel
from ping_llm.serve.app import make_app
from ping_llm.serve.limits import Limits
from ping_llm.serve.rows import RowsFolder
from ping_llm.serve.service import Service

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_VIOLATIONS = "addEventListener('securitypolicyviolation', (event) => console.error(`CSP: ${event.violatedDirective}`))"


@contextmanager
def listening(
    model: PingModel, rows: RowsFolder | None = None, token: str | None = None
) -> Iterator[tuple[str, Service]]:
    """The address of a service, which runs in a thread, and the service."""
    service = Service(model, "run", Limits(answer_s=HANG_S), rows)
    config = uvicorn.Config(make_app(service, token), port=0, log_config=None, access_log=False, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(HANG_S)


@contextmanager
def running_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Look:
    """A page, and what it said and loaded since it was opened."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    bytes_loaded: int = 0

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def forgive(self, text: str) -> None:
        """Takes back the complaints that hold this text: the browser tells of every answer that is an error."""
        self.complaints[:] = [one for one in self.complaints if text not in one]

    def is_done(self, name: str) -> None:
        """Waits until a status says that its work is done."""
        self.page.wait_for_selector(f"#{name}-status[data-state=done]", timeout=1000 * HANG_S)

    def all_is_done(self) -> None:
        for name in ("query", "ranking", "map"):
            self.is_done(name)


@contextmanager
def looking(browser: Browser, url: str, **options: object) -> Iterator[Look]:
    """A page just opened, in a profile of its own; whatever it complains of in the console is an error at the end."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options})
    context.set_default_timeout(1000 * HANG_S)
    page = context.new_page()
    look = Look(page)
    page.add_init_script(_VIOLATIONS)
    page.on("console", lambda said: look.complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: look.complaints.append(str(error)))
    network = context.new_cdp_session(page)
    network.send("Network.enable")
    network.on("Network.loadingFinished", lambda event: add(look, event["encodedDataLength"]))
    try:
        page.goto(url)
        yield look
        assert look.complaints == [], look.complaints
    finally:
        context.close()


def add(look: Look, count: float) -> None:
    look.bytes_loaded += int(count)
