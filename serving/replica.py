"""What Ray Serve runs behind the gateway: one replica, which loads the model that its `user_config` names.

A new model is loaded and tried beside the old one, and one that cannot be loaded changes nothing. The class is
imported by processes that hold no model, so torch and the engine, which take seconds, are imported when it is made.
"""

import asyncio
import functools
import logging
import os
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from app.errors import PrefloopError, ServiceError
from app.ledger import Ledger
from app.storage import Home
from serving.messages import Event, Question, ReplicaStatus

if TYPE_CHECKING:
    from serving.engine import Serving

_log = logging.getLogger(__name__)


class Replica:
    """One replica of the champion, as Ray Serve runs it.

    `user_config` is `{"model_id": …, "revision": …}`, or `{"champion_of": DEPLOYMENT}` in a manifest that lives longer than
    a champion. The first model is loaded before the replica is ready, and a
    failure keeps it from becoming ready. Later ones are loaded in the background, because Serve sends a replica no
    requests while `reconfigure` runs; `status` tells how far that is.
    """

    def __init__(
        self,
        home_uri: str,
        *,
        dtype: str,
        threads: int | None,
        max_batch_size: int,
        batch_wait_s: float,
    ) -> None:
        import torch

        from serving.engine import Engine

        # Ray starts workers with one OpenMP thread per logical CPU that they ask for.
        torch.set_num_threads(threads or os.cpu_count() or 1)
        self._home = Home.at(home_uri)
        self._dtype = dtype
        self._engine = Engine(max_batch_size=max_batch_size, batch_wait_s=batch_wait_s)
        self._target: tuple[str, int] | None = None
        self._error: str | None = None
        self._switch: asyncio.Task[None] | None = None
        self._loading = asyncio.Lock()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve the model that the config names, or the champion of the deployment that it names.

        Raises:
            ServiceError: it is the first model and cannot be loaded. Later failures keep the model that serves and
                are told by `status`.
        """
        target = self._named(user_config)
        self._target, self._error = target, None
        if self._engine.serving is None:
            try:
                self._engine.install(await self._load(target))
            except PrefloopError as error:
                msg = f"the first model `{target[0]}` cannot be served: {error}"
                raise ServiceError(msg) from None
            return
        self._switch = asyncio.create_task(self._switch_to(target))

    def _named(self, user_config: dict[str, Any]) -> tuple[str, int]:
        if "champion_of" not in user_config:
            return str(user_config["model_id"]), int(user_config["revision"])
        deployment = str(user_config["champion_of"])
        ledger = Ledger.open(self._home.ledger_url)
        champion = ledger.champion(deployment)
        ledger.close()
        if champion is None:
            msg = f"deployment `{deployment}` has no champion yet\n\nHint: the loop's first round makes the SFT checkpoint it."
            raise ServiceError(msg)
        return champion.model_id, champion.revision

    async def answer(self, question: Question) -> AsyncGenerator[Event, None]:
        """Answer a question as `Engine.answer` does."""
        events = self._engine.answer(question)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def status(self) -> ReplicaStatus:
        """Tell what is served and what was asked for."""
        serving, target = self._engine.serving, self._target
        return ReplicaStatus(
            replica=_replica_name(),
            model_id=serving.loaded.model_id if serving else None,
            revision=serving.revision if serving else None,
            target_model_id=target[0] if target else None,
            target_revision=target[1] if target else None,
            error=self._error,
        )

    async def _switch_to(self, target: tuple[str, int]) -> None:
        async with self._loading:
            serving = self._engine.serving
            if target != self._target or serving is None:
                return
            if serving.loaded.model_id == target[0]:
                self._engine.install(replace(serving, revision=target[1]))
                return
            try:
                loaded = await self._load(target)
            except Exception as error:  # noqa: BLE001  whatever is wrong with the new model, the old one serves on
                _log.error("model %s is not served: %s", target[0], type(error).__name__)
                if target == self._target:
                    self._error = str(error) or type(error).__name__
                return
            if target == self._target:
                self._engine.install(loaded)

    async def _load(self, target: tuple[str, int]) -> "Serving":
        from app.models import device_of
        from serving.engine import load_serving

        # A thread that ends, unlike those of `asyncio.to_thread`: OpenMP counts the helpers that it keeps for a thread,
        # and where they outnumber the CPUs it lets all of them sleep between two operations, a sixth of a CPU's speed.
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loading")
        device = device_of(ray.get_gpu_ids() if ray.is_initialized() else ())
        load = functools.partial(load_serving, self._home, *target, dtype=self._dtype, device=device)
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, load)
        finally:
            # Waiting for it here would stop every answer where the replica is told to give up loading.
            thread.shutdown(wait=False)


def _replica_name() -> str:
    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except RayServeException:
        return "local"  # not inside of Serve
