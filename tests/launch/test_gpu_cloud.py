"""Requests to a server that speaks Lambda Cloud's API, and to one that misbehaves."""

import re
import socket

import pytest
from gpu_cloud_server import H100, KEY, NO_CAPACITY, drop, error, kind, raw, types

from ping_llm.data.ingest.download import Transient
from ping_llm.launch.gpu_cloud import GONE, Busy, GPUCloud, InstanceType, Pace, Refused, Wanted


class Sleeps(list):
    """What was waited, without waiting."""

    def __call__(self, seconds):
        if seconds > 0:
            self.append(seconds)


def cloud(gpus, sleep=None, key=KEY, **pace):
    pace = {"spacing_s": 0.0, "launch_spacing_s": 0.0, "seed": 0} | pace
    return GPUCloud(gpus.api, key, Pace(**pace), Sleeps() if sleep is None else sleep)


@pytest.mark.parametrize(
    ("text", "fitting"),
    [
        ("8xH100", {"gpu_8x_h100_sxm5"}),
        ("8×h100", {"gpu_8x_h100_sxm5"}),
        ("8xH100-SXM5", {"gpu_8x_h100_sxm5"}),
        ("H100", {"gpu_1x_h100_pcie"}),
        ("1xH100-SXM5", set()),
        ("8xA100", {"gpu_8x_a100", "gpu_8x_a100_80gb_sxm4"}),
        ("8xA100-80GB", {"gpu_8x_a100_80gb_sxm4"}),
        ("A10", {"gpu_1x_a10"}),
        ("H200", set()),
        ("2xH100", set()),
        ("gpu_1x_gh200", {"gpu_1x_gh200"}),
    ],
)
def test_gpus_are_found_by_number_and_whole_words(text, fitting):
    offered = [
        ("gpu_8x_h100_sxm5", 8, "8x H100 (80 GB SXM5)"),
        ("gpu_1x_h100_pcie", 1, "1x H100 (80 GB PCIe)"),
        ("gpu_8x_a100", 8, "8x A100 (40 GB SXM4)"),
        ("gpu_8x_a100_80gb_sxm4", 8, "8x A100 (80 GB SXM4)"),
        ("gpu_1x_a10", 1, "1x A10 (24 GB PCIe)"),
        ("gpu_1x_gh200", 1, "1x GH200 (96 GB)"),
    ]
    found = {name for name, gpus, text_ in offered if Wanted.parse(text).fits(InstanceType(name, gpus, text_, 1, ()))}
    assert found == fitting


@pytest.mark.parametrize("text", ["", "8", "0xH100", "8x", "-1xH100", "9999xH100"])
def test_what_names_no_gpus_is_said_to_be_so(text):
    with pytest.raises(ValueError, match="names no GPUs; write 8xH100"):
        Wanted.parse(text)


def test_types_instances_keys_and_launches_are_those_of_the_documentation(gpus):
    gpus.types = types("us-east-1", "us-west-3")
    api = cloud(gpus)
    assert api.types() == [
        InstanceType("gpu_1x_a10", 1, "1x A10 (24 GB PCIe)", 75, ("us-east-1",)),
        InstanceType("gpu_8x_a100", 8, "8x A100 (40 GB SXM4)", 1592, ()),
        InstanceType(H100, 8, "8x H100 (80 GB SXM5)", 3192, ("us-east-1", "us-west-3")),
    ]
    assert api.ssh_keys() == ["mine"] and api.instances() == []
    id = api.launch(H100, "us-west-3", "mine", "ping-llm-1")
    assert gpus.launches == [
        {"region_name": "us-west-3", "instance_type_name": H100, "ssh_key_names": ["mine"], "name": "ping-llm-1"}
    ]
    assert [(one.id, one.name, one.status) for one in api.instances()] == [(id, "ping-llm-1", "booting")]
    assert (api.instance(id).status, api.instance(id).ip) == ("active", "127.0.0.1")
    api.terminate(id)
    assert api.instance(id).gone and api.instance("another").status == GONE
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in gpus.headers)


def test_a_type_without_a_readable_price_cannot_be_bought(gpus, caplog):
    whole = kind(8, "H100 (80 GB SXM5)", 3192, "us-east-1")
    broken = [
        whole | {"instance_type": whole["instance_type"] | {"price_cents_per_hour": price}} for price in (0, None)
    ]
    broken += [{"instance_type": whole["instance_type"]}, {"regions_with_capacity_available": []}, "H100", None]
    broken.append(whole | {"instance_type": whole["instance_type"] | {"specs": {}}})
    gpus.types = {f"gpu_{i}": entry for i, entry in enumerate(broken)} | {H100: whole}
    assert [one.name for one in cloud(gpus).types()] == [H100]
    assert "left out" in caplog.text


def test_waits_that_the_server_demands_are_kept(gpus):
    sleeps = Sleeps()
    busy = error(429, "global/rate-limited", Retry_After="7")
    gpus.faults["GET instance-types"] = [busy, error(503, "global/unknown", Retry_After="9"), busy]
    api = cloud(gpus, sleeps)
    assert len(api.persist(api.types)) == 3 and gpus.count("GET instance-types") == 4
    assert sleeps == [7, 9, 7]
    gpus.faults["GET instance-types"] = [error(429, "", Retry_After="100000")]
    with pytest.raises(
        ValueError, match=r"asks to wait 100,000 s \(429 Too Many Requests .*\); start again after that"
    ):
        api.persist(api.types)


def test_failures_that_may_pass_are_waited_out_ever_longer(gpus, capsys):
    sleeps = Sleeps()
    api = cloud(gpus, sleeps, backoff_s=2.0, longest_backoff_s=60.0)
    api.types()  # the server has answered well: from now on it is waited for without end
    odd = [b"", b"\xff", b"<html>", b"[]", b'{"data": null}', b'{"data": 7}', b"{" * 100_000, b'{"error": 7}']
    failures = [
        error(500, "global/unknown"),
        error(502, ""),
        raw(b"nothing", 503),
        drop,
        error(408, ""),
        error(409, ""),
    ]
    failures += [error(400, "provider/internal-unavailable"), *map(raw, odd)]
    gpus.faults["GET instance-types"] = list(failures)
    assert api.persist(api.types)
    assert gpus.count("GET instance-types") == 2 + len(failures) == len(sleeps) + 2
    longest = [min(2.0 * 2**i, 60.0) for i in range(len(failures))]
    assert all(most / 2 <= waited <= most for waited, most in zip(sleeps, longest, strict=True))
    assert len(set(sleeps[6:])) > 3  # half of it is random
    assert capsys.readouterr().err.count("again in") == len(failures)


def test_an_address_that_never_answers_well_ends_the_watch(gpus):
    api = cloud(gpus)
    gpus.faults["GET instance-types"] = [raw(b"<html>")] * 20
    with pytest.raises(ValueError, match="not of this API, 8 times in a row; is the address wrong"):
        api.persist(api.types)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    with pytest.raises(ValueError, match="is this machine offline, or the address wrong"):
        GPUCloud(url, KEY, Pace(), Sleeps()).types()


def test_what_another_try_would_meet_again_ends_at_once_without_showing_the_key(gpus):
    with pytest.raises(
        Refused, match=r"does not accept the key in LAMBDA_API_KEY: 401 .*expired, or deleted. Do better"
    ):
        cloud(gpus, key="wrong").types()
    api, url = cloud(gpus), re.escape(gpus.api)
    for code, name, text in [
        (403, "global/account-inactive", rf"^{url}/instance-types: 403 Forbidden \(key … of you Do better.\)$"),
        (404, "global/not-found", "404 Not Found"),
        (400, "global/invalid-parameters", "400 Bad Request"),
    ]:
        gpus.faults["GET instance-types"] = [error(code, name, f"key {KEY}\n of you")]
        with pytest.raises(Refused, match=text) as refused:
            api.persist(api.types)
        assert refused.value.code == name and KEY not in str(refused.value)
    gpus.faults["POST instance-operations/launch"] = [raw(b"", 301, Location="https://example.com/api")]
    with pytest.raises(Refused, match=r"has moved to https://example.com/api; give that as --api"):
        api.launch(H100, "us-east-1", "mine", "a")
    assert not gpus.launches


def test_a_launch_says_whether_it_may_have_happened(gpus):
    api, gpus.types = cloud(gpus), types("us-east-1")
    api.types()
    launch, request = lambda: api.launch(H100, "us-east-1", "mine", "a"), "POST instance-operations/launch"
    for fault, what in [
        (error(400, NO_CAPACITY), Refused),
        (error(429, ""), Busy),
        (error(500, ""), Transient),
        (drop, Transient),
        (raw(b'{"data": {"instance_ids": []}}'), Transient),
        (raw(b'{"data": {"instance_ids": [7]}}'), Transient),
        (raw(b'{"data": {}}'), Transient),
    ]:
        gpus.faults[request] = [fault]
        with pytest.raises(what) as failure:
            launch()
        assert type(failure.value) is what
    assert not gpus.launches


def test_requests_are_spaced_as_the_api_demands(gpus):
    sleeps = Sleeps()
    api, gpus.types = cloud(gpus, sleeps, spacing_s=1000.0, launch_spacing_s=12_000.0), types("us-east-1")
    api.types()
    assert sleeps == []
    api.types()
    assert sleeps.pop() == pytest.approx(1000, rel=0.1) and not sleeps
    api.launch(H100, "us-east-1", "mine", "a")
    assert sleeps.pop() == pytest.approx(1000, rel=0.1) and not sleeps
    api.launch(H100, "us-east-1", "mine", "b")
    assert sleeps[0] == pytest.approx(12_000, rel=0.1)


def test_looks_come_at_random_times(gpus):
    sleeps = Sleeps()
    api = cloud(gpus, sleeps)
    for _ in range(100):
        api.pause(30.0)
    assert 22.5 <= min(sleeps) < 25 and 35 < max(sleeps) <= 37.5


@pytest.mark.parametrize(
    ("api", "key", "said"),
    [
        ("http://cloud.lambda.ai/api/v1", KEY, "in clear text; write https"),
        ("cloud.lambda.ai", KEY, "is no address of a server"),
        ("https://key@cloud.lambda.ai", KEY, "is no address of a server"),
        ("https://cloud.lambda.ai", "", "no key in the environment variable LAMBDA_API_KEY"),
        ("https://cloud.lambda.ai", "a\nb", "holds spaces or characters"),
        ("https://cloud.lambda.ai", "clé", "holds spaces or characters"),
    ],
)
def test_addresses_and_keys_that_cannot_be_right_are_refused(api, key, said):
    with pytest.raises(ValueError, match=said) as refused:
        GPUCloud(api, key)
    assert not key or key not in str(refused.value)
