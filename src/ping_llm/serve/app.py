"""A service in, an application of HTTP out: routes, each of which makes a job of a request and waits for its answer."""

from __future__ import annotations

import asyncio
import importlib.resources
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from ping_llm.serve import bodies
from ping_llm.serve.guard import GONE, QUERIES, ClientGone, Guard, Refusal, json_bytes, unavailable
from ping_llm.serve.service import Service
from ping_llm.serve.tables import rows_of
from ping_llm.serve.worker import Busy, Job

_FOLDER = Path(__file__).parent
PAGE, DOCS = _FOLDER / "page", _FOLDER / "docs"
MOST_REASON = 1000  # characters
SMALL_BODY = 64 << 10  # bytes that are parsed at once; more in a thread, so that others are not kept waiting


def make_app(service: Service, token: str | None = None, log_addresses: bool = False) -> Guard:
    """The application; the thread of the model runs from its startup to its shutdown."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    summary = "The whole distribution of the RTT between any two addresses."
    options: dict[str, Any] = {"docs_url": None, "redoc_url": None, "lifespan": lifespan, "summary": summary}
    app = FastAPI(title="ping-llm", version=version("ping-llm"), **options)
    _add_queries(app, service)
    _add_views(app, service)
    _add_states(app, service)
    _add_errors(app)
    _say_more(app, token is not None)
    app.get("/docs", include_in_schema=False)(lambda: RedirectResponse("/docs/"))
    swagger = importlib.resources.files("fastapi_swagger") / "resources"
    app.mount("/docs/swagger", StaticFiles(directory=str(swagger)))
    app.mount("/docs", StaticFiles(directory=DOCS, html=True))
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return Guard(app, service.limits, service.metrics, lambda: service.worker.is_taking, token, log_addresses)


def _examples(route: str) -> Any:
    given = bodies.EXAMPLES[route]
    return Body(openapi_examples={name: {"summary": name, "value": value} for name, value in given.items()})


def _add_queries(app: FastAPI, service: Service) -> None:
    @app.post("/v1/rtt", tags=["queries"])
    async def rtt(request: Request, body: Annotated[bodies.RttBody, _examples("rtt")]) -> Response:
        """The distribution of the RTT of a ping, as `ping-llm inference rtt --json` says it; of several, `answers`."""
        return await answer(service, request, service.rtt, body)

    @app.post("/v1/rank", tags=["queries"])
    async def rank(request: Request, body: Annotated[bodies.RankBody, _examples("rank")]) -> Response:
        """Which of several destinations is nearest, as `ping-llm inference rank --json` says it."""
        return await answer(service, request, service.rank, body)

    @app.post("/v1/destinations", tags=["queries"])
    async def destinations(
        request: Request, body: Annotated[bodies.DestinationsBody, _examples("destinations")]
    ) -> Response:
        """The likeliest destinations, given the RTT or not, as `ping-llm inference dst --json` says them."""
        return await answer(service, request, service.destinations, body)

    @app.post("/v1/score", tags=["queries"])
    async def score(request: Request, body: Annotated[bodies.ScoreBody, _examples("score")]) -> Response:
        """How surprising measured pings are, as `ping-llm inference score --json` says it."""
        return await answer(service, request, service.score, body)


def _add_views(app: FastAPI, service: Service) -> None:
    """What the page asks for beside."""

    @app.post("/v1/map", tags=["queries"])
    async def map_(request: Request, body: Annotated[bodies.MapBody, _examples("map")]) -> Response:
        """RTT and P(no answer) of pings to the parts of an IPv4 prefix; those that hold no hosts are left out."""
        return await answer(service, request, service.map, body)

    @app.post("/v1/anomalies", tags=["rows"])
    async def anomalies(request: Request, body: bodies.AnomaliesBody) -> Response:
        """How surprising measurements of the service's rows are, each after those before it."""
        return await answer(service, request, service.anomalies, body)

    @app.get("/v1/rows", tags=["rows"])
    async def rows(part: str) -> Response:
        """The busiest rows of a part; each is of one probe, or of one source."""
        return _json(await asyncio.to_thread(lambda: service.shown_rows().listed(part)))

    @app.get("/v1/example", tags=["service"])
    async def example() -> Response:
        """A query that a page begins with: from the rows of the service, if it has some."""
        return _json(await asyncio.to_thread(service.example))

    @app.post("/v1/table", tags=["queries"], openapi_extra={"requestBody": {"content": {"text/csv": {}}}})
    async def table(request: Request) -> Response:
        """The measurements in a file of CSV, TSV or JSON, as a context takes them."""
        content = await request.body()
        return _json({"rows": await asyncio.to_thread(rows_of, content, service.limits.measurements)})


async def answer(service: Service, request: Request, make: Callable[[Any, float], Job], body: bodies.Body) -> Response:
    """The answer to a request, once it is there; the job is dropped if it is not in time or the client leaves."""
    deadline = request.scope["state"]["begin"] + service.limits.answer_s
    if len(await request.body()) > SMALL_BODY:
        job = await asyncio.to_thread(make, body, deadline)
    else:
        job = make(body, deadline)
    try:
        service.worker.submit(job)
    except Busy as busy:
        raise unavailable(str(busy)) from None
    found, left = asyncio.wrap_future(job.future), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({found, left}, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
        if found.done():
            return Response(found.result(), media_type="application/json")
        if left.done():
            raise ClientGone
        raise TimeoutError
    except TimeoutError:
        late = f"no answer within {service.limits.answer_s:g} s; ask for less at a time, or again later"
        raise Refusal(504, late) from None
    finally:
        left.cancel()
        found.cancel()  # and with it the job, unless it runs


async def _left(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_states(app: FastAPI, service: Service) -> None:
    @app.get("/v1/model", tags=["service"])
    async def model() -> Response:
        """The model, and what is taken of a request at most."""
        return _json(service.facts())

    @app.get("/healthz", tags=["service"])
    async def healthz() -> Response:
        """Whether the service works; if not, start it anew."""
        return _json({"ok": True}) if service.worker.is_alive else _error(500, "the thread of the model has ended")

    @app.get("/readyz", tags=["service"])
    async def readyz() -> Response:
        """Whether requests are taken."""
        return _json({"ready": True}) if service.worker.is_taking else _error(503, "the service is stopping")

    @app.get("/metrics", tags=["service"])
    async def metrics() -> Response:
        """Counters and gauges, as Prometheus reads them."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    """All that goes wrong is `{"error": "one line"}`."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _error(400, bodies.one_line(error.errors(), request.url.path.rpartition("/")[2]))

    @app.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> Response:
        return _error(413 if isinstance(error, bodies.TooLarge) else 400, " ".join(str(error).split()))

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return _error(refusal.status, refusal.reason, refusal.headers)

    @app.exception_handler(ClientGone)
    async def gone(_: Request, error: ClientGone) -> Response:
        return Response(status_code=GONE)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code, reason = error.status_code, str(error.detail)
        if code == 404 and request.url.path in QUERIES:
            code, reason = 405, "send a POST with an object of JSON; /docs says which"
        elif code == 404:
            reason = "there is no such page"
        elif code == 400:
            reason = "the body is no JSON in UTF-8, or is nested too deeply"
        return _error(code, reason, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return _error(500, "the service failed; its log says more")


def _say_more(app: FastAPI, needs_token: bool) -> None:
    """Makes the description say what is true of this service: no error of FastAPI's own shape, and the token."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = describe()
            error = {"type": "object", "properties": {"error": {"type": "string"}}}
            for path, operations in found["paths"].items():
                for operation in operations.values():
                    if operation["responses"].pop("422", None):
                        content = {"application/json": {"schema": error}}
                        reasons = {"400": "what is wrong", "413": "too much", "503": "busy: try again"}
                        operation["responses"] |= {
                            code: {"description": why, "content": content} for code, why in reasons.items()
                        }
                    if needs_token and path.startswith("/v1/"):
                        operation["security"] = [{"token": []}]
            schemas = found["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            if needs_token:
                found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        return app.openapi_schema or found

    app.openapi = openapi  # type: ignore[method-assign]


def _json(value: object) -> Response:
    return Response(json_bytes(value), media_type="application/json")


def _error(status: int, reason: str, headers: Any = None) -> Response:
    """A reason may quote a value of any length, of which its end says little."""
    if len(reason) > MOST_REASON:
        reason = f"{reason[:MOST_REASON]}…"
    return Response(json_bytes({"error": reason}), status, dict(headers or {}), "application/json")
