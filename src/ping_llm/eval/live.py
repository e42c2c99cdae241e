"""Hosts in, what a model expected of pings of right now, and what the system's `ping` measures, out."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from typing import Any

from ping_llm.eval.options import EvalOptions
from ping_llm.inference.model import PingModel

_REPLY = re.compile(r"icmp_seq=(\d+) .*?time[=<]([\d.]+) ?ms")
_SENT = re.compile(r"(\d+) packets transmitted")
_ADDRESS = re.compile(r"^PING \S+ ?\(([0-9a-fA-F.:]+)\)|^PING ([0-9a-fA-F:]+)\(", re.MULTILINE)
WAIT_S, SLACK_S = 2, 10


def parse_ping(text: str) -> tuple[str, list[float]]:
    """The address that Linux's ping (iputils or BusyBox) pinged, and an RTT in ms for each packet sent, −1 = no answer."""
    address, sent = _ADDRESS.search(text), _SENT.search(text)
    if not address or not sent:
        first = text.strip().splitlines()[0] if text.strip() else "nothing"
        raise ValueError(f"the output of ping cannot be read: it said {first!r}")
    rtts: dict[int, float] = {}
    for number, rtt_ms in _REPLY.findall(text.replace(" seq=", " icmp_seq=")):
        rtts.setdefault(int(number), float(rtt_ms))  # a duplicate comes later
    missing = int(sent[1]) - len(rtts)
    return address[1] or address[2], list(rtts.values()) + [-1.0] * missing


def ping_host(src: str, host: str, count: int) -> list[dict[str, Any]]:
    """Pings a host; measurements as `PingModel` takes them. ValueError if there is no ping, or the host has no address."""
    if host.startswith("-") or not shutil.which("ping"):
        raise ValueError(f"{host!r} cannot be pinged; give a host name or an address, on a system that has ping")
    argv, started = ["ping", "-n", "-c", str(count), "-W", str(WAIT_S), host], int(time.time())
    done = subprocess.run(argv, capture_output=True, text=True, timeout=count * (WAIT_S + 1) + SLACK_S, check=False)
    if not _SENT.search(done.stdout):
        reason = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise ValueError(f"{host} cannot be pinged: {reason[0]}")
    address, rtts = parse_ping(done.stdout)
    return [{"src_addr": src, "dst_addr": address, "event_time": started + i, "rtt": x} for i, x in enumerate(rtts)]


def compare_live(options: EvalOptions) -> list[dict[str, Any]]:
    """A line for each host: what the model expected, given the pings of the hosts before, and what came."""
    model = PingModel.load(options.trained, options.device)
    context: list[dict[str, Any]] = []
    lines, hosts = [], options.live or ()
    for host in hosts:
        measured = ping_host(options.src, host, options.count)
        address = measured[0]["dst_addr"]
        found = model.rtt(options.src, address, at=measured[0]["event_time"], context=context)
        median, low, high = (float(found.quantile(level)) for level in (0.5, 0.05, 0.95))
        expected = {"expected_ms": median, "low_ms": low, "high_ms": high, "p_fail": float(found.p_fail)}
        answers = sorted(one["rtt"] for one in measured if one["rtt"] >= 0)
        came = {"measured_ms": answers[len(answers) // 2] if answers else None, "told": len(context)}
        lines.append({"host": host, "address": address} | expected | came)
        context = sorted(context + measured, key=lambda one: one["event_time"])
        while len(hosts) > 1 and int(time.time()) <= context[-1]["event_time"]:
            time.sleep(0.2)  # a context is of earlier seconds than the query
    return lines
