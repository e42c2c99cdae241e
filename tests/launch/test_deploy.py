"""The files for Docker and Kubernetes fit each other and the program; none of the two runs here."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
import yaml
from paths import ROOT
from waiting import HANG_S

from ping_llm.config import parse_config

# Docker


def instructions(text: str) -> list[tuple[str, str]]:
    """Names and values of the instructions of a Dockerfile."""
    lines = "\n".join(line for line in text.splitlines() if line and not line.startswith("#")).replace("\\\n", " ")
    return [(name, value.strip()) for name, _, value in (line.partition(" ") for line in lines.splitlines())]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text())
IMAGE_HOME = "/opt/ping-llm"  # where the image has the files of the repository


def values(name: str) -> list[str]:
    return [value for each, value in DOCKERFILE if each == name]


def copied() -> Iterator[tuple[list[str], str]]:
    """Sources and destination of each COPY from the repository."""
    for value in values("COPY"):
        *sources, destination = value.split()
        if not sources[0].startswith("--from"):
            yield sources, destination


@pytest.mark.parametrize("step", values("RUN"))
def test_the_steps_are_shell_without_errors_of_syntax(step):
    assert subprocess.run(["sh", "-n", "-c", step]).returncode == 0


def test_docker_is_sent_what_the_image_takes_and_nothing_else():
    wanted = [source for sources, _ in copied() for source in sources]
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignore[0] == "*" and {line[1:] for line in ignore if line.startswith("!")} == set(wanted)
    assert ignore[-2:] == ["**/__pycache__", "**/*.egg-info"]  # of patterns that fit, the last decides
    assert all((ROOT / source).exists() for source in wanted)


def image_tree(root: Path) -> None:
    """Lays out what COPY brings into the image, at its place below root."""
    for sources, destination in copied():
        target = root / PurePosixPath(IMAGE_HOME, destination).relative_to("/")
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, target)


@pytest.mark.slow
def test_the_program_finds_its_files_at_their_places_in_the_image(tmp_path):
    image_tree(tmp_path)
    package = tmp_path / "opt/ping-llm/src"
    code = """
import ping_llm.demo, ping_llm.launch.plan
assert ping_llm.demo._CONFIG.is_file() and ping_llm.launch.plan.GPU.named("h100").memory_gb
print(ping_llm.__file__)
"""
    environment = os.environ | {"PYTHONPATH": str(package)}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": HANG_S}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.returncode == 0 and done.stdout.startswith(str(package)), done.stderr
    command = [sys.executable, "-m", "ping_llm", *json.loads(values("CMD")[-1])]
    assert "usage: ping-llm COMMAND" in subprocess.run(command, **run).stdout
    assert values("ENTRYPOINT") == ['["ping-llm"]']


def test_the_services_fit_the_image():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert set(compose["services"]) == {"demo", "ask", "serve"} and set(compose["volumes"]) == {"work"}
    arguments = {value.partition("=")[0] for value in values("ARG")}
    for service in compose["services"].values():
        assert set(service["build"]["args"]) <= arguments and service["build"]["context"] == "."
        mount = f"work:{values('WORKDIR')[-1]}"  # the image makes it the user's own
        assert service["volumes"] in ([mount], [f"{mount}:ro"])
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "privileged" not in service
    commands = [compose["services"][name]["entrypoint"] for name in ("demo", "ask")]
    assert commands == [["python", "-m", "ping_llm.demo"], ["ping-llm", "inference"]]


def test_the_service_answers_on_this_machine_alone_and_says_whether_it_is_well():
    served = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["serve"]
    program, command, *options = served["entrypoint"] + served["command"]
    assert (program, command) == ("ping-llm", "serve") and served["volumes"] == ["work:/work:ro"]
    (port,) = served["ports"]
    assert (
        port == "127.0.0.1:8000:8000" and "--token-file" in options and "'.[plots,baselines,serve]'" in values("RUN")[2]
    )
    check = served["healthcheck"]["test"]
    assert check[:3] == ["CMD", "python", "-c"] and "127.0.0.1:8000/readyz" in check[3]
    compile(check[3], "healthcheck", "exec")


# Kubernetes, by the Python models of the training operator and of Kubernetes

JOB = yaml.safe_load((ROOT / "deploy/pytorchjob.yaml").read_text())


def pods() -> Iterator[dict]:
    for replicas in JOB["spec"]["pytorchReplicaSpecs"].values():
        yield replicas["template"]["spec"]


def read_back(job: dict) -> dict:
    """What the operator's models hold of a manifest: a field that they do not know is lost, a number where a text belongs
    becomes one. ValueError if a field is missing that they need."""
    kubeflow = pytest.importorskip("kubeflow.training", reason="pip install kubeflow-training, of the extra dev")
    client = kubeflow.ApiClient()
    model = client.deserialize(SimpleNamespace(data=json.dumps(job)), "KubeflowOrgV1PyTorchJob")
    return client.sanitize_for_serialization(model)


def test_the_models_of_the_operator_hold_every_field_of_the_job_as_it_is():
    assert read_back(JOB) == JOB


POD = ("spec", "pytorchReplicaSpecs", "Worker", "template", "spec")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "nprocPerNode"), 8),  # a text, in this kind of job
        (("spec", "nProcPerNode"), "8"),
        (("spec", "runPolicy", "backOffLimit"), 20),
        (("spec", "pytorchReplicaSpecs", "Worker", "restartpolicy"), "OnFailure"),
        (("spec", "pytorchReplicaSpecs", "Worker", "replicas"), "one"),
        ((*POD, "containers", 0, "resources", "limits", "nvidia.com/gpu"), 8.5),
        ((*POD, "containers", 0, "volumeMounts", 0, "mountpath"), "/data"),
        ((*POD, "containers", 0, "args", 0), 1),
        ((*POD, "containers", 0, "name"), None),
        ((*POD, "terminationGracePeriod"), 120),
        ((*POD, "volumes", 0, "persistentVolumeClaim", "name"), "ping-llm-data"),
    ],
)
def test_a_field_that_the_operator_would_not_read_is_noticed(path, value):
    job = copy.deepcopy(JOB)
    *parents, last = path
    holder = job
    for name in parents:
        holder = holder[name]
    holder[last] = value
    with contextlib.suppress(ValueError):  # it is missed at once
        assert read_back(job) != job


def test_what_is_done_with_pods_is_one_of_what_the_operator_can_do():
    """Their values are texts in the models, and checked in the cluster."""
    assert JOB["spec"]["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    for replicas in JOB["spec"]["pytorchReplicaSpecs"].values():
        assert replicas["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")


def test_every_rank_has_a_gpu_and_the_batch_can_be_dealt():
    replicas, world = JOB["spec"]["pytorchReplicaSpecs"], 0
    for name, pod in zip(replicas, pods(), strict=True):
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # the operator looks for it
        assert container["resources"]["limits"]["nvidia.com/gpu"] == JOB["spec"]["nprocPerNode"]
        world += replicas[name]["replicas"] * int(JOB["spec"]["nprocPerNode"])
        config, *options = container["args"]
        config = str(ROOT / Path(config).relative_to(IMAGE_HOME))
        parse_config([config, *options], "train").train.check_processes(world)
    assert replicas["Master"]["replicas"] == 1 and world == 16


def test_pods_mount_what_they_read_and_write_and_have_time_to_save():
    for pod in pods():
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
        options = dict(zip(container["args"][1::2], container["args"][2::2], strict=True))
        for name, mount in (("--data.rows", "/data"), ("--train.run-dir", "/runs")):
            assert options[name].startswith(f"{mount}/") and mount in mounts
        torchrun = dict(zip(container["command"][1::2], container["command"][2::2], strict=True))
        assert 60 <= int(torchrun["--shutdown-timeout"]) < pod["terminationGracePeriodSeconds"]
        assert torchrun["-m"] == "ping_llm.train" and options["--data.workers"] == "0"
        assert pod["securityContext"] == {"runAsNonRoot": True, "fsGroup": int(values("USER")[-1])}
