"""How train workers on several nodes find each other: gloo listens where Ray knows each node.

By itself gloo takes the address of the host's name. The installers of Debian and Ubuntu write 127.0.1.1 for that into
/etc/hosts, and then no worker reaches one on another node. NCCL finds its interfaces itself and is left alone.
"""

import logging
import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class _NodeBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


class NodeTorchConfig(TorchConfig):
    """Ray Train's own, whose workers call `use_node_interface` before there is a process group."""

    @property
    def backend_cls(self) -> type[_NodeBackend]:
        """What starts the process groups."""
        return _NodeBackend


def use_node_interface() -> None:
    """Let gloo listen on the interface that has Ray's address of this node; a choice of the environment's stays."""
    address = ray.util.get_node_ip_address()
    interfaces = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return
    logging.getLogger(__name__).warning(
        "no interface has Ray's address of this node, %s (there are %s): if workers do not find each other, set GLOO_SOCKET_IFNAME",
        address,
        ", ".join(interfaces),
    )
