"""What the variables of schedulers say of a machine's place in a job."""

import pytest

from engine.errors import UserInputError
from engine.launch import scheduler
from engine.launch.scheduler import Placement, first_host, placement

POD = "rlhf-1.rlhf.default.svc.cluster.local"
SLURM = {
    "SLURM_JOB_ID": "42", "SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "gpu[08-11,20],cpu1",
}  # fmt: skip
SKYPILOT = {
    "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9", "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_TASK_ID": "sky-managed-2026-11-26_rlhf_1-0",
}  # fmt: skip
PET = {
    "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-master-0",
    "PET_MASTER_PORT": "23456", "PET_NPROC_PER_NODE": "8",
}  # fmt: skip
RENDEZVOUS = {"PET_NNODES": "2", "PET_NODE_RANK": "1"}
GENERIC = {"MASTER_ADDR": "node-a", "MASTER_PORT": "1234", "NODE_RANK": "1", "NNODES": "2"}


def place(scheduler_name, first, **others):
    return Placement(scheduler=scheduler_name, machine=1, machines=2, first=first, **others)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SLURM, place("SLURM", "gpu08", job="slurm-42")),
        (
            SLURM | {"SLURM_STEP_NODELIST": "gpu09", "SLURM_STEP_NUM_NODES": "2"},
            place("SLURM", "gpu09", job="slurm-42"),
        ),
        (
            SLURM | {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"},
            place("SLURM", "gpu08", job="slurm-40-3"),
        ),
        (SKYPILOT, place("SkyPilot", "10.0.0.7", job="sky-managed-2026-11-26_rlhf_1-0")),
        (SKYPILOT | SLURM, place("SkyPilot", "10.0.0.7", job="sky-managed-2026-11-26_rlhf_1-0")),
        (PET, place("torchrun", "job-master-0", port=23456)),
        (PET | {"JOB_COMPLETION_INDEX": "1"}, place("torchrun", "job-master-0", port=23456)),
        (
            RENDEZVOUS | {"PET_RDZV_ENDPOINT": "a:29400"},
            place("torchrun", "a", port=29400),
        ),
        (RENDEZVOUS | {"PET_RDZV_ENDPOINT": "a"}, place("torchrun", "a")),
        (RENDEZVOUS | {"PET_RDZV_ENDPOINT": "[fd00::1]"}, place("torchrun", "fd00::1")),
        (
            RENDEZVOUS | {"PET_RDZV_ENDPOINT": "[fd00::1]:29400"},
            place("torchrun", "fd00::1", port=29400),
        ),
        (GENERIC, place("MASTER_ADDR", "node-a", port=1234)),
        (
            {"MASTER_ADDR": "node-a", "RANK": "1", "WORLD_SIZE": "2"},
            place("MASTER_ADDR", "node-a"),
        ),
        (
            {"JOB_COMPLETION_INDEX": "1"},
            Placement(
                scheduler="Kubernetes", machine=1, machines=None, job="rlhf",
                first="rlhf-0.rlhf.default.svc.cluster.local",
            ),
        ),
        ({"HOME": "/root"}, None),
        ({"SLURM_JOB_ID": "42"}, None),  # of a shell that is no task
    ],
)  # fmt: skip
def test_each_scheduler_says_which_machine_this_is(environment, expected):
    assert placement(environment, POD) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (SLURM | {"SLURM_LOCALID": "3"}, "not the only task"),
        (PET | {"PET_NNODES": "1:4"}, "fixed number of machines"),
        ({"PET_NNODES": "2"}, "PET_NODE_RANK"),
        (RENDEZVOUS | {"PET_RDZV_ENDPOINT": "a:b"}, "PET_RDZV_ENDPOINT must be a number"),
        (GENERIC | {"LOCAL_RANK": "0"}, "a process of torchrun"),
        (GENERIC | {"NODE_RANK": "one"}, "NODE_RANK must be a number"),
        (GENERIC | {"MASTER_PORT": "0"}, "must be a port"),
        ({"MASTER_ADDR": "node-a"}, "RANK must be a number"),
        ({"JOB_COMPLETION_INDEX": ""}, "JOB_COMPLETION_INDEX must be a number"),
    ],
)
def test_variables_that_cannot_be_used_are_one_sentence(environment, message):
    with pytest.raises(UserInputError, match=message):
        placement(environment, POD)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[01,03-05],m1", "n01"),
        ("r[1-2]n[3-4]-ib,x", "r1n3-ib"), ("n[1-2]a,b", "n1a"), ("", ""),
    ],
)  # fmt: skip
def test_the_first_of_a_list_of_nodes_is_found(nodes, first):
    assert first_host(nodes) == first


def test_the_number_of_machines_is_that_of_the_scheduler_or_of_the_configuration():
    slurm, pod = placement(SLURM, ""), placement({"JOB_COMPLETION_INDEX": "1"}, POD)
    assert [scheduler.machines(slurm, n) for n in (1, 2)] == [2, 2]
    assert scheduler.machines(pod, 4) == 4
    with pytest.raises(UserInputError, match=r"leave launch\.nodes out"):
        scheduler.machines(slurm, 3)
    with pytest.raises(UserInputError, match=r"launch\.nodes=N"):
        scheduler.machines(pod, 1)


def test_the_address_has_the_scheduler_s_port_or_the_given_one():
    assert scheduler.address(placement(PET, ""), 7) == "job-master-0:23456"
    assert scheduler.address(placement(SLURM, ""), 7) == "gpu08:7"
    six = placement(SKYPILOT | {"SKYPILOT_NODE_IPS": "fd00::1\nfd00::2"}, "")
    assert scheduler.address(six, 7) == "[fd00::1]:7"


@pytest.mark.parametrize("host", ["rlhf-1", "another.name", ""])
def test_a_pod_without_a_headless_service_is_an_error_that_says_so(host):
    with pytest.raises(UserInputError, match="headless service"):
        scheduler.address(placement({"JOB_COMPLETION_INDEX": "1"}, host), 7)
