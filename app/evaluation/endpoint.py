"""Answers of models that an OpenAI-compatible endpoint serves by their ids: vLLM, a router in front of several, or another engine.

The reply must name the model that was asked for; whoever runs the endpoint vouches for its weights. This module keeps
nothing: what fails ends the job, and the same command asks for what is missing.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Final, cast

import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from app.config import EndpointSection
from app.errors import ServiceError, one_of
from app.evaluation.judges import api_key
from app.evaluation.questions import Question
from app.evaluation.suites import Answer
from app.schemas import FinishReason

_REASONS: Final = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "tool_calls": FinishReason.TOOL_CALLS}


_FULL: Final = re.compile(
    r"context.length|maximum context|context window|too many tokens|longer than the model", re.IGNORECASE
)
"""How OpenAI, vLLM and our gateway say that a request does not fit."""


class EndpointModel:
    """Whatever models an endpoint serves."""

    def __init__(self, section: EndpointSection, *, max_tokens: int) -> None:
        """Raises RecipeError where the environment lacks the key that the recipe names."""
        self._section, self._max_tokens, self._key = section, max_tokens, api_key(section, "evaluate.endpoint")

    def answer(self, model_id: str, questions: Sequence[Question]) -> list[Answer]:
        """Return the model's answers, to each question one for each turn, one after the other.

        Raises:
            ServiceError: the endpoint does not answer, or another model does.
        """
        return asyncio.run(self._answer_all(model_id, questions))

    async def _answer_all(self, model_id: str, questions: Sequence[Question]) -> list[Answer]:
        section = self._section
        places = asyncio.Semaphore(section.concurrency)
        client = openai.AsyncOpenAI(
            base_url=section.url, api_key=self._key, timeout=section.timeout_s, max_retries=section.retries
        )

        async def one(question: Question) -> list[Answer]:
            async with places:
                return await self._turns(client, model_id, question)

        async with client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(question)) for question in questions]
            except BaseExceptionGroup as errors:
                raise one_of(errors) from None
        return [answer for task in tasks for answer in task.result()]

    async def _turns(self, client: openai.AsyncOpenAI, model_id: str, question: Question) -> list[Answer]:
        messages: list[dict[str, str]] = []
        said: list[Answer] = []
        for turn in question.turns:
            messages.append({"role": "user", "content": turn})
            reply = await self._ask(client, model_id, question, messages, turn=len(said))
            if reply is None:
                cut = FinishReason.LENGTH.value
                said.append(Answer(question.id, question.cluster, "", cut, 0, model_id, len(said) + 1))
                messages.append({"role": "assistant", "content": ""})
                continue
            choice, usage = reply.choices[0], reply.usage
            text = choice.message.content or ""
            reason = _REASONS.get(choice.finish_reason, FinishReason.UNKNOWN)
            assert usage is not None  # noqa: S101  asked for
            tokens = usage.completion_tokens
            said.append(Answer(question.id, question.cluster, text, reason.value, tokens, model_id, len(said) + 1))
            messages.append({"role": "assistant", "content": text})
        return said

    async def _ask(
        self,
        client: openai.AsyncOpenAI,
        model_id: str,
        question: Question,
        messages: Sequence[dict[str, str]],
        *,
        turn: int,
    ) -> ChatCompletion | None:
        """Return the reply; None where the conversation fills the model's context, as it does for a model that is loaded."""
        where = f"the endpoint {self._section.url} gave no answer of `{model_id}` to question `{question.id}`"
        hint = "Hint: look at evaluate.endpoint; the parts that were finished are kept, and the same command goes on."
        try:
            reply: object = await client.chat.completions.create(
                model=model_id,
                messages=cast("list[ChatCompletionMessageParam]", list(messages)),
                temperature=question.temperature,
                max_tokens=self._max_tokens,
                seed=question.seed(turn),
            )
        except openai.BadRequestError as error:
            if _FULL.search(str(error)):
                return None
            msg = f"{where}: {error}\n\n{hint}"
            raise ServiceError(msg) from None
        except (openai.OpenAIError, ValueError) as error:
            msg = f"{where}: {error}\n\n{hint}"
            raise ServiceError(msg) from None
        # The client hands on whatever an endpoint says that is no JSON.
        if not isinstance(reply, ChatCompletion) or not reply.choices or reply.usage is None:
            msg = f"{where}: the reply has no choices or no usage: {str(reply)[:200]}\n\n{hint}"
            raise ServiceError(msg)
        if reply.model != model_id:
            msg = f"{where}: `{reply.model}` answered\n\nHint: serve each model by its id (vLLM: --served-model-name)."
            raise ServiceError(msg)
        return reply
