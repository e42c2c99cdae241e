"""The manifest of the service says what Kubernetes reads, gives no rights away, and its command answers its own probes."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import yaml
from paths import ROOT
from serve_runs import PING, make_run
from test_process import Served

from ping_llm.serve.limits import Limits

DEPLOYMENT, SERVICE = yaml.safe_load_all((ROOT / "deploy" / "service.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
TOKEN = "a-token-of-enough-letters"


def read_back(manifest: dict) -> dict:
    """What Kubernetes' own models hold of a manifest: a field that they do not know is lost. ValueError if a field is
    missing that they need."""
    kubernetes = pytest.importorskip("kubernetes.client", reason="pip install kubeflow-training, of the extra dev")
    client = kubernetes.ApiClient()
    model = client.deserialize(SimpleNamespace(data=json.dumps(manifest)), f"V1{manifest['kind']}")
    return client.sanitize_for_serialization(model)


@pytest.mark.parametrize("manifest", [DEPLOYMENT, SERVICE], ids=lambda manifest: manifest["kind"])
def test_the_models_of_kubernetes_hold_every_field_as_it_is(manifest):
    assert read_back(manifest) == manifest


IN_POD = ("spec", "template", "spec")
IN_CONTAINER = (*IN_POD, "containers", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replica"), 1),
        ((*IN_POD, "terminationGracePeriod"), 90),
        ((*IN_POD, "securityContext", "runAsNonRoots"), True),
        ((*IN_CONTAINER, "securityContext", "readOnlyRootFileSystem"), True),
        ((*IN_CONTAINER, "readinessProbe", "httpGet", "url"), "/readyz"),
        ((*IN_CONTAINER, "volumeMounts", 0, "readonly"), True),
        ((*IN_CONTAINER, "args", 6), 8000),
        ((*IN_POD, "volumes", 1, "secret", "name"), "ping-llm-token"),
    ],
)
def test_a_field_that_kubernetes_would_not_read_is_noticed(path, value):
    manifest = copy.deepcopy(DEPLOYMENT)
    *parents, last = path
    holder = manifest
    for name in parents:
        holder = holder[name]
    holder[last] = value
    assert read_back(manifest) != manifest


def test_the_service_finds_its_pods_and_their_port():
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == labels == DEPLOYMENT["spec"]["selector"]["matchLabels"]
    (port,) = CONTAINER["ports"]
    assert [one["targetPort"] for one in SERVICE["spec"]["ports"]] == [port["name"]]
    probes = [CONTAINER[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert all(probe["port"] == port["name"] for probe in probes)
    assert str(port["containerPort"]) == option("--port")


def option(name: str) -> str:
    return CONTAINER["args"][CONTAINER["args"].index(name) + 1]


def test_the_pod_has_no_rights_and_writes_nowhere_but_to_scratch():
    user = POD["securityContext"]
    assert (
        user["runAsNonRoot"]
        and user["runAsUser"] == user["fsGroup"] == 10001
        and not POD["automountServiceAccountToken"]
    )
    assert "USER 10001" in (ROOT / "Dockerfile").read_text()
    rights = CONTAINER["securityContext"]
    assert rights["readOnlyRootFilesystem"] and rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]} and "privileged" not in rights
    kinds = {volume["name"]: set(volume) - {"name"} for volume in POD["volumes"]}
    for mount in CONTAINER["volumeMounts"]:
        assert mount.get("readOnly") or kinds[mount["name"]] == {"emptyDir"}


def test_the_token_comes_from_a_secret_and_stands_nowhere_else():
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    (mount,) = [one for one in CONTAINER["volumeMounts"] if "secret" in volumes[one["name"]]]
    assert option("--token-file") == f"{mount['mountPath']}/token"
    assert "env" not in CONTAINER and volumes[mount["name"]]["secret"]["defaultMode"] == 0o440


def test_a_pod_has_time_to_answer_what_it_took():
    limits, (_, wait_s) = Limits(), CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert int(wait_s) + limits.answer_s + limits.stalled_s + 1 < POD["terminationGracePeriodSeconds"]


@pytest.mark.slow
def test_the_command_answers_its_probes_without_the_token_and_queries_with_it(tmp_path):
    program, *options = CONTAINER["args"]
    assert program == "serve"
    given = dict(zip(options[::2], options[1::2], strict=True))
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    given |= {"--token-file": str(tmp_path / "token"), "--host": "127.0.0.1"}
    del given["--model"], given["--port"]
    served = Served(make_run(tmp_path / "run"), *[word for pair in given.items() for word in pair])
    try:
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert served.http.get(CONTAINER[name]["httpGet"]["path"]).status_code == 200
        assert served.http.post("/v1/rtt", json=PING).status_code == 401
        token = {"authorization": f"Bearer {TOKEN}"}
        assert served.http.post("/v1/rtt", json=PING, headers=token).status_code == 200
    finally:
        code, _ = served.end()
    assert code == 0
