"""A wish to rent one instance in; that one instance out, however often the process that rents it is killed.

What is about to be done is on the disk before it is done. The API has no requests that can be repeated safely, but an
instance has a name: a rental draws one at random, once, and before each launch it looks whether an instance has it.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ping_llm.data.ingest.download import Transient
from ping_llm.launch.gpu_cloud import GONE, NO_CAPACITY, Busy, GPUCloud, Instance, InstanceType, Refused
from ping_llm.system.files import write_atomically
from ping_llm.system.progress import say

STATE_NAME = "rental.json"


class Gone(ValueError):
    """The instance has ended."""


@dataclass
class Rental:
    """One instance from the wish to its end, as its file says it."""

    path: Path = field(repr=False)
    watch: str  # the name that the user gave
    command: str
    instance_name: str
    requested_s: float = 0.0  # Unix time of a request to launch that may have rented the instance; 0 = there is none
    instance: str = ""  # its id, once known
    type: str = ""
    region: str = ""
    cents_per_hour: int = 0
    started: bool = False  # the command may have been started
    code: int | None = None  # with which the command ended
    brought: bool = False  # the results are here
    terminated: bool = False

    @classmethod
    def open(cls, folder: Path, watch: str, command: str) -> Rental:
        """The rental of a folder, or a new one that is not on the disk yet; ValueError if it is of another command."""
        path = folder / STATE_NAME
        if not path.exists():
            return cls(path, watch, command, f"{watch}-{secrets.token_hex(4)}")
        try:
            rental = cls(path, **json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{path} is no record of a rental; look for its instance in the console") from None
        if rental.command != command and (rental.requested_s or rental.instance):
            raise ValueError(
                f"{rental} was rented for another command, {rental.command!r}; give that one, or another --name"
            )
        rental.command = command
        return rental

    def save(self) -> None:
        """Returns when it is on the disk."""
        text = json.dumps({name: value for name, value in asdict(self).items() if name != "path"}, indent=1)
        write_atomically(self.path, text + "\n")

    def __str__(self) -> str:
        return f"instance {self.instance or self.instance_name}"

    @property
    def may_cost(self) -> bool:
        """Whether it costs money, or nobody knows."""
        return self.requested_s > 0 and not self.terminated

    @property
    def costs(self) -> str:
        """What it costs, in words."""
        price, hours = self.cents_per_hour / 100, max(time.time() - self.requested_s, 0.0) / 3600
        return f"${price:,.2f} an hour, about ${price * hours:,.2f} so far"

    def take(self, cloud: GPUCloud, kind: InstanceType, region: str, ssh_key: str) -> bool:
        """Launches the instance unless there is one already; gives whether there is one.

        ValueError if it was refused, or if the account has an instance of another rental of this name.
        """
        if found := self._find(cloud):
            self._adopt(found.id)
            return True
        self.type, self.region, self.cents_per_hour = kind.name, region, kind.cents_per_hour
        self.requested_s = time.time()
        self.save()
        try:
            self._adopt(cloud.launch(kind.name, region, ssh_key, self.instance_name))
        except Refused as error:
            self._withdraw()
            if error.code != NO_CAPACITY:
                raise
            say(f"{kind.name} in {region} was gone before it could be taken; the watch goes on")
        except Busy as error:
            self._withdraw()
            say(f"{cloud.host}: {error}; the watch goes on")
            cloud.sleep(max(error.wait_s, cloud.pace.launch_spacing_s))
        except Transient as error:
            say(f"{cloud.host}: {error}: perhaps the instance was launched, perhaps not")
            return self.settle(cloud)
        return bool(self.instance)

    def settle(self, cloud: GPUCloud) -> bool:
        """Finds out what became of a request to launch without an answer; gives whether there is an instance."""
        if not self.requested_s or self.instance:
            return bool(self.instance)
        say(f"looking for {self}, which may have been launched")
        while not (found := self._find(cloud)):
            waited_s = time.time() - self.requested_s
            if not 0 <= waited_s < cloud.pace.settle_s:
                say(f"{self} was not launched; the watch goes on")
                self._withdraw()
                return False
            cloud.pause(min(cloud.pace.check_s, cloud.pace.settle_s - waited_s))
        self._adopt(found.id)
        return True

    def await_active(self, cloud: GPUCloud) -> Instance:
        """The instance, once it has booted; Gone, or ValueError if that takes too long."""
        last = ""
        while True:
            instance = cloud.persist(lambda: cloud.instance(self.instance))
            waited_s = time.time() - self.requested_s
            if instance.status == "active" and instance.ip:
                return instance
            if instance.status != GONE or waited_s > cloud.pace.settle_s:  # it need not be listed at once
                self.check(instance)
            if instance.status == "unhealthy":
                raise ValueError(f"{self} is unhealthy")
            if waited_s > cloud.pace.boot_s:
                raise ValueError(f"{self} is still {instance.status} after {waited_s / 60:.0f} minutes")
            if instance.status != last:
                say(f"{self} is {instance.status}")
                last = instance.status
            cloud.pause(cloud.pace.check_s)

    def check(self, instance: Instance) -> None:
        """Gone if the instance has ended."""
        if instance.gone:
            self.terminated = True
            self.save()
            raise Gone(f"{self} is {instance.status}")

    def end(self, cloud: GPUCloud) -> None:
        """Terminates the instance, and returns when the API says so."""
        while not self.terminated:
            cloud.persist(lambda: cloud.terminate(self.instance))
            if cloud.persist(lambda: cloud.instance(self.instance)).gone:
                self.terminated = True
                self.save()
            else:
                cloud.pause(cloud.pace.check_s)

    def _find(self, cloud: GPUCloud) -> Instance | None:
        """The instance of this rental; ValueError if there is one of another rental of this watch."""
        instances: Sequence[Instance] = cloud.persist(cloud.instances)
        own = [instance for instance in instances if instance.name == self.instance_name]
        pattern = re.compile(re.escape(self.watch) + "-[0-9a-f]{8}")
        others = [i for i in instances if i not in own and not i.gone and pattern.fullmatch(i.name)]
        if others and not own:
            raise ValueError(
                f"there is {others[0].name} already ({others[0].id}, {others[0].status}), of another machine or folder: "
                "one is enough; terminate it in the console, or give this watch another --name"
            )
        return own[0] if own else None

    def _adopt(self, id: str) -> None:
        self.instance, self.requested_s = id, self.requested_s or time.time()
        self.save()

    def _withdraw(self) -> None:
        self.requested_s = 0.0
        self.save()
