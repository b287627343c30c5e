"""Text to token ids: pairs become groups, one for each prompt, with an account of every row that cannot train.

A group holds the prompt's ids and the ids of every answer to it. Answers served here keep the ids they were sampled
with; other text is rendered by the chat template, of which the prompt must be a prefix. A finished answer ends with
exactly one end token; an answer cut by the token limit has none, so it never trains one. This module does not know
how groups are stored or batched.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from app.errors import DataError, ModelError
from app.models import render_prompt
from app.schemas import FinishReason, Message, Pair, Response, prompt_key


@dataclass(frozen=True, slots=True)
class Preference:
    """One pair of a group: indices into its responses."""

    chosen: int
    rejected: int
    weight: float
    pair_id: str
    source: str


@dataclass(frozen=True, slots=True)
class Label:
    """One unpaired answer of a group."""

    response: int
    label: bool
    weight: float
    pair_id: str
    source: str


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt, its answers, and what is known about them: one row of a training snapshot.

    An answer that no pair and no label names belongs to another prompt: KTO estimates its KL on such answers.
    """

    group_id: str
    cluster: str
    split: str
    prompt_ids: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    pairs: tuple[Preference, ...] = ()
    labels: tuple[Label, ...] = ()
    reference_logps: tuple[float, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed row: the prompt once and every response."""
        return len(self.prompt_ids) + sum(map(len, self.responses))

    @property
    def judgements(self) -> tuple[Preference | Label, ...]:
        """Pairs and labels: what an optimizer step counts."""
        return (*self.pairs, *self.labels)


@dataclass(frozen=True)
class TokenAudit:
    """What tokenisation did: rows kept, rows dropped by reason, responses truncated."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    """Answers of kept rows that end at the window."""
    examples: dict[str, str] = field(default_factory=dict)
    """The id of the first row that was dropped, by reason."""
    without_begin: int = 0
    """Prompts without the begin token that the tokenizer puts before plain text: served alike, but hardly meant."""


@dataclass(slots=True)
class _Draft:
    prompt_ids: tuple[int, ...]
    cluster: str
    split: str
    responses: dict[tuple[int, ...], int] = field(default_factory=dict)
    pairs: dict[str, Preference] = field(default_factory=dict)
    labels: dict[str, Label] = field(default_factory=dict)

    def add(self, ids: tuple[int, ...]) -> int:
        return self.responses.setdefault(ids, len(self.responses))


class _Rejected(Exception):  # noqa: N818
    """A row cannot train; the argument is the reason."""


def encode_groups(
    pairs: Iterable[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template_digest: str,
    end_ids: Sequence[int],
    max_length: int,
    too_long: str,
) -> tuple[list[Group], TokenAudit]:
    """Turn pairs into groups, in the order in which their prompts first appear.

    Args:
        pairs: rows of a pair snapshot.
        tokenizer: tokenizer with the chat template of the policy.
        template_digest: digest of that template; sampled ids are used only where it matches.
        end_ids: token ids that end an answer.
        max_length: tokens of a prompt and one response together.
        too_long: `drop`, `truncate_response` or `refuse`.

    Returns:
        The groups and the audit: kept + dropped = rows read.

    Raises:
        DataError: a row is too long and `too_long` is `refuse`.
    """
    drafts: dict[str, _Draft] = {}
    dropped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    kept = truncated = 0
    for pair in pairs:
        key = prompt_key(pair.prompt, pair.tools)
        cut = 0
        try:
            draft = drafts.get(key)
            prompt_ids = draft.prompt_ids if draft else tuple(_prompt_ids(tokenizer, pair))
            encoded: list[tuple[int, ...] | None] = []
            for response in (pair.chosen, pair.rejected):
                if response is None:
                    encoded.append(None)
                    continue
                ids = _response_ids(tokenizer, pair, response, prompt_ids, template_digest, end_ids)
                if len(prompt_ids) + len(ids) > max_length:
                    ids = _shorten(ids, len(prompt_ids), max_length, too_long, pair.pair_id)
                    cut += 1
                encoded.append(ids)
            chosen, rejected = encoded
            if chosen is not None and chosen == rejected:
                raise _Rejected("identical_tokens")
        except _Rejected as reason:
            dropped[str(reason)] += 1
            examples.setdefault(str(reason), pair.pair_id)
            continue
        if draft is None:
            draft = drafts[key] = _Draft(prompt_ids, pair.cluster, pair.split)
        kept += 1
        truncated += cut
        if chosen is not None and rejected is not None:
            draft.pairs[pair.pair_id] = Preference(
                draft.add(chosen), draft.add(rejected), pair.weight, pair.pair_id, pair.source
            )
        else:
            only = chosen if chosen is not None else rejected
            assert only is not None  # noqa: S101  the schema has at least one answer
            label = Label(draft.add(only), bool(pair.label), pair.weight, pair.pair_id, pair.source)
            draft.labels[pair.pair_id] = label
    groups = [
        Group(
            group_id=key,
            cluster=draft.cluster,
            split=draft.split,
            prompt_ids=draft.prompt_ids,
            responses=tuple(draft.responses),
            pairs=tuple(draft.pairs.values()),
            labels=tuple(draft.labels.values()),
        )
        for key, draft in drafts.items()
    ]
    begin = tokenizer.bos_token_id
    writes_it = begin is not None and tokenizer("").input_ids[:1] == [begin]
    without = sum(writes_it and group.prompt_ids[:1] != (begin,) for group in groups)
    return groups, TokenAudit(kept, dropped, truncated, examples, without)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> list[int]:
    try:
        ids = render_prompt(tokenizer, pair.prompt, pair.tools)
    except ModelError:
        raise _Rejected("template_error") from None
    begin = tokenizer.bos_token_id
    # ChatML begins every turn with it, so only two in a row at the beginning are wrong.
    if begin is not None and ids[:2] == [begin, begin]:
        raise _Rejected("two_begin_tokens")
    return ids


def _response_ids(
    tokenizer: PreTrainedTokenizerBase,
    pair: Pair,
    response: Response,
    prompt_ids: tuple[int, ...],
    template_digest: str,
    end_ids: Sequence[int],
) -> tuple[int, ...]:
    if response.token_ids is not None and response.template_digest == template_digest:
        ids = list(response.token_ids)
    else:
        ids = _rendered_response(tokenizer, pair, response, prompt_ids, end_ids)
    cut = response.finish_reason == FinishReason.LENGTH
    if cut:
        while ids and ids[-1] in end_ids:
            ids.pop()
    elif not ids or ids[-1] not in end_ids:
        raise _Rejected("no_end_token")
    elif len(ids) > 1 and ids[-2] in end_ids:
        raise _Rejected("two_end_tokens")
    if not ids or (not cut and len(ids) == 1):
        raise _Rejected("no_scored_token")
    if any(token in end_ids for token in ids[:-1]):
        # The model stops there when it answers: what follows is a text that it can never give.
        raise _Rejected("end_token_inside")
    return tuple(ids)


def _rendered_response(
    tokenizer: PreTrainedTokenizerBase,
    pair: Pair,
    response: Response,
    prompt_ids: tuple[int, ...],
    end_ids: Sequence[int],
) -> list[int]:
    answer = Message("assistant", response.content, tool_calls=response.tool_calls)
    try:
        whole = tokenizer.apply_chat_template(
            [m.to_openai() for m in (*pair.prompt, answer)],
            tools=None if pair.tools is None else json.loads(pair.tools),
            tokenize=True,
            return_dict=False,
        )
    except Exception:  # noqa: BLE001  Jinja templates raise whatever their author chose
        raise _Rejected("template_error") from None
    ids = list(map(int, whole))
    if tuple(ids[: len(prompt_ids)]) != prompt_ids:
        raise _Rejected("template_not_prefix_preserving")
    ids = ids[len(prompt_ids) :]
    # Templates may write after the end token (ChatML: a newline); the model never sees that as its own answer.
    last = max((i for i, token in enumerate(ids) if token in end_ids), default=None)
    return ids if last is None else ids[: last + 1]


def _shorten(ids: tuple[int, ...], prompt_length: int, max_length: int, too_long: str, pair_id: str) -> tuple[int, ...]:
    if too_long == "refuse":
        msg = f"pair `{pair_id}` has {prompt_length + len(ids)} tokens, more than prepare.max_length = {max_length}\n\nHint: raise it, or set prepare.too_long to `drop` or `truncate_response`."
        raise DataError(msg)
    if prompt_length >= max_length:
        raise _Rejected("prompt_longer_than_window")
    if too_long == "drop":
        raise _Rejected("longer_than_window")
    return ids[: max_length - prompt_length]
