"""The manifests in examples/launch: what they say fits what the engine reads on each machine."""

import shlex
from pathlib import Path

import pytest
import yaml

from engine.launch.scheduler import DEFAULT_PORT, address, machines, placement
from engine.launch.secret import SECRET_VARIABLE
from rlhf_tui.commands.machines import STOPPED_EARLY, launch

EXAMPLES = Path(__file__).parents[2] / "examples" / "launch"


@pytest.fixture
def kubernetes():
    """Kind → manifest."""
    documents = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


@pytest.fixture
def skypilot():
    return yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())


def parsed(words):
    """The options of a command line that begins with `rlhf-tui launch`."""
    assert words[:2] == ["rlhf-tui", "launch"]
    return launch.make_context("launch", list(words[2:])).params


def test_each_pod_finds_its_place_and_the_first_one(kubernetes):
    job, service = kubernetes["Job"], kubernetes["Service"]
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    assert (spec["completionMode"], service["spec"]["clusterIP"]) == ("Indexed", "None")
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    overrides = parsed(container["command"] + container["args"])["overrides"]
    nodes = dict(override.split("=") for override in overrides)["launch.nodes"]
    assert spec["completions"] == spec["parallelism"] == int(nodes)
    for index in range(spec["completions"]):
        host = f"{name}-{index}.{pod['subdomain']}.default.svc.cluster.local"
        place = placement({"JOB_COMPLETION_INDEX": str(index)}, host)
        assert (place.machine, place.job, machines(place, int(nodes))) == (index, name, int(nodes))
        first = f"{name}-0.{pod['subdomain']}.default.svc.cluster.local"
        assert address(place, DEFAULT_PORT) == f"{first}:{DEFAULT_PORT}"


def test_the_pods_have_a_secret_and_only_they_reach_each_other(kubernetes):
    job, policy = kubernetes["Job"], kubernetes["NetworkPolicy"]["spec"]
    pods = {"job-name": job["metadata"]["name"]}
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert [e["name"] for e in container["env"] if "secretKeyRef" in e["valueFrom"]] == [
        SECRET_VARIABLE
    ]
    assert kubernetes["Service"]["spec"]["selector"] == pods
    assert policy["podSelector"] == {"matchLabels": pods}
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": pods}}]}]


def test_each_machine_of_a_cloud_finds_its_place_and_a_stopped_run_is_started_again(skypilot):
    count = skypilot["num_nodes"]
    addresses = "\n".join(f"10.0.0.{number + 1}" for number in range(count))
    for rank in range(count):
        environment = {
            "SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_NODES": str(count),
            "SKYPILOT_NODE_IPS": addresses, "SKYPILOT_TASK_ID": "sky-managed-rlhf_1-0",
        }  # fmt: skip
        place = placement(environment, "any")
        assert (place.machine, machines(place, 1)) == (rank, count)
        assert address(place, DEFAULT_PORT) == f"10.0.0.1:{DEFAULT_PORT}"
    lines = [line for line in skypilot["run"].splitlines() if not line.startswith("#")]
    assert [str(parsed(shlex.split(line))["root"]) for line in lines] == ["/shared/sessions"]
    recovery = skypilot["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [STOPPED_EARLY]
    assert skypilot["secrets"] == {SECRET_VARIABLE: None}
