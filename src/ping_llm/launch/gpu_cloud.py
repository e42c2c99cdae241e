"""Requests to Lambda Cloud's API in, kinds of instances, instances and launches out.

The API is described at https://docs.lambda.ai/api/cloud, and for programs in https://cloud.lambda.ai/api/v1/openapi.json,
whose version 1.10.0 this follows. It has never been tried on Lambda's own servers.
"""

from __future__ import annotations

import json
import logging
import random
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from tenacity import Retrying, retry_if_exception_type, wait_exponential

from ping_llm.data.ingest.download import Transient, retry_after_s
from ping_llm.system.progress import say

LAMBDA_API = "https://cloud.lambda.ai/api/v1"
KEY_VARIABLE = "LAMBDA_API_KEY"
NO_CAPACITY = "instance-operations/launch/insufficient-capacity"
LONGEST_RETRY_AFTER_S = 86_400.0
_MAY_PASS = {408, 409, 425}  # besides 429 and all from 500 on
_UPSTREAM = "provider/"  # codes of errors that came from behind the API
_TRIES = 8  # before the server has answered well for the first time
T = TypeVar("T")

log = logging.getLogger(__name__)


class Refused(ValueError):
    """An answer that another try would meet again; `code` is the API's name of the error."""

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Busy(Transient):
    """The server did nothing because there were too many requests."""


@dataclass(frozen=True)
class Pace:
    """Seconds between requests, and for how long something is waited for."""

    every_s: float = 30.0  # between two looks at what is free; a quarter more or less, at random
    spacing_s: float = 1.0  # between any two requests: the API allows one a second
    launch_spacing_s: float = 12.0  # between two requests to launch: it allows five a minute
    backoff_s: float = 2.0  # after a failure; doubles up to `longest_backoff_s`, and half of it is random
    longest_backoff_s: float = 300.0
    check_s: float = 10.0  # between two looks at an instance that boots
    settle_s: float = 180.0  # after a launch without an answer, until an instance that is not listed does not exist
    boot_s: float = 1800.0  # until an instance is to be reachable
    login_s: float = 600.0  # until one can log in to an active one
    lost_s: float = 1800.0  # for as long a connection to an instance is tried again
    look_s: float = 1.0  # between two looks at what a command has printed
    turn_s: float = 600.0  # between two copies of the results while a command runs
    seed: int | None = None  # of what is random; None = another one each time


@dataclass(frozen=True)
class InstanceType:
    """A kind of instance, and where some are free."""

    name: str
    gpus: int
    description: str
    cents_per_hour: int  # of the whole instance
    regions: tuple[str, ...]

    @property
    def dollars(self) -> float:
        """An hour of the whole instance."""
        return self.cents_per_hour / 100

    def __str__(self) -> str:
        return f"{self.name} ({self.description}) at ${self.dollars:,.2f} an hour"


@dataclass(frozen=True)
class Instance:
    """A rented machine."""

    id: str
    name: str
    status: str
    ip: str

    @property
    def gone(self) -> bool:
        """Whether it is no longer there, or about to end."""
        return self.status in ("terminated", "terminating", "preempted", GONE)


GONE = "not listed"
"""Status of an instance that the API does not know."""


@dataclass(frozen=True)
class Wanted:
    """So many GPUs of a model in one instance."""

    text: str
    gpus: int
    words: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> Wanted:
        """8xH100, H100 (one), 8xA100-80GB, or the name of an instance type; ValueError."""
        found = re.fullmatch(r"(?:([0-9]{1,3})\s*[x×]\s*)?([a-z].*)", text.strip(), re.IGNORECASE)
        if not found or not int(found[1] or 1):
            raise ValueError(f"{text!r} names no GPUs; write 8xH100 for eight in one machine, H100 for one")
        return cls(text.strip(), int(found[1] or 1), _words(found[2]))

    def fits(self, kind: InstanceType) -> bool:
        """Whether an instance is of this kind: its GPUs are as many, and its description holds all words."""
        if self.text == kind.name:
            return True
        return kind.gpus == self.gpus and self.words <= _words(f"{kind.description} {kind.name}")


class GPUCloud:
    """The API of one provider, with one key."""

    def __init__(
        self, api: str, key: str, pace: Pace | None = None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        parts = urlsplit(api)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError(f"{api!r} is no address of a server; write it like {LAMBDA_API}")
        if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError(f"{api} would carry the key in clear text; write https://")
        if not key:
            raise ValueError(f"there is no key in the environment variable {KEY_VARIABLE}; make one in the console")
        if not re.fullmatch(r"[!-~]+", key):
            raise ValueError(f"the key in {KEY_VARIABLE} holds spaces or characters that no key has; set it again")
        self.api, self.host, self.pace, self.sleep = api.rstrip("/"), parts.netloc, pace or Pace(), sleep
        self._key = key
        self._http = httpx.Client(
            headers={"User-Agent": "ping-llm", "Authorization": f"Bearer {key}"},
            timeout=30.0,
            verify=ssl.create_default_context(),
        )
        self._rng = random.Random(self.pace.seed)
        self._next_turn = self._next_launch = time.monotonic()
        self._reached = self._answered = False

    def types(self) -> list[InstanceType]:
        """All kinds of instances, the cheapest first; one without a price that can be read is left out."""
        kinds = []
        for name, entry in _expect(dict, self._request("GET", "instance-types")).items():
            try:
                kinds.append(_instance_type(name, entry))
            except (KeyError, TypeError, AttributeError):
                log.warning("an instance type is left out, for it has no price or number of GPUs: %s", name)
        return sorted(kinds, key=lambda kind: (kind.cents_per_hour, kind.name))

    def instances(self) -> list[Instance]:
        """All that the account has now."""
        return [_instance(entry) for entry in _expect(list, self._request("GET", "instances"))]

    def instance(self, id: str) -> Instance:
        """One of them; its status is GONE if the API does not know it."""
        try:
            return _instance(self._request("GET", f"instances/{id}"))
        except Refused as error:
            if error.status != httpx.codes.NOT_FOUND:
                raise
            return Instance(id, "", GONE, "")

    def ssh_keys(self) -> list[str]:
        """The names of the keys that the account can put on instances."""
        return [str(_expect(dict, entry).get("name")) for entry in _expect(list, self._request("GET", "ssh-keys"))]

    def launch(self, kind: str, region: str, ssh_key: str, name: str) -> str:
        """Rents one instance, and gives its id. It costs from now on until it is terminated.

        Busy and Refused: it was not launched. Any other Transient: nobody knows.
        """
        self.sleep(max(self._next_launch - time.monotonic(), 0.0))
        self._next_launch = time.monotonic() + self.pace.launch_spacing_s
        body = {"region_name": region, "instance_type_name": kind, "ssh_key_names": [ssh_key], "name": name}
        data = _expect(dict, self._request("POST", "instance-operations/launch", body))
        ids = _expect(list, data.get("instance_ids"))
        if not ids or not isinstance(ids[0], str):
            raise Transient("an answer without the id of the instance")
        return ids[0]

    def terminate(self, id: str) -> None:
        """Ends an instance and its costs, and all that is on it."""
        try:
            self._request("POST", "instance-operations/terminate", {"instance_ids": [id]})
        except Refused as error:
            if error.status != httpx.codes.NOT_FOUND:
                raise

    def pause(self, seconds: float) -> None:
        """Waits for so long, a quarter more or less."""
        self.sleep(seconds * self._rng.uniform(0.75, 1.25))

    def persist(self, attempt: Callable[[], T]) -> T:
        """Repeats what raises Transient: for ever once the server has answered well, else ValueError after some tries."""
        backoff = wait_exponential(self.pace.backoff_s, self.pace.longest_backoff_s)

        def wait_s(state: Any) -> float:
            return max(state.outcome.exception().wait_s, backoff(state) * self._rng.uniform(0.5, 1.0))

        def give_up(state: Any) -> bool:
            return not self._answered and state.attempt_number >= _TRIES

        def announce(state: Any) -> None:
            say(f"{self.host}: {state.outcome.exception()}; again in {state.next_action.sleep:.1f} s")

        transient = retry_if_exception_type(Transient)
        retrying = Retrying(
            stop=give_up, retry=transient, wait=wait_s, before_sleep=announce, sleep=self.sleep, reraise=True
        )
        try:
            return retrying(attempt)
        except Transient as error:
            raise ValueError(
                f"{self.api}: {error}, {_TRIES} times in a row; is the address wrong, or the service down?"
            ) from None

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """What an answer carries; Transient, Refused, or ValueError if no server was ever reached."""
        self.sleep(max(self._next_turn - time.monotonic(), 0.0))
        self._next_turn = time.monotonic() + self.pace.spacing_s
        try:
            response = self._http.request(method, f"{self.api}/{path}", json=body)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            reason = f"no whole answer from {self.host} ({str(error) or type(error).__name__})"
            if self._reached or not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.InvalidURL)):
                raise Transient(reason) from None
            raise ValueError(f"{reason}; is this machine offline, or the address wrong?") from None
        self._reached = True
        data = self._read(response)
        self._answered = True
        return data

    def _read(self, response: httpx.Response) -> Any:
        """The "data" of an answer, or what its status and its error mean."""
        status = f"{response.status_code} {response.reason_phrase}"
        try:
            answer = _expect(dict, json.loads(response.content))
        except (ValueError, RecursionError, Transient):
            answer = {}
        if response.is_success and answer.get("data") is not None:
            return answer["data"]
        error = answer.get("error")
        error = error if isinstance(error, dict) else {}
        code = str(error.get("code") or "")
        said = " ".join(f"{error.get('message') or ''} {error.get('suggestion') or ''}".replace(self._key, "…").split())
        text = f"{status} ({said[:300]})" if said else status
        if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
            raise self._wait(Busy(text), response)
        passing = response.status_code >= 500 or response.status_code in _MAY_PASS or code.startswith(_UPSTREAM)
        if passing or response.is_success:
            raise self._wait(Transient("an answer that is not of this API" if response.is_success else text), response)
        if response.is_redirect:
            moved = response.headers.get("Location", "another address")
            raise Refused(f"{self.api} has moved to {moved}; give that as --api", response.status_code, code)
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise Refused(f"{self.host} does not accept the key in {KEY_VARIABLE}: {text}", 401, code)
        raise Refused(f"{response.request.url.copy_with(query=None)}: {text}", response.status_code, code)

    def _wait(self, error: Transient, response: httpx.Response) -> Exception:
        """The error, with the wait that the server demands; ValueError if that is too long."""
        error.wait_s = retry_after_s(response.headers.get("Retry-After"))
        if error.wait_s > LONGEST_RETRY_AFTER_S:
            return ValueError(f"{self.host} asks to wait {error.wait_s:,.0f} s ({error}); start again after that")
        return error


def _words(text: str) -> frozenset[str]:
    """The words of a description in small letters; 80 GB is one."""
    return frozenset(re.findall(r"[a-z0-9]+", re.sub(r"([0-9]) *gi?b\b", r"\1gb", text.lower())))


def _expect(form: type[T], value: object) -> T:
    """The value; Transient if it is of another type."""
    if not isinstance(value, form):
        raise Transient(f"an answer in a form that is not documented ({type(value).__name__}, not {form.__name__})")
    return value


def _instance_type(name: str, entry: dict[str, Any]) -> InstanceType:
    """KeyError, TypeError or AttributeError if it is not as documented."""
    kind = entry["instance_type"]
    gpus, cents = kind["specs"]["gpus"], kind["price_cents_per_hour"]
    if type(gpus) is not int or type(cents) is not int or cents <= 0:
        raise TypeError(gpus, cents)
    description = str(kind.get("description") or kind.get("gpu_description") or "")
    regions = tuple(str(region["name"]) for region in entry["regions_with_capacity_available"])
    return InstanceType(name, gpus, description, cents, regions)


def _instance(entry: object) -> Instance:
    fields = _expect(dict, entry)
    return Instance(
        _expect(str, fields.get("id")),
        str(fields.get("name") or ""),
        _expect(str, fields.get("status")),
        str(fields.get("ip") or ""),
    )
