"""A server on the loopback interface that speaks Lambda Cloud's API as far as a watch needs it, and an `ssh` and an `rsync`
that reach a folder of this machine as if it were the instance's home."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from waiting import HANG_S

from ping_llm.launch.gpu_cloud import GPUCloud, Pace
from ping_llm.launch.watch import Watch, watch

KEY = "secret_ping-llm_0123"
ID = "0920582c7ff041399e34823a0be6254"
NO_CAPACITY = "instance-operations/launch/insufficient-capacity"
QUICK = {
    "every_s": 0.02,
    "spacing_s": 0.0,
    "launch_spacing_s": 0.0,
    "backoff_s": 0.01,
    "longest_backoff_s": 0.02,
    "check_s": 0.02,
}
QUICK |= {
    "settle_s": 0.3,
    "boot_s": HANG_S,
    "login_s": HANG_S,
    "lost_s": HANG_S,
    "look_s": 0.05,
    "turn_s": HANG_S,
    "seed": 0,
}
LAUNCH, INSTANCE, TYPES = "POST instance-operations/launch", "GET instances/ID", "GET instance-types"
TERMINATE = "POST instance-operations/terminate"
TRAIN = "cat configs/tiny.toml && mkdir -p runs/tiny && echo once >>runs/tiny/metrics && echo trained"
RENT = {"gpu": "8xH100", "launch": TRAIN, "yes": True, "copy": ("configs",), "bring": ("runs/tiny",)}
PROGRAM = """
import json, sys
from pathlib import Path
from ping_llm.cli import exit_code
from ping_llm.launch.gpu_cloud import GPUCloud, Pace
from ping_llm.launch.watch import Watch, watch
options, pace, key = json.loads(sys.argv[1])
options["state"] = Path(options["state"])
sys.exit(exit_code(lambda: watch(Watch(**options), GPUCloud(options["api"], key, Pace(**pace)))))
"""


def kind(gpus, model, cents, *regions):
    """An entry of instance-types as the documentation shows it."""
    specs = {"vcpus": 26 * gpus, "memory_gib": 225 * gpus, "storage_gib": 2816, "gpus": gpus}
    described = {"description": f"{gpus}x {model}", "gpu_description": model, "price_cents_per_hour": cents}
    where = [{"name": region, "description": f"{region}, USA"} for region in regions]
    return {"instance_type": described | {"specs": specs}, "regions_with_capacity_available": where}


H100 = "gpu_8x_h100_sxm5"


def types(*regions, cents=3192):
    """What is for rent; eight H100 are free in these regions."""
    return {
        "gpu_1x_a10": kind(1, "A10 (24 GB PCIe)", 75, "us-east-1"),
        "gpu_8x_a100": kind(8, "A100 (40 GB SXM4)", 1592),
        H100: kind(8, "H100 (80 GB SXM5)", cents, *regions),
    }


def error(code, name, message="it was refused", **headers):
    """A reply instead of what was requested."""

    def reply(handler):
        handler.answer(code, {"error": {"code": name, "message": message, "suggestion": "Do better."}}, **headers)

    return reply


def raw(body, code=200, **headers):
    return lambda handler: handler.answer(code, body, **headers)


def drop(handler):
    """Closes the connection without an answer."""
    handler.close_connection = True


def after(reply):
    """Does what was requested, and gives another answer."""

    def act(handler):
        handler.act()
        reply(handler)

    return act


def held(act=True):
    """Does, if `act`, what was requested, and waits until the test lets it go on; then there is no answer."""

    def reply(handler):
        if act:
            handler.act()
        handler.server.holding.set()
        assert handler.server.go_on.wait(HANG_S)
        drop(handler)

    return reply


@contextmanager
def serving_gpus():
    with GPUCloudServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.go_on.set()
        server.shutdown()


class GPUCloudServer(ThreadingHTTPServer):
    """`faults` has replies for requests such as "POST instance-operations/launch", one a request, before it does as it
    should."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.faults, self.requests, self.headers = threading.Lock(), {}, [], []
        self.holding, self.go_on = threading.Event(), threading.Event()
        self.types, self.keys, self.instances = types(), ["mine"], {}
        self.launches, self.ip, self.boots = [], "127.0.0.1", 1  # looks until an instance is active
        self.on_look = lambda looks: None  # called at each look at the types

    @property
    def api(self):
        return f"http://127.0.0.1:{self.server_address[1]}/api/v1"

    def count(self, request):
        return sum(one == request for one in self.requests)

    def launch(self, body):
        assert set(body) == {"region_name", "instance_type_name", "ssh_key_names", "name"}
        assert len(body["ssh_key_names"]) == 1 and set(body["ssh_key_names"]) <= set(self.keys)
        self.launches.append(body)
        id = f"{ID}{len(self.launches)}"
        offer = self.types[body["instance_type_name"]]
        assert body["region_name"] in [region["name"] for region in offer["regions_with_capacity_available"]]
        self.instances[id] = {"id": id, "name": body["name"], "status": "booting", "looks": self.boots}
        return {"instance_ids": [id]}

    def show(self, id):
        instance = self.instances[id]
        if instance["status"] == "booting":
            instance["looks"] -= 1
            if instance["looks"] < 0:
                instance |= {"status": "active", "ip": self.ip}
        return {name: value for name, value in instance.items() if name != "looks"}

    def terminate(self, body):
        for id in body["instance_ids"]:
            self.instances[id]["status"] = "terminating"
        return {"terminated_instances": [self.show(id) for id in body["instance_ids"]]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, self.body = self.server, None
        if length := self.headers["Content-Length"]:
            self.body = json.loads(self.rfile.read(int(length)))
        self.request_name = f"{self.command} {self.path.removeprefix('/api/v1/')}"
        name = "GET instances/ID" if "instances/" in self.path else self.request_name
        with server.lock:
            server.requests.append(name)
            server.headers.append(dict(self.headers))
            faults = server.faults.get(name, [])
            fault = faults.pop(0) if faults else None
        if fault:
            return fault(self)
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return error(401, "global/invalid-api-key", "API key was invalid, expired, or deleted.")(self)
        data = self.act()
        if data is None:
            return error(404, "global/object-does-not-exist", "Specified instance does not exist.")(self)
        self.answer(200, {"data": data})

    do_POST = do_GET

    def act(self):
        server = self.server
        match self.request_name.split():
            case "GET", "instance-types":
                server.on_look(server.count("GET instance-types"))
                return server.types
            case "GET", "ssh-keys":
                return [{"id": f"id-{name}", "name": name, "public_key": "ssh-ed25519 AAAA"} for name in server.keys]
            case "GET", "instances":
                with server.lock:
                    return [server.show(id) for id, one in server.instances.items() if one["status"] != "terminated"]
            case "POST", "instance-operations/launch":
                with server.lock:
                    return server.launch(self.body)
            case "POST", "instance-operations/terminate":
                with server.lock:
                    return server.terminate(self.body)
            case "GET", path if path.removeprefix("instances/") in server.instances:
                with server.lock:
                    return server.show(path.removeprefix("instances/"))

    def answer(self, code, body, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in ({"Content_Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", len(body))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


# In `down`, nobody can be reached; the first script that holds the text in `breaks` loses its connection.
SSH = """#!/bin/sh
[ -e "$MACHINE/down" ] && { echo "ssh: connect to host 127.0.0.1 port 22: Connection refused" >&2; exit 255; }
for script; do :; done
echo "$*" | head -n 1 | sed "s/ sh -c .*//; s/^/ssh /" >>"$MACHINE/calls"
HOME=$MACHINE/home; export HOME; cd "$HOME" || exit 1
breaks=$(cat "$MACHINE/breaks" 2>/dev/null)
case $script in
  *"${breaks:-nothing}"*)
    rm "$MACHINE/breaks"
    if [ "$breaks" = setsid ]; then sh -c "$script"; else sh -c "$script" & sleep 0.5; kill $!; fi
    exit 255 ;;
esac
exec sh -c "$script"
"""
RSYNC = """#!/bin/sh
echo "rsync $*" >>"$MACHINE/calls"
[ -e "$MACHINE/down" ] && { echo "rsync: connection unexpectedly closed" >&2; exit 12; }
while [ "$1" != -- ]; do shift; done; shift
for last; do :; done
missing() { echo "rsync: [sender] link_stat \\"$1\\" failed: No such file or directory (2)" >&2; exit 23; }
case $last in
  *:*) while [ -e "$MACHINE/hold-copy" ]; do sleep 0.02; done
    mkdir -p "$MACHINE/home/ping-llm"
    for path; do [ "$path" = "$last" ] || cp -RL --parents "$path" "$MACHINE/home/ping-llm/" || missing "$path"; done ;;
  *) while [ -e "$MACHINE/hold-bring" ]; do sleep 0.02; done
    cp -R "$MACHINE/home/ping-llm/${1#*:ping-llm/}" "$last" 2>/dev/null || missing "$1" ;;
esac
"""


def fake_machine(folder):
    """A home folder that the `ssh` and `rsync` in `folder/bin` reach; the environment in which they are found."""
    (folder / "home").mkdir(parents=True)
    (folder / "bin").mkdir()
    for name, script in (("ssh", SSH), ("rsync", RSYNC)):
        path = folder / "bin" / name
        path.write_text(script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {"MACHINE": str(folder), "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def go(gpus, tmp_path, key=KEY, pace=None, **options):
    """A watch that looks often, in this process."""
    options = {"api": gpus.api, "state": tmp_path / "state"} | options
    return watch(Watch(**options), GPUCloud(gpus.api, key, Pace(**QUICK | (pace or {}))))


def start(gpus, tmp_path, pace=None, **options):
    """The same in a process of its own."""
    options = {"api": gpus.api, "state": str(tmp_path / "state")} | options
    argv = [sys.executable, "-c", PROGRAM, json.dumps([options, QUICK | (pace or {}), KEY])]

    def begin():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it

    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=begin)


def ran():
    """How often the command ran, by what it brought back."""
    return Path("runs/tiny/metrics").read_text().split()
