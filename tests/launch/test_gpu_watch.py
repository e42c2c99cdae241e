"""Watching a server that speaks Lambda Cloud's API, and training on what it rents out: a folder of this machine."""

import json
import re

import pytest
from gpu_cloud_server import (
    H100,
    INSTANCE,
    KEY,
    LAUNCH,
    NO_CAPACITY,
    QUICK,
    RENT,
    TERMINATE,
    TRAIN,
    TYPES,
    after,
    drop,
    error,
    go,
    ran,
    raw,
    types,
)
from waiting import HANG_S

from ping_llm.cli import main
from ping_llm.launch.gpu_cloud import GPUCloud, Pace
from ping_llm.launch.remote import Unreachable
from ping_llm.launch.rental import Rental
from ping_llm.launch.watch import _persist


def record(tmp_path):
    return json.loads((tmp_path / "state" / "rental.json").read_text())


def test_it_says_what_is_free_at_what_price_and_ends(gpus, tmp_path, capsys):
    gpus.on_look = lambda looks: setattr(gpus, "types", types(*["us-west-3", "us-east-1"][: max(looks - 2, 0)]))
    assert go(gpus, tmp_path, gpu="8xH100", region=("us-east-1", "us-west-3")) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"{H100} (8x H100 (80 GB SXM5)) at $31.92 an hour; free in no region",
        f"free: {H100} (8x H100 (80 GB SXM5)) at $31.92 an hour, in us-west-3",
    ]
    assert printed.err.count("none is free") == 1
    assert set(gpus.requests) == {TYPES} and len(gpus.requests) == 3
    assert go(gpus, tmp_path, gpu="8xH100", region=("us-east-1", "us-west-3")) == 0
    assert capsys.readouterr().out.endswith("in us-east-1\n")
    gpus.on_look = lambda looks: None
    gpus.types |= {"gpu_8x_h100_dear": types("us-west-9", cents=9900)[H100]}
    assert go(gpus, tmp_path, gpu="8xH100", region=("us-west-9",)) == 0
    assert "gpu_8x_h100_dear" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(ValueError, match=r"max_price=31 is below the lowest price, 31.92 dollars an hour"):
        go(gpus, tmp_path, gpu="8xH100", max_price=31)
    with pytest.raises(ValueError, match=r"has no 8xB200, but gpu_1x_a10 \(1x A10 \(24 GB PCIe\)\), gpu_8x_a100 "):
        go(gpus, tmp_path, gpu="8xB200")


def test_what_is_free_is_rented_once_trained_on_brought_back_and_ended(gpus, tmp_path, machine, capsys):
    gpus.on_look = lambda looks: setattr(gpus, "types", types(*["us-east-1"][: looks - 1]))
    (machine / "home" / "ping-llm" / "runs").mkdir(parents=True)  # of an image that was used before
    assert go(gpus, tmp_path, **RENT, terminate=True) == 0
    [body] = gpus.launches
    assert re.fullmatch("ping-llm-[0-9a-f]{8}", body["name"]) and body["region_name"] == "us-east-1"
    [instance] = gpus.instances.values()
    assert instance["status"] == "terminating" and ran() == ["once"]
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("at $31.92 an hour; free in no region")  # the price comes first
    assert out[1] == "one instance is rented at up to $31.92 an hour, once some are free"
    assert out[2].startswith("free: ") and out[3].startswith(f"rented {H100} ") and instance["id"] in out[3]
    assert out[4:7] == ["[model]", "trained", "the command ended with code 0; here: runs/tiny"]
    assert out[7].startswith(f"instance {instance['id']} is terminated. To rent another one")
    requests = len(gpus.requests)
    assert go(gpus, tmp_path, **RENT, terminate=True) == 0  # again: all of it is done
    assert len(gpus.requests) == requests and ran() == ["once"]
    login = "ubuntu@127.0.0.1"
    calls = (machine / "calls").read_text().splitlines()
    assert all(
        call.startswith("ssh -o BatchMode=yes ") and call.endswith(login) for call in calls if "rsync" not in call
    )
    copies = [call.split(" -- ")[1] for call in calls if call.startswith("rsync")]
    assert copies == [f"configs {login}:ping-llm/", f"{login}:ping-llm/runs/tiny runs/"]


def test_an_instance_stays_unless_it_is_to_be_terminated_and_its_costs_are_said(gpus, tmp_path, machine, capsys):
    gpus.types = types("us-east-1")
    rent = RENT | {"launch": "exit 3", "bring": ()}
    assert go(gpus, tmp_path, **rent) == 3
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"is still rented, \$31.92 an hour, about \$0.0\d so far: .*--terminate", said)
    assert [one["status"] for one in gpus.instances.values()] == ["active"]
    gpus.faults[TERMINATE] = [drop, error(500, "")]
    assert go(gpus, tmp_path, **rent, terminate=True) == 3
    assert [one["status"] for one in gpus.instances.values()] == ["terminating"] and len(gpus.launches) == 1
    assert "is terminated" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"was rented for another command, 'exit 3'; give that one, or another --name"):
        go(gpus, tmp_path, **RENT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"yes": False}, r"nothing is rented without --max-price 31.92 \(dollars an hour\) or more, or --yes"),
        ({"max_price": 31.0}, "below the lowest price, 31.92"),
        ({"gpu": "8xB200"}, "has no 8xB200"),
        ({"ssh_key": "other"}, "there is no SSH key 'other'; the account has mine"),
        ({"copy": ("rows",)}, "rows is not here"),
        ({"bring": ("configs",), "copy": ()}, "configs is here already; move it away, or give it to --copy too"),
    ],
)
def test_nothing_is_rented_that_was_not_agreed_to_or_could_not_be_used(gpus, tmp_path, machine, options, said):
    gpus.types = types("us-east-1")
    with pytest.raises(ValueError, match=said):
        go(gpus, tmp_path, **RENT | options)
    assert not gpus.launches


def test_nothing_is_rented_before_its_keys_and_programs_are_known(gpus, tmp_path, machine, monkeypatch):
    gpus.types, gpus.keys = types("us-east-1"), ["a", "b"]
    with pytest.raises(ValueError, match="give --ssh-key NAME, which opens the instance; the account has a, b"):
        go(gpus, tmp_path, **RENT)
    (machine / "bin" / "rsync").unlink()
    monkeypatch.setenv("PATH", str(machine / "bin"))
    with pytest.raises(ValueError, match="rsync is not installed here"):
        go(gpus, tmp_path, **RENT)
    assert not gpus.launches


def test_a_price_above_the_limit_is_not_paid(gpus, tmp_path, machine):
    prices = iter([3192, 4000, 3193, 3190, 5000])

    def look(_):
        gpus.types = types("us-east-1", cents=next(prices))
        if gpus.types[H100]["instance_type"]["price_cents_per_hour"] == 3192:
            gpus.types[H100]["regions_with_capacity_available"] = []

    gpus.on_look = look
    assert go(gpus, tmp_path, **RENT) == 0  # with --yes, the limit is the price that was printed first
    assert gpus.count(TYPES) == 4 and len(gpus.launches) == 1
    assert record(tmp_path)["cents_per_hour"] == 3190


def test_capacity_that_vanishes_and_a_busy_server_do_not_end_the_watch(gpus, tmp_path, machine, capsys):
    gpus.types = types("us-east-1")
    gpus.faults[LAUNCH] = [error(400, NO_CAPACITY), error(429, ""), error(400, NO_CAPACITY)]
    gpus.faults[TYPES] = [error(429, "", Retry_After="0"), raw(b"{"), drop]
    assert go(gpus, tmp_path, **RENT) == 0
    assert gpus.count(LAUNCH) == 4 and len(gpus.launches) == 1 and ran() == ["once"]
    err = capsys.readouterr().err
    assert err.count("was gone before it could be taken; the watch goes on") == 2 and "perhaps" not in err


def test_a_launch_that_fails_for_good_is_one_line_and_may_be_tried_again(gpus, tmp_path, machine):
    gpus.types = types("us-east-1")
    gpus.faults[LAUNCH] = [error(400, "global/quota-exceeded", "Quota exceeded.")]
    with pytest.raises(
        ValueError, match=r"instance-operations/launch: 400 Bad Request \(Quota exceeded. Do better.\)$"
    ):
        go(gpus, tmp_path, **RENT)
    assert not gpus.launches
    assert go(gpus, tmp_path, **RENT) == 0 and len(gpus.launches) == 1


@pytest.mark.parametrize("answer", [drop, error(500, "global/unknown"), raw(b'{"data": {}}'), raw(b"<html>")])
def test_an_instance_whose_launch_had_no_clear_answer_is_found_by_its_name(gpus, tmp_path, machine, answer):
    gpus.types = types("us-east-1")
    gpus.faults[LAUNCH] = [after(answer)]
    assert go(gpus, tmp_path, **RENT) == 0
    assert len(gpus.launches) == 1 == gpus.count(LAUNCH) and ran() == ["once"]


def test_without_a_clear_answer_it_is_launched_again_only_once_it_cannot_be_there(gpus, tmp_path, machine, capsys):
    gpus.types = types("us-east-1")
    gpus.faults[LAUNCH] = [drop]
    assert go(gpus, tmp_path, **RENT) == 0
    assert gpus.count(LAUNCH) == 2 and len(gpus.launches) == 1
    between = gpus.requests[gpus.requests.index(LAUNCH) + 1 :]
    assert between[: between.index(LAUNCH)].count("GET instances") > 3
    assert "was not launched; the watch goes on" in capsys.readouterr().err


def test_an_instance_that_shows_up_late_is_taken_instead_of_a_second_one(gpus, tmp_path, machine):
    gpus.types = types("us-east-1")
    late = {"instances": 0}

    def appear(looks):
        if looks == 3:  # long after it was given up
            gpus.instances["late"] = {"id": "late", "name": late["name"], "status": "booting", "looks": 1}

    def lose(handler):
        late["name"] = handler.body["name"]
        drop(handler)

    gpus.on_look, gpus.faults[LAUNCH] = appear, [lose, error(400, NO_CAPACITY)]
    assert go(gpus, tmp_path, **RENT) == 0
    assert not gpus.launches and record(tmp_path)["instance"] == "late"


def test_a_record_that_cannot_be_read_rents_nothing(gpus, tmp_path, machine):
    gpus.types = types("us-east-1")
    (tmp_path / "state").mkdir()
    for text in ("{", "[]", "{}", '{"instance": "i"}'):
        (tmp_path / "state" / "rental.json").write_text(text)
        with pytest.raises(ValueError, match="is no record of a rental; look for its instance in the console"):
            go(gpus, tmp_path, **RENT)
    assert not gpus.launches


def test_an_instance_of_another_machine_with_that_name_is_not_doubled(gpus, tmp_path, machine):
    gpus.types = types("us-east-1")
    other = {"id": "i7", "name": "ping-llm-0123abcd", "status": "active", "ip": "198.51.100.2"}
    gpus.instances["i7"] = other
    with pytest.raises(ValueError, match=r"there is ping-llm-0123abcd already \(i7, active\), of another machine"):
        go(gpus, tmp_path, **RENT)
    other["status"] = "terminating"
    assert go(gpus, tmp_path, **RENT) == 0
    gpus.instances["i8"] = {"id": "i8", "name": "ping-llm-9-0123abcd", "status": "active"}
    assert go(gpus, tmp_path / "b", **RENT | {"name": "b", "copy": (), "launch": "true", "bring": ()}) == 0
    assert len(gpus.launches) == 2


@pytest.mark.parametrize("status", ["unhealthy", "terminated"])
def test_an_instance_that_does_not_boot_is_ended_or_said_to_cost(gpus, tmp_path, machine, status):
    gpus.types = types("us-east-1")
    shown = json.dumps({"data": {"id": "i", "status": status}}).encode()
    rented_again = r"ended before its results were here. To rent another one, give another --name"
    gpus.faults[INSTANCE] = [raw(shown)]
    if status == "terminated":
        with pytest.raises(ValueError, match=r"is terminated$"):
            go(gpus, tmp_path, **RENT)
    else:
        with pytest.raises(ValueError, match=r"is unhealthy. instance \w+ is still rented, \$31.92 an hour"):
            go(gpus, tmp_path, **RENT)
        gpus.faults[INSTANCE] = [raw(shown)]
        with pytest.raises(ValueError, match="is unhealthy; it was terminated, before the command was started"):
            go(gpus, tmp_path, **RENT, terminate=True)
    with pytest.raises(ValueError, match=rented_again):
        go(gpus, tmp_path, **RENT)
    assert len(gpus.launches) == 1


def test_an_instance_that_never_boots_is_not_waited_for_without_end(gpus, tmp_path, machine):
    gpus.types, gpus.boots = types("us-east-1"), 10**9
    with pytest.raises(ValueError, match=r"is still booting after 0 minutes; it was terminated"):
        go(gpus, tmp_path, pace={"boot_s": 0.1}, **RENT, terminate=True)
    assert [one["status"] for one in gpus.instances.values()] == ["terminating"]


def test_an_instance_that_cannot_be_terminated_is_said_to_cost(gpus, tmp_path, machine):
    gpus.types, gpus.boots = types("us-east-1"), 10**9
    gpus.faults[TERMINATE] = [error(403, "global/forbidden")]
    said = r"is still booting .*; it could not be terminated: .*403.*\. instance \w+ is still rented, \$31.92 an hour"
    with pytest.raises(ValueError, match=said):
        go(gpus, tmp_path, pace={"boot_s": 0.1}, **RENT, terminate=True)


def test_an_instance_that_is_not_listed_at_once_is_waited_for(gpus, tmp_path, machine):
    gpus.types = types("us-east-1")
    gpus.faults[INSTANCE] = [error(404, "global/object-does-not-exist")] * 2
    assert go(gpus, tmp_path, pace={"settle_s": HANG_S}, **RENT) == 0 and len(gpus.launches) == 1


def test_a_broken_connection_loses_nothing_of_what_the_command_prints(gpus, tmp_path, machine, capsys):
    gpus.types = types("us-east-1")
    (machine / "breaks").write_text("tail -c")
    count = "for i in $(seq 20); do echo line $i; sleep 0.05; done"
    assert go(gpus, tmp_path, **RENT | {"launch": count, "bring": ()}) == 0
    printed = capsys.readouterr()
    lines = [f"line {i}" for i in range(1, 21)]
    assert "no connection to 127.0.0.1" in printed.err and not (machine / "breaks").exists()
    assert (tmp_path / "state" / "log").read_text().splitlines() == lines
    assert [line for line in printed.out.splitlines() if line.startswith("line ")] == lines


def test_a_command_whose_start_was_not_confirmed_is_not_started_twice(gpus, tmp_path, machine, capsys):
    gpus.types = types("us-east-1")
    (machine / "breaks").write_text("setsid")
    assert go(gpus, tmp_path, **RENT) == 0
    assert "no connection to 127.0.0.1" in capsys.readouterr().err and ran() == ["once"]


def test_a_machine_that_cannot_be_reached_is_kept_only_if_it_may_hold_results(gpus, tmp_path, machine):
    gpus.types, down = types("us-east-1"), machine / "down"
    refused = r"no connection to 127.0.0.1: ssh: connect to host .* Connection refused"
    down.touch()
    with pytest.raises(ValueError, match=refused + "; it was terminated, before the command was started"):
        go(gpus, tmp_path, pace={"login_s": 0.1}, **RENT, terminate=True)
    [first] = gpus.instances.values()
    assert first["status"] == "terminating"
    down.unlink()
    kept = RENT | {"launch": f"{TRAIN}; touch {down}", "name": "b", "state": tmp_path / "b"}
    with pytest.raises(ValueError, match=refused + r"\. instance \w+ is still rented"):
        go(gpus, tmp_path, pace={"lost_s": 0.1}, **kept, terminate=True)
    [_, second] = gpus.instances.values()
    assert second["status"] == "active"
    down.unlink()
    assert go(gpus, tmp_path, **kept, terminate=True) == 0 and ran() == ["once"]


def test_an_instance_that_the_provider_takes_away_ends_the_watch(gpus, tmp_path, machine):
    gpus.types = types("us-east-1")

    def take_away(handler):
        for one in gpus.instances.values():
            one["status"] = "preempted"
        handler.answer(200, {"data": handler.act()})

    (machine / "down").touch()
    gpus.boots = 0
    gpus.faults[INSTANCE] = [lambda handler: handler.answer(200, {"data": handler.act()}), take_away]
    with pytest.raises(ValueError, match=r"is preempted$"):
        go(gpus, tmp_path, **RENT)
    with pytest.raises(ValueError, match="ended before its results were here"):
        go(gpus, tmp_path, **RENT)


def test_only_time_without_a_connection_counts_against_it(gpus, tmp_path, monkeypatch):
    api = GPUCloud(gpus.api, KEY, Pace(**QUICK | {"lost_s": 0.0}))
    gpus.instances["i"] = {"id": "i", "name": "a", "status": "active"}
    rental = Rental(tmp_path / "rental.json", "a", "true", "a-0", instance="i")

    def failing(times):
        results = iter([Unreachable("gone")] * times + [7])

        def attempt():
            result = next(results)
            if isinstance(result, Exception):
                raise result
            return result

        return attempt

    assert _persist(failing(1), rental, api) == 7
    with pytest.raises(Unreachable, match="gone"):
        _persist(failing(2), rental, api)
    monkeypatch.setattr("ping_llm.launch.watch.ANSWER_S", -1.0)  # each failure comes after a long connection
    assert _persist(failing(5), rental, api) == 7


def test_results_that_cannot_be_brought_back_keep_the_instance(gpus, tmp_path, machine):
    gpus.types = types("us-east-1")
    with pytest.raises(ValueError, match=r'did not copy everything: .*"\S*runs/large" failed.*is still rented'):
        go(gpus, tmp_path, **RENT | {"bring": ("runs/tiny", "runs/large")}, terminate=True)
    assert [one["status"] for one in gpus.instances.values()] == ["active"]
    assert go(gpus, tmp_path, **RENT, terminate=True) == 0
    assert [one["status"] for one in gpus.instances.values()] == ["terminating"] and ran() == ["once"]


def test_a_command_that_was_cut_off_is_not_taken_for_ended(gpus, tmp_path, machine):
    gpus.types = types("us-east-1")
    cut = "kill -9 $PPID"  # what would write down its exit code
    with pytest.raises(
        ValueError, match=r"was cut off: .*remove ~/ping-llm/.ping-llm-[0-9a-f]{8} there. instance .* still rented"
    ):
        go(gpus, tmp_path, **RENT | {"launch": cut}, terminate=True)
    assert [one["status"] for one in gpus.instances.values()] == ["active"]


def test_the_command_line_watches_and_says_in_one_line_what_is_wrong(gpus, monkeypatch, tmp_path, capsys):
    gpus.types = types("us-east-1")
    monkeypatch.setenv("LAMBDA_API_KEY", KEY)
    argv = ["launch", "watch", "--gpu", "8xH100", "--api", gpus.api]
    assert main(argv) == 0
    assert "free: gpu_8x_h100_sxm5 (8x H100 (80 GB SXM5)) at $31.92 an hour, in us-east-1" in capsys.readouterr().out
    for wrong, said in {
        ("--every-s", "0.1"): "every_s=0.1 must be at least 5",
        ("--max-price", "nan"): "max_price=nan must be",
        ("--terminate",): "go with --launch",
        ("--name", "a b"): "name='a b' must be",
        ("--launch", "true", "--copy", "../rows"): "../rows: name a path below this folder",
        ("--launch", "true", "--bring", "/runs"): "/runs: name a path below this folder",
    }.items():
        assert main([*argv, *wrong]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and said in err and err.count("\n") == 1
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main([*argv, "--launch", "true", "--name", "b"]) == 1
    assert "nothing is rented without --max-price 31.92" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "ping-llm" / "watch").iterdir()] == ["b"]
    monkeypatch.setenv("LAMBDA_API_KEY", "wrong")
    assert main(argv) == 1 and "does not accept the key in LAMBDA_API_KEY" in capsys.readouterr().err
    monkeypatch.delenv("LAMBDA_API_KEY")
    assert main(argv) == 1 and "no key in the environment variable LAMBDA_API_KEY" in capsys.readouterr().err
    assert main(["launch", "--help"]) == 0 and "watch " in capsys.readouterr().out
