"""Judges behind an OpenAI-compatible endpoint: many tasks, each asked once, whatever happens in between.

What a judge said is written to the ledger the moment it arrives, keyed by the judge, its settings and the task, so a
job that was killed asks only for what is missing. Requests run side by side up to a limit, are paced, repeated by the
client (`openai`, which also obeys Retry-After), and stop at a budget of tokens. A request that fails for good is
counted by its reason and asked again by the next job; it is never a verdict. This module knows neither suites nor what
a verdict means.
"""

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from app.config import EndpointSection, JudgeSection
from app.errors import RecipeError, ServiceError, one_of
from app.evaluation.judge_prompts import JudgeTask
from app.ledger import JudgementRow, Ledger, now
from app.schemas import content_hash

_NONCE_BYTES: Final = 8
_CONFIGURATION: Final = (openai.AuthenticationError, openai.NotFoundError)
_PASSING: Final = frozenset({"timeout", "no connection", "status 408", "status 409", "status 429"})
_CHARACTERS: Final = 4
"""So many are taken for a token where an endpoint does not say what it used: a budget must bind all the same."""
_ENOUGH_TO_TELL: Final = 8
"""So many tasks that all fail are no matter of the tasks."""


def passes(reason: str) -> bool:
    """Say whether a failure may be gone the next time; a refusal or a request that is too long stays."""
    return reason in _PASSING or reason.startswith("status 5")


def api_key(section: EndpointSection, place: str) -> str:
    """Return the key of an endpoint; raises RecipeError where the environment lacks the one that the recipe names."""
    if section.api_key_variable is None:
        return "none"  # the client wants one
    key = os.environ.get(section.api_key_variable, "")
    if not key:
        msg = f"the key of {place} is not in the environment: `{section.api_key_variable}` is empty\n\nHint: export it, or set {place}.api_key_variable to null where the endpoint wants none."
        raise RecipeError(msg)
    return key


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge said to one task, with the nonce that its verdict must carry."""

    text: str
    nonce: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Judged:
    """What a judge said to all tasks, by their keys."""

    replies: dict[str, Reply]
    failures: dict[str, str]
    """By key the reason; the task has no reply."""
    asked: int
    """Tasks that were not known before."""


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, section: JudgeSection) -> None:
        """Raises RecipeError where the environment lacks the key that the recipe names."""
        self.section = section
        self._key = api_key(section, "evaluate.judge")

    @property
    def name(self) -> str:
        """Name the judge as reports do."""
        return f"{self.section.model} at {self.section.url}"

    @property
    def settings(self) -> list[Any]:
        """Who judges and how: what a judgement depends on beside its task."""
        return [self.section.url, self.section.model, self.section.temperature, self.section.max_tokens]

    def identity(self, task: JudgeTask) -> str:
        """Return the key of a judgement: who judges, how, and what."""
        return content_hash([*self.settings, task.key])

    def judge(
        self, ledger: Ledger, tasks: Sequence[JudgeTask], *, on_progress: Callable[[int, int], None] = lambda *_: None
    ) -> Judged:
        """Get every task judged that is not in the ledger yet.

        Args:
            ledger: keeps what was said.
            tasks: equal ones are asked once.
            on_progress: called with judgements done and to do.

        Raises:
            ServiceError: the endpoint refuses the key or does not know the model, or the budget of tokens is spent;
                what was judged is kept.
        """
        wanted = {self.identity(task): task for task in tasks}
        known = {
            key: Reply(row.text, row.nonce, row.prompt_tokens, row.completion_tokens)
            for key, row in ledger.judgements(list(wanted)).items()
        }
        missing = {key: task for key, task in wanted.items() if key not in known}
        failures: dict[str, str] = {}
        if missing:
            spent = sum(reply.prompt_tokens + reply.completion_tokens for reply in known.values())
            run = _Run(self.section, self._key, ledger, self.name, on_progress, spent, len(missing))
            asyncio.run(run.ask_all(missing))
            known.update(run.replies)
            failures = run.failures
            if not run.replies and len(failures) >= _ENOUGH_TO_TELL:
                msg = f"the judge {self.name} answered none of {len(failures)} tasks; the last error: {run.last_error}\n\nHint: look at evaluate.judge; the same command asks again."
                raise ServiceError(msg)
        by_task = {key: task.key for key, task in wanted.items()}
        return Judged(
            {by_task[key]: reply for key, reply in known.items()},
            {by_task[key]: reason for key, reason in failures.items()},
            len(missing),
        )


@dataclass
class _Run:
    section: JudgeSection
    key: str
    ledger: Ledger
    name: str
    on_progress: Callable[[int, int], None]
    spent: int
    total: int
    replies: dict[str, Reply] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    next_at: float = 0.0
    last_error: str = ""

    async def ask_all(self, tasks: dict[str, JudgeTask]) -> None:
        section = self.section
        client = openai.AsyncOpenAI(
            base_url=section.url, api_key=self.key, timeout=section.timeout_s, max_retries=section.retries
        )
        waiting = list(reversed(tasks.items()))

        async def worker() -> None:
            # What is under way when the budget is spent is paid for, so it is waited for and kept.
            while waiting and not self._is_spent():
                key, task = waiting.pop()
                await self._pace()
                await self._ask(client, key, task)
                self.on_progress(len(self.replies) + len(self.failures), self.total)

        async with client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(section.concurrency, len(tasks))):
                        group.create_task(worker())
            except BaseExceptionGroup as errors:
                raise one_of(errors) from None
        if waiting:
            msg = f"the judge {self.name} has used {self.spent} tokens on these tasks, evaluate.judge.budget_tokens = {section.budget_tokens} are allowed; {len(self.replies)} of {self.total} tasks were judged and are kept\n\nHint: raise the budget, and the same command goes on from there."
            raise ServiceError(msg)

    async def _ask(self, client: openai.AsyncOpenAI, key: str, task: JudgeTask) -> None:
        nonce = secrets.token_hex(_NONCE_BYTES)
        messages = cast("list[ChatCompletionMessageParam]", task.messages(nonce))
        try:
            completion = await client.chat.completions.create(
                model=self.section.model,
                messages=messages,
                temperature=self.section.temperature,
                max_tokens=self.section.max_tokens,
            )
        except _CONFIGURATION as error:
            msg = f"the judge {self.name} refuses: {error}\n\nHint: look at evaluate.judge: url, model and api_key_variable. What was judged before is kept."
            raise ServiceError(msg) from None
        except openai.APITimeoutError as error:
            return self._failed(key, "timeout", error)
        except openai.APIConnectionError as error:
            return self._failed(key, "no connection", error)
        except openai.APIStatusError as error:
            return self._failed(key, f"status {error.status_code}", error)
        except (openai.OpenAIError, ValueError) as error:
            # The client lets through what `json` says of a body that is none.
            return self._failed(key, "malformed", error)
        # The client hands on whatever an endpoint says that is no JSON.
        if not isinstance(completion, ChatCompletion):
            return self._failed(key, "malformed", completion)
        choice = completion.choices[0] if completion.choices else None
        if choice is None or choice.finish_reason == "content_filter" or choice.message.refusal:
            return self._failed(key, "refused", choice)
        text, usage = choice.message.content or "", completion.usage
        asked = sum(len(str(message["content"])) for message in task.messages(nonce))
        reply = Reply(
            text=text,
            nonce=nonce,
            prompt_tokens=asked // _CHARACTERS if usage is None else usage.prompt_tokens,
            completion_tokens=len(text) // _CHARACTERS if usage is None else usage.completion_tokens,
        )
        await asyncio.to_thread(
            self.ledger.record_judgement,
            JudgementRow(
                judgement_id=key,
                judge=self.name,
                prompt=task.prompt,
                text=reply.text,
                nonce=reply.nonce,
                prompt_tokens=reply.prompt_tokens,
                completion_tokens=reply.completion_tokens,
                created_at=now(),
            ),
        )
        self.replies[key] = reply
        self.spent += reply.prompt_tokens + reply.completion_tokens
        return None

    def _failed(self, key: str, reason: str, error: object) -> None:
        self.failures[key] = reason
        self.last_error = f"{reason}: {str(error)[:300]}"

    async def _pace(self) -> None:
        if self.section.requests_per_minute is None:
            return
        at = max(time.monotonic(), self.next_at)
        self.next_at = at + 60 / self.section.requests_per_minute
        await asyncio.sleep(at - time.monotonic())

    def _is_spent(self) -> bool:
        budget = self.section.budget_tokens
        return budget is not None and self.spent >= budget
