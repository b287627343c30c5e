"""A train job on several Ray nodes: one is lost, one is taken away with notice. The nodes are processes of one machine."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import ray
import torch
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.util.state import list_actors

from app.errors import TrainingError
from app.ledger import Ledger
from ray_jobs.train import train
from tests.ray_jobs.test_faults import failures, first_report, newest_step
from tests.ray_jobs.test_train import recipe_for, stage, steps_of, weights_of  # noqa: F401  fixtures

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
EPOCHS = 28
"""So many that a run is not over when a node goes half a minute after its first steps."""
NODES = 3


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head that reads, and nodes that hold one worker each; one more than a run needs."""
    small = 80 * 2**20
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # as every job sets it
        environment.setenv("RAY_health_check_period_ms", "1000")
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": True, "object_store_memory": small},
        )
        try:
            for _ in range(NODES):
                cluster.add_node(num_cpus=2, object_store_memory=small)
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def recipe_of(sft: str, **train_section):
    recipe = recipe_for(sft, epochs=EPOCHS, **train_section)
    settings = {"cpus_per_worker": 2, "threads_per_worker": 1}
    return recipe.model_copy(update={"workers": recipe.workers.model_copy(update=settings)})


@pytest.fixture(scope="module")
def unbroken(nodes, stage):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    return train(home, ledger, recipe_of(sft), snapshot_id, run_id="unbroken-nodes")


def worker_nodes() -> list[str]:
    """Ids of the nodes that hold a train worker."""
    filters = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
    return [actor.node_id for actor in list_actors(filters=filters)]


@contextmanager
def after_steps(ledger: Ledger, run_id: str, steps: int, do: Callable[[], None]) -> Iterator[None]:
    ended, faults = threading.Event(), []

    def run() -> None:
        while not ended.wait(0.1):
            if len(steps_of(ledger, run_id)) >= steps:
                try:
                    do()
                except Exception as error:  # noqa: BLE001  raised again below
                    faults.append(error)
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if faults:
        raise faults[0]


def test_a_run_that_loses_the_node_of_a_worker_goes_on_on_another(nodes, unbroken, stage, claim):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    lost: list[float] = []

    def lose() -> None:
        [node_id, *_] = worker_nodes()
        [node] = [node for node in nodes.worker_nodes if node.node_id == node_id]
        lost.append(time.time())
        nodes.remove_node(node, allow_graceful=False)
        while not failures(ledger, "node-lost"):
            assert time.time() < lost[0] + 60, "nobody notices"
            time.sleep(0.05)
        # What was reported until then may be told again when the run goes on.
        lost.append(newest_step(ledger, "node-lost"))

    with after_steps(ledger, "node-lost", 5, lose):
        result = train(home, ledger, recipe_of(sft), snapshot_id, run_id="node-lost")
    nodes.add_node(num_cpus=2, object_store_memory=80 * 2**20)
    nodes.wait_for_nodes()
    ours, expected = weights_of(home, result.model), weights_of(home, unbroken.model)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert [s["step"] for s in steps_of(ledger, "node-lost")] == list(range(1, result.steps + 1))
    at, before = lost
    [failed, *_] = failures(ledger, "node-lost")
    reported = first_report(ledger, "node-lost", int(before), failed)
    assert reported is not None
    going_on = reported - at
    assert going_on <= 60
    claim(
        "a run that loses the node of a worker goes on on another within 60 s, with the bits of an unbroken run",
        figure=f"the next new step after {going_on:.1f} s",
    )


def test_a_run_that_loses_a_node_which_nothing_replaces_ends_in_bounded_time_and_goes_on_when_there_is_one(
    nodes,
    unbroken,
    stage,  # noqa: F811
    claim,
    monkeypatch,
):
    home, ledger, _, snapshot_id, sft = stage
    start_s = 5
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(start_s))
    lost: list[float] = []

    def lose() -> None:
        own = set(worker_nodes())
        lost.append(time.time())
        # One stays, and none has room for the other worker.
        for node in [n for n in nodes.worker_nodes if n.node_id not in own] + [
            n for n in nodes.worker_nodes if n.node_id in own
        ][:1]:
            nodes.remove_node(node, allow_graceful=False)

    with (
        after_steps(ledger, "node-gone", 5, lose),
        pytest.raises(TrainingError, match=r"not enough resources|could not be scheduled|timed out"),
    ):
        train(home, ledger, recipe_of(sft), snapshot_id, run_id="node-gone")
    ended = time.time() - lost[0]
    assert ended <= 60 + 4 * start_s
    for _ in range(2):
        nodes.add_node(num_cpus=2, object_store_memory=80 * 2**20)
    nodes.wait_for_nodes()
    done = len(steps_of(ledger, "node-gone"))
    result = train(home, ledger, recipe_of(sft), snapshot_id, run_id="node-gone")
    ours, expected = weights_of(home, result.model), weights_of(home, unbroken.model)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    claim(
        f"a run that loses a node which nothing replaces ends after four times the time limit (here {start_s} s) and at most 60 s more; the same command ends it with the bits of an unbroken run",
        figure=f"ended after {ended:.0f} s, {done} steps done",
    )


def test_a_node_that_is_taken_away_with_notice_leaves_a_checkpoint_of_its_own(nodes, unbroken, stage, claim):  # noqa: F811
    home, ledger, _, snapshot_id, sft = stage
    drained: list[int] = []
    began: list[float] = []
    first: list[float] = []
    notice_s = 20

    def drain() -> None:
        [node_id, *_] = worker_nodes()
        deadline = int((time.time() + notice_s) * 1000)
        client = GcsClient(address=nodes.address)
        taken, why = client.drain_node(node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot instance", deadline)
        assert taken, why
        began.append(time.time())
        known = steps_of(ledger, "preempted")
        drained.append(len(known))
        first.extend(step["seconds"] for step in known[:5])
        time.sleep(notice_s)
        [node] = [node for node in nodes.worker_nodes if node.node_id == node_id]
        nodes.remove_node(node, allow_graceful=False)

    # Only the notice makes a checkpoint.
    recipe = recipe_of(sft, checkpoint_every=10_000)
    # What is done again after a node went with notice is no failure.
    recipe = recipe.model_copy(update={"workers": recipe.workers.model_copy(update={"max_failures": 0})})
    with after_steps(ledger, "preempted", 5, drain):
        result = train(home, ledger, recipe, snapshot_id, run_id="preempted")
    nodes.add_node(num_cpus=2, object_store_memory=80 * 2**20)
    nodes.wait_for_nodes()
    steps = steps_of(ledger, "preempted")
    assert [s["step"] for s in steps] == list(range(1, result.steps + 1))
    names = home.names("runs/preempted/checkpoints")
    saved = [int(name.split("-")[1]) for name in names]
    assert len(saved) == 2, "one for the notice, one at the end"
    assert len({name.rpartition("-")[2] for name in names}) == 2, "it was over before the node went"
    assert drained[0] <= saved[0] < saved[1] == result.steps
    assert [s["seconds"] for s in steps[:5]] == first, "it began anew: a step that is done again takes another time"
    ours, expected = weights_of(home, result.model), weights_of(home, unbroken.model)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    took = (home.local("runs", "preempted", "checkpoints", names[0]) / "manifest.json").stat().st_mtime - began[0]
    assert took <= notice_s
    claim(
        "a node taken away with 20 s notice: a checkpoint of its own before it goes, and the run ends with the bits of an unbroken one, without a failure counted",
        figure=f"notice after step {drained[0]}, checkpoint of step {saved[0]} there after {took:.1f} s",
    )
