"""What a watch of GPUs costs whoever kills it, starts it twice or interrupts it: real processes and signals."""

import re
import signal
from pathlib import Path

from gpu_cloud_server import INSTANCE, LAUNCH, RENT, TERMINATE, TRAIN, held, ran, start, types
from servers import wait_for
from waiting import HANG_S


def calls(machine):
    """What ssh and rsync were called with."""
    return (machine / "calls").read_text() if (machine / "calls").exists() else ""


def brought(machine):
    """How often something was to be copied back."""
    return sum(call.endswith(" runs/") for call in calls(machine).splitlines())


def test_results_are_copied_while_the_command_runs(gpus, tmp_path, machine):
    gpus.types = types("us-east-1")
    begin, end = machine / "begin", machine / "end"
    slow = f"until [ -e {begin} ]; do sleep 0.02; done; {TRAIN}; until [ -e {end} ]; do sleep 0.02; done"
    process = start(gpus, tmp_path, pace={"turn_s": 0.1}, **RENT | {"launch": slow})
    try:
        wait_for(lambda: brought(machine) >= 2)  # there is nothing yet
        begin.touch()
        wait_for(Path("runs/tiny/metrics").exists)
        end.touch()
        out, err = process.communicate(timeout=HANG_S)
        assert process.returncode == 0, err
        assert "not copied yet: rsync to or from 127.0.0.1 did not copy everything: " in err and "trained" in out
    finally:
        process.kill()


def test_of_two_watches_at_once_one_rents(gpus, tmp_path, machine):
    both = [start(gpus, tmp_path, **RENT) for _ in range(2)]
    wait_for(lambda: any(process.poll() is not None for process in both))
    gpus.types = types("us-east-1")
    said = [process.communicate(timeout=HANG_S)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert len(gpus.launches) == 1 and ran() == ["once"]
    [loser] = [text for process, text in zip(both, said, strict=True) if process.returncode]
    assert re.search(
        r"^error: another watch of the name 'ping-llm' is at work \(.*\); one is enough", loser, re.MULTILINE
    )


def test_a_watch_that_is_killed_at_any_moment_goes_on_and_rents_and_runs_once(gpus, tmp_path, machine):
    gpus.types = types("us-east-1")
    go_on = machine / "go"
    command = f"{TRAIN}; until [ -e {go_on} ]; do sleep 0.02; done"
    options = RENT | {"launch": command, "terminate": True}
    hold_copy, hold_bring = machine / "hold-copy", machine / "hold-bring"
    hold_copy.touch()
    hold_bring.touch()

    def moment(condition, then=lambda: None):
        process = start(gpus, tmp_path, **options)
        try:
            wait_for(lambda: condition() or process.poll() is not None)
            assert process.poll() is None, process.communicate()
        finally:
            process.kill()
            process.communicate()
        gpus.go_on.set()
        then()

    def holds(request, reply):
        gpus.holding.clear()
        gpus.go_on.clear()
        gpus.faults[request] = [reply]
        return gpus.holding.is_set

    moment(holds("GET instances", held()))  # before the request to launch
    moment(holds(LAUNCH, held(act=False)))  # it was sent, and never arrived
    moment(holds(LAUNCH, held()))  # it was launched, and the answer is under way
    assert len(gpus.launches) == 1
    moment(holds(INSTANCE, held()))  # while it boots
    moment(lambda: "rsync" in calls(machine), hold_copy.unlink)  # while the inputs are copied
    moment((machine / "home/ping-llm/runs/tiny/metrics").exists, go_on.touch)  # while the command runs
    moment(lambda: brought(machine), hold_bring.unlink)  # while the results are copied
    moment(holds(TERMINATE, held(act=False)))
    moment(holds(TERMINATE, held()))  # it ends, and the watch does not know
    process = start(gpus, tmp_path, **options)
    out, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, err
    assert len(gpus.launches) == 1 and gpus.count(LAUNCH) == 2 and ran() == ["once"]
    assert [one["status"] for one in gpus.instances.values()] == ["terminating"]
    assert "is terminated" in out


def test_an_interrupt_says_what_goes_on_costing(gpus, tmp_path, machine):
    gpus.types, gpus.boots = types("us-east-1"), 10**9
    process = start(gpus, tmp_path, **RENT)
    wait_for(lambda: INSTANCE in gpus.requests)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 130 and re.search(r"is still rented, \$31.92 an hour", err)
