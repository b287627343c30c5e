"""Durable writes of the gateway: one thread, one ledger, and every call returns after its commit.

Knows the ledger and nothing of HTTP or models.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from app.ledger import ChampionRow, FeedbackRow, Ledger, ResponseRow

_T = TypeVar("_T")


class Recorder:
    """Writes responses and feedback from an event loop without blocking it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        # A single thread: SQLite has one writer anyway, and waiting for its lock in many threads would be unfair.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")

    async def record_response(self, response: ResponseRow) -> None:
        """Store an answer; it is durable on return."""
        await self._run(lambda: self._ledger.record_response(response))

    async def record_feedback(self, **event: Any) -> FeedbackRow:
        """Store an event as `Ledger.record_feedback` does; it is durable on return."""
        return await self._run(lambda: self._ledger.record_feedback(**event))

    async def champion(self, deployment: str) -> ChampionRow | None:
        """Return what a deployment ships."""
        return await self._run(lambda: self._ledger.champion(deployment))

    def close(self) -> None:
        """Finish the writes under way and release the ledger."""
        self._thread.shutdown(wait=True)
        self._ledger.close()

    async def _run(self, call: Callable[[], _T]) -> _T:
        # A request that is cancelled while its commit runs must not leave the thread's work half awaited.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, call))
