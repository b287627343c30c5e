"""Workers on several nodes: gloo listens where Ray knows each node. That they meet is shown by tests/test_cluster_commands.py."""

import os

import psutil
import pytest
import ray

from ray_jobs.rendezvous import NodeTorchConfig, use_node_interface


def test_gloo_listens_where_ray_knows_the_node_unless_somebody_chose(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    use_node_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    use_node_interface()
    chosen = os.environ.pop("GLOO_SOCKET_IFNAME")
    assert "127.0.0.1" in [found.address for found in psutil.net_if_addrs()[chosen]]


class FirstCallError(Exception):
    """What was asked of the workers first."""


class StoppingWorkers:
    """Workers that stop at the first thing they are asked."""

    def execute(self, function, *_):
        raise FirstCallError(function.__name__)


def test_workers_choose_their_interface_before_a_process_group_is_made():
    config = NodeTorchConfig(backend="gloo")
    with pytest.raises(FirstCallError, match="use_node_interface"):
        config.backend_cls().on_start(StoppingWorkers(), config)
