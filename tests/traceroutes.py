"""Hand-written traceroute results in the shape of Atlas firmware 5080, for the tests of preparing data."""

from pings import ping


def trace(*hops, **changes) -> dict:
    """One result; each of `hops` is a list of replies, or whatever else a hop may be. A change to None leaves it out."""
    result = [{"hop": i, "result": hop} if isinstance(hop, list) else hop for i, hop in enumerate(hops, 1)]
    unlike_ping = dict.fromkeys(("ttl", "dup", "rcvd", "sent", "min", "max", "avg", "step"))
    shape = {"endtime": 1_700_000_009, "paris_id": 3, "msm_id": 5001, "msm_name": "Traceroute", "type": "traceroute"}
    return ping(**{**unlike_ping, **shape, "result": result, **changes})


def reply(address, rtt=None, **changes) -> dict:
    """One reply of a hop."""
    return {"from": address, "ttl": 250, "size": 28} | ({} if rtt is None else {"rtt": rtt}) | changes
