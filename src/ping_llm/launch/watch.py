"""A kind of GPU in; the news that some are free, or a run that was trained on them and brought back, out."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff

from ping_llm.launch.gpu_cloud import KEY_VARIABLE, LAMBDA_API, GPUCloud, InstanceType, Pace, Wanted
from ping_llm.launch.remote import ANSWER_S, FOLDER, Machine, Unreachable
from ping_llm.launch.rental import Rental
from ping_llm.system.files import try_folder, write_lock
from ping_llm.system.progress import say

SHORTEST_INTERVAL_S = 5.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}")
T = TypeVar("T")


@dataclass(frozen=True)
class Watch:
    """Watch Lambda Cloud until GPUs are free; with --launch, rent them once and train there. Not yet tried on Lambda's own
    servers: look into its console beside it. The key is taken from the environment variable LAMBDA_API_KEY."""

    gpu: str
    """8xH100, H100 for one, 8xA100-80GB, or the name of an instance type. The cheapest that fits is taken."""
    region: tuple[str, ...] = ()
    """Regions, the best first; any if absent."""
    launch: Annotated[str, tyro.conf.arg(metavar="CMD")] = ""
    """Rent the first that is free, one only, and run this there, by bash in the folder ~/ping-llm. If absent, the watch
    ends when some are free. The same command goes on where it stopped, and never rents a second one."""
    max_price: float = 0.0
    """Rent, or report, nothing that costs more dollars an hour, all GPUs together."""
    yes: FlagCreatePairsOff[bool] = False
    """Rent at the price that is printed first, instead of --max-price."""
    copy: tuple[str, ...] = ()
    """Files and folders below this one that CMD needs; they have the same paths there."""
    bring: tuple[str, ...] = ()
    """What to copy back every 10 minutes and when CMD has ended, such as its run folder; to the same paths here."""
    terminate: FlagCreatePairsOff[bool] = False
    """Terminate the instance once CMD has ended, well or not, and all of --bring is here. If absent, it stays, and costs."""
    name: str = "ping-llm"
    """Of this rental: one instance each. Another name rents another one."""
    ssh_key: str = ""
    """Name of the SSH key in the account that opens the instance; if absent, the only one there."""
    ssh_user: str = "ubuntu"
    """User on the instance."""
    ssh_option: tuple[str, ...] = ()
    """Options for ssh, such as IdentityFile=~/.ssh/lambda."""
    every_s: float = 30.0
    """Seconds between two looks, a quarter more or less; at least 5."""
    api: str = LAMBDA_API
    """Address of the API, or of another one that works alike."""
    state: Path | None = None
    """Folder for what is known of the rental; ~/.local/state/ping-llm/watch/NAME if absent."""

    def check(self) -> None:
        """ValueError if options are out of range or exclude each other."""
        if not self.every_s >= SHORTEST_INTERVAL_S or math.isinf(self.every_s):
            raise ValueError(f"every_s={self.every_s} must be at least {SHORTEST_INTERVAL_S:g}")
        if not 0 <= self.max_price < math.inf:
            raise ValueError(f"max_price={self.max_price} must be above 0, in dollars an hour")
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name={self.name!r} must be up to 50 letters, digits, - and _")
        if not self.launch.strip() and (self.copy or self.bring or self.terminate or self.yes):
            raise ValueError("--copy, --bring, --terminate and --yes go with --launch CMD")
        for path in (*self.copy, *self.bring):
            if Path(path).is_absolute() or ".." in Path(path).parts or path.startswith(("-", "~")):
                raise ValueError(f"{path}: name a path below this folder, for it is the same on the instance")

    def run(self) -> int:
        """Exit code of the command, or 0."""
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return watch(self, GPUCloud(self.api, key, Pace(every_s=self.every_s)))


COMMANDS = {"watch": Watch}


def watch(options: Watch, cloud: GPUCloud) -> int:
    """Watches, and does what the options say; gives the exit code of the command, or 0.

    ValueError says what was wrong, and, if an instance was rented, whether it still costs money.
    """
    options.check()
    wanted = Wanted.parse(options.gpu)
    if not options.launch.strip():
        kinds = _offers(wanted, options.max_price, cloud)
        _await_free(kinds, options.max_price or math.inf, options, wanted, cloud)
        return 0
    folder = options.state or _state_folder(options.name)
    try_folder(folder)
    with ExitStack() as stack:
        try:
            stack.enter_context(write_lock(folder, folder / "lock"))
        except ValueError:
            raise ValueError(
                f"another watch of the name {options.name!r} is at work ({folder}); one is enough, or give this one "
                "another --name"
            ) from None
        rental = Rental.open(folder, options.name, options.launch)
        try:
            _rent(options, wanted, rental, cloud)
            return _train(options, rental, cloud)
        except KeyboardInterrupt:
            if rental.may_cost:
                say(_still_there(rental))
            raise
        except (ValueError, OSError) as error:
            if not rental.may_cost:
                raise
            if options.terminate and rental.instance and not rental.started:  # nothing of value is on it
                try:
                    rental.end(cloud)
                except ValueError as refused:
                    raise ValueError(
                        f"{error}; it could not be terminated: {refused}. {_still_there(rental)}"
                    ) from None
                raise ValueError(f"{error}; it was terminated, before the command was started") from None
            raise ValueError(f"{str(error).rstrip('.')}. {_still_there(rental)}") from None


def _rent(options: Watch, wanted: Wanted, rental: Rental, cloud: GPUCloud) -> None:
    """Sees that the rental has an instance, however long that takes."""
    if rental.instance or rental.settle(cloud):
        return
    _check_paths(options)
    kinds = _offers(wanted, options.max_price, cloud)
    limit = options.max_price or max(kind.dollars for kind in kinds)
    if not options.max_price and not options.yes:
        raise ValueError(f"nothing is rented without --max-price {limit:.2f} (dollars an hour) or more, or --yes")
    ssh_key = _ssh_key(options.ssh_key, cloud)
    print(f"one instance is rented at up to ${limit:,.2f} an hour, once some are free", flush=True)
    while True:
        kind, region = _await_free(kinds, limit, options, wanted, cloud)
        if rental.take(cloud, kind, region, ssh_key):
            print(f"rented {kind}, in {region}: {rental}", flush=True)
            return
        cloud.pause(cloud.pace.every_s)
        kinds = _fitting(wanted, cloud)


def _train(options: Watch, rental: Rental, cloud: GPUCloud) -> int:
    """Runs the command on the instance and brings its results back; gives its exit code."""
    if not rental.brought:
        if rental.terminated:
            raise ValueError(f"{rental} ended before its results were here. {_again(rental)}")
        machine = _reach(options, rental, cloud)
        if rental.code is None:
            _start(options, rental, cloud, machine)
            _follow(options, rental, cloud, machine)
        _persist(lambda: machine.bring(options.bring), rental, cloud)
        rental.brought = True
        rental.save()
    if options.terminate:
        rental.end(cloud)
    assert rental.code is not None, rental
    here = f"; here: {', '.join(options.bring)}" if options.bring else ""
    print(f"the command ended with code {rental.code}{here}")
    print(f"{rental} is terminated. {_again(rental)}" if rental.terminated else _still_there(rental), flush=True)
    return rental.code


def _start(options: Watch, rental: Rental, cloud: GPUCloud, machine: Machine) -> None:
    """Sees that the command was started, once."""
    state, _ = _persist(machine.state, rental, cloud)
    if not rental.started:
        if state == "new" and options.copy:
            say(f"copying {', '.join(options.copy)} to {machine.host}")
            _persist(lambda: machine.copy(options.copy), rental, cloud)
        rental.started = True  # from here on, the instance may hold results
        rental.save()
    if state == "new":
        _persist(lambda: machine.start(options.launch), rental, cloud)
        say(f"the command runs on {machine.host}")


def _follow(options: Watch, rental: Rental, cloud: GPUCloud, machine: Machine) -> None:
    """Shows what the command prints, and copies its results from time to time, until it has ended."""
    log = rental.path.with_name("log")
    while not _persist(lambda: machine.follow(log, cloud.pace.turn_s, cloud.pace.look_s), rental, cloud):
        try:
            machine.bring(options.bring)
        except ValueError as error:  # it may not be there yet; the last copy is not forgiven
            say(f"not copied yet: {error}")
    state, rental.code = _persist(machine.state, rental, cloud)
    if state != "ended":
        folder = f"~/{FOLDER}/{machine.marks}"
        raise ValueError(f"the command was cut off: did the instance restart? To start it again, remove {folder} there")
    rental.save()


def _reach(options: Watch, rental: Rental, cloud: GPUCloud) -> Machine:
    """The rented machine, once one can log in."""
    address = rental.await_active(cloud).ip
    known_hosts = (rental.path.parent / "known_hosts").absolute()
    machine = Machine(address, options.ssh_user, options.ssh_option, known_hosts, f".{rental.instance_name}")
    say(f"{rental} is active at {address}: {rental.costs}")
    _persist(machine.reach, rental, cloud, cloud.pace.login_s)
    return machine


def _persist(attempt: Callable[[], T], rental: Rental, cloud: GPUCloud, limit_s: float | None = None) -> T:
    """Repeats what finds no connection while the instance is there; Gone, or Unreachable after `limit_s` without one."""
    limit_s, failing_since = cloud.pace.lost_s if limit_s is None else limit_s, None
    while True:
        begin = time.monotonic()
        try:
            return attempt()
        except Unreachable as error:
            now = time.monotonic()
            if failing_since is None or now - begin > ANSWER_S:  # so long an attempt had a connection
                failing_since = now
            if now - failing_since > limit_s:
                raise
            say(f"{error}; trying again")
        rental.check(cloud.persist(lambda: cloud.instance(rental.instance)))
        cloud.pause(cloud.pace.check_s)


def _await_free(
    kinds: Sequence[InstanceType], limit: float, options: Watch, wanted: Wanted, cloud: GPUCloud
) -> tuple[InstanceType, str]:
    """The cheapest that is free at up to `limit` dollars an hour, and its region; `kinds` is what a first look showed."""
    quiet = False
    while True:
        for kind in kinds:
            regions = [region for region in options.region or kind.regions if region in kind.regions]
            if regions and kind.dollars <= limit:
                print(f"free: {kind}, in {regions[0]}", flush=True)
                return kind, regions[0]
        if not quiet:
            say(f"none is free; looking again about every {cloud.pace.every_s:g} s")
            quiet = True
        cloud.pause(cloud.pace.every_s)
        kinds = _fitting(wanted, cloud)


def _offers(wanted: Wanted, limit: float, cloud: GPUCloud) -> list[InstanceType]:
    """The kinds that fit, with their prices printed; ValueError if there are none, or none at up to `limit`, if not 0."""
    every = cloud.persist(cloud.types)
    kinds = [kind for kind in every if wanted.fits(kind)]
    if not kinds:
        names = ", ".join(f"{kind.name} ({kind.description})" for kind in every)
        raise ValueError(f"{cloud.host} has no {wanted.text}, but {names or 'nothing'}")
    for kind in kinds:
        print(f"{kind}; free in {', '.join(kind.regions) or 'no region'}", flush=True)
    if limit and limit < kinds[0].dollars:
        raise ValueError(f"max_price={limit:g} is below the lowest price, {kinds[0].dollars:.2f} dollars an hour")
    return kinds


def _fitting(wanted: Wanted, cloud: GPUCloud) -> list[InstanceType]:
    return [kind for kind in cloud.persist(cloud.types) if wanted.fits(kind)]


def _check_paths(options: Watch) -> None:
    """ValueError, before anything is rented, if something cannot be copied, there or back."""
    for program in ("ssh", "rsync") if options.copy or options.bring else ("ssh",):
        if not shutil.which(program):
            raise ValueError(f"{program} is not installed here, and is needed once something is rented; install it")
    for path in options.copy:
        if not Path(path).exists():
            raise ValueError(f"{path} is not here, so it cannot be copied")
    for path in options.bring:
        if Path(path).exists() and not any(Path(path).is_relative_to(copied) for copied in options.copy):
            raise ValueError(f"{path} is here already; move it away, or give it to --copy too, to go on with it there")


def _ssh_key(name: str, cloud: GPUCloud) -> str:
    """The name, or that of the only key in the account; ValueError names those that are there."""
    names = cloud.persist(cloud.ssh_keys)
    there = f"the account has {', '.join(names) or 'none'}"
    if name and name not in names:
        raise ValueError(f"there is no SSH key {name!r}; {there}")
    if not name and len(names) != 1:
        raise ValueError(f"give --ssh-key NAME, which opens the instance; {there}")
    return name or names[0]


def _state_folder(name: str) -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ping-llm" / "watch" / name


def _still_there(rental: Rental) -> str:
    if not rental.instance:
        return f"{rental} may have been launched: run the same command to find out, or look into the console"
    return (
        f"{rental} is still rented, {rental.costs}: the same command goes on with it; with --terminate it ends it at the "
        "end, as the console does at any time"
    )


def _again(rental: Rental) -> str:
    return f"To rent another one, give another --name, or remove {rental.path.parent}"
