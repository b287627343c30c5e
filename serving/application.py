"""The Serve application: a gateway in front of the replicas of the champion.

`build` is what Ray Serve imports. It knows the recipe's section and where the home is, not which model is served: that
comes with the replicas' `user_config`, so that shipping another one restarts no process.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from app.config import ServingSection
from app.errors import ServiceError
from app.ledger import Ledger, ledger_name
from app.services import REPLICA, Services
from app.storage import Home
from serving.gateway import Limits, create_app
from serving.messages import Answer, Busy, Event, Question, Refusal, ReplicaStatus, Unavailable
from serving.recorder import Recorder
from serving.replica import Replica

_GATEWAY_CPUS = 0.1
_GATEWAY_MARGIN = 256
_STATUS_TIMEOUT_S = 10.0


class ServiceArgs(BaseModel):
    """What the application is built from. Anyone who may see Ray's dashboard sees it: no secrets here."""

    model_config = ConfigDict(extra="forbid")

    home: str
    ledger: str
    """Name of the ledger of whoever deploys; see `app.ledger.ledger_name`."""
    serving: ServingSection


class Gateway:
    """The ingress deployment: the HTTP API in front of the replicas."""

    def __init__(self, args: ServiceArgs, replicas: Any) -> None:
        self._args = args
        self._replicas = replicas

    def __serve_build_asgi_app__(self) -> Any:
        """Build the application; Serve calls it once in each gateway process."""
        home, section = Home.at(self._args.home), self._args.serving
        name = ledger_name(home.ledger_url)
        if name != self._args.ledger:
            # What is acknowledged would never be trained on.
            msg = f"the gateway would write to the ledger `{name}`, the jobs read `{self._args.ledger}`\n\nHint: set PREFLOOP_LEDGER to the same URL where the Ray cluster is started."
            raise ServiceError(msg)
        return create_app(
            ReplicaSet(self._replicas),
            Recorder(Ledger.open(home.ledger_url)),
            key=home.api_key(),
            deployment=section.deployment,
            limits=Limits(max_tokens=section.max_tokens),
        )


class ReplicaSet:
    """All replicas behind one Serve handle, as the gateway sees them."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._answer = handle.options(method_name="answer", stream=True)

    async def answer(self, question: Question) -> AsyncGenerator[Event, None]:
        """Let one replica answer; closing this early tells it to stop."""
        response = self._answer.remote(question)
        ended = False
        try:
            async for event in response:
                ended = isinstance(event, Answer | Refusal)
                yield event
        except BackPressureError:
            raise Busy from None
        except (RayError, RayServeException):
            raise Unavailable from None
        except (GeneratorExit, asyncio.CancelledError):
            if not ended:
                with suppress(RayError, RayServeException):
                    response.cancel()
            raise

    async def status(self) -> list[ReplicaStatus]:
        """Ask every replica what it serves; one that does not answer is listed with an error."""
        try:
            found = await self._handle.broadcast("status").results_async(
                timeout_s=_STATUS_TIMEOUT_S, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError):
            raise Unavailable from None
        silent = ReplicaStatus("unknown", None, None, None, None, "the replica does not answer")
        return [status if isinstance(status, ReplicaStatus) else silent for status in found]


class StandingArgs(BaseModel):
    """What an application is built from that a manifest describes: home and ledger are those of its nodes' environment."""

    model_config = ConfigDict(extra="forbid")

    gateway_url: str
    """Where jobs find the gateway."""
    ray_dashboard_url: str
    """Where jobs find Serve's API, to change the champion."""
    serving: ServingSection = ServingSection()


def standing(args: StandingArgs) -> Any:
    """Build the application for whatever model is the champion, and record where it is.

    For manifests, which live longer than a champion: replicas ask the ledger when they start, and when a manifest is applied
    again, which forgets what `ship` had set.
    """
    home, deployment = Home.from_environment(), args.serving.deployment
    Services(args.gateway_url, args.ray_dashboard_url, "auto", deployment=deployment).write(home)
    service = ServiceArgs(home=home.uri, ledger=ledger_name(home.ledger_url), serving=args.serving)
    return _application(service, user_config={"champion_of": deployment})


def build(args: ServiceArgs) -> Any:
    """Build the Serve application; which model it serves comes with `user_config` of the deployed configuration."""
    return _application(args, user_config=None)


def _application(args: ServiceArgs, *, user_config: dict[str, Any] | None) -> Any:
    section = args.serving
    replica = serve.deployment(
        name=REPLICA,
        num_replicas=section.replicas,
        user_config=user_config,
        # As many wait to join as are answered at once; what is beyond waits in the gateway and is counted there.
        max_ongoing_requests=2 * section.max_batch_size,
        max_queued_requests=section.max_queued_requests,
        ray_actor_options={"num_cpus": section.cpus_per_replica, "num_gpus": section.gpus_per_replica},
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
    )(Replica).bind(
        args.home,
        dtype=section.dtype,
        threads=section.threads_per_replica,
        max_batch_size=section.max_batch_size,
        batch_wait_s=section.batch_wait_s,
    )
    in_flight = section.replicas * 2 * section.max_batch_size + section.max_queued_requests
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=1,
        max_ongoing_requests=in_flight + _GATEWAY_MARGIN,
        max_queued_requests=_GATEWAY_MARGIN,
        ray_actor_options={"num_cpus": _GATEWAY_CPUS},
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
    )(serve.ingress()(Gateway))
    return gateway.bind(args, replica)
