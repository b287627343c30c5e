"""Objectives: pure functions from log-probabilities to losses. Torch and nothing else.

An objective asks for what it needs by the names of its positional parameters, and its keyword-only parameters are its
options:

    policy_logps     [N]  summed log-probability of each response under the policy, in nats
    reference_logps  [N]  the same under the frozen reference; who does not ask for it trains without a reference
    token_counts     [N]  tokens of each response
    chosen, rejected [P]  indices of the two responses of each pair
    responses        [U]  indices of responses that are judged one by one
    desirable        [U]  bool: their labels; who does not ask for it learns from the good ones only
    mean_tokens      ()   mean tokens of the chosen (or of the judged) responses of the whole step, weighted
    agreement        [N]  mean over a response's tokens of log p(token) - log sum_v p(v)^2, detached (WPO)
    kl               ()   mean of S - R over answers to other prompts in the whole step, detached (KTO)

It returns one loss for each pair (or for each judged response); the caller weighs them and divides by the global sum of
weights, so that accumulation, packing and the number of workers do not change the gradient. What concerns the whole
step (`mean_tokens`, `kl`) comes from outside for the same reason. A function of your own has the same signature; where its
loss of a row depends on other rows, it is given all rows of a step at once (`app.training.coupling`).

Formulas: S is a policy log-probability, R a reference one, n a token count, h = S - R, w and l are chosen and rejected.
"""

import ast
import importlib
import inspect
import keyword
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from app.errors import RecipeError

BALANCED = frozenset({"desirable_weight", "undesirable_weight"})
"""Options without a default that the data gives where a recipe does not, see `judgements.balanced`."""
_ALMOST_CERTAIN = -1e-7
"""Largest mean log-probability of a token that has finite odds in fp32."""


@dataclass(frozen=True, slots=True)
class Losses:
    """What an objective returns."""

    losses: Tensor
    """[P] or [U]: the loss of each pair or judged response."""
    rewards: Tensor
    """[N]: the implicit reward of each response, detached; a pair's margin is the difference of two."""


@dataclass(frozen=True, slots=True)
class Scored:
    """All that an objective may ask for, by these names; see the module's docstring."""

    policy_logps: Tensor
    token_counts: Tensor
    chosen: Tensor
    rejected: Tensor
    responses: Tensor
    desirable: Tensor
    mean_tokens: float
    reference_logps: Tensor | None = None
    agreement: Tensor | None = None
    kl: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """Return it with its tensors on a device."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in named.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Objective:
    """An objective with its options."""

    name: str
    function: Callable[..., Losses]
    options: Mapping[str, Any]
    """By the names of its parameters; None for weights that are to be balanced."""
    needs: frozenset[str]
    """The names that it asks for."""
    coupled: bool = False
    """Whether its loss of a row depends on the rows beside it."""

    @property
    def unit(self) -> Literal["pairs", "labels", "good"]:
        """What it gets one loss for: a pair, a judged response, or a good response (likelihood only)."""
        return "pairs" if "chosen" in self.needs else "labels" if "desirable" in self.needs else "good"

    @property
    def open_weights(self) -> dict[str, None]:
        """The weights that are to be balanced."""
        return {name: None for name, value in self.options.items() if name in BALANCED and value is None}

    @property
    def source(self) -> str:
        """The source of a function of one's own, without comments; empty for one that ships, and where none can be read."""
        if ":" not in self.name:
            return ""
        try:
            return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(self.function))))
        except (OSError, TypeError, SyntaxError):
            return ""

    @property
    def has_reference(self) -> bool:
        """Whether it holds the policy against a reference."""
        return "reference_logps" in self.needs

    def __call__(self, scored: Scored) -> Losses:
        """Return the losses; what the objective needs must be there.

        Raises:
            RecipeError: it returned something of another shape, which torch would have broadcast into another loss.
        """
        found = self.function(**{name: getattr(scored, name) for name in self.needs}, **self.options)
        judged = scored.chosen if self.unit == "pairs" else scored.responses
        for field_name, expected in (("losses", judged.shape), ("rewards", scored.policy_logps.shape)):
            value = getattr(found, field_name, None)
            if not (isinstance(value, Tensor) and value.is_floating_point() and value.shape == expected):
                got = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else f"`{value}`"
                what = "each pair" if self.unit == "pairs" else "each judged response"
                msg = f"objective `{self.name}` must return `{field_name}` as floats of shape {list(expected)}, found {got}\n\nHint: `Losses(losses, rewards)` with one loss for {what}, which the trainer weighs and averages over the whole step, and one reward for each response."
                raise RecipeError(msg)
        return found


def load_objective(name: str, options: Mapping[str, Any]) -> Objective:
    """Find an objective, one of this module or `package.module:function`, and bind its options.

    One of your own is tried on made-up rows.

    Raises:
        RecipeError: there is no such function, it asks for what no objective gets, it does not take an option, or it
            gives the rows no loss.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute) if attribute else globals()[name]
        parameters = inspect.signature(function).parameters.values()
    except Exception as error:  # noqa: BLE001  a module of the user's may raise anything as it is imported
        msg = f"no objective `{name}`: {error}\n\nHint: one of your own is `package.module:function`, importable where the workers run."
        raise RecipeError(msg) from None
    bound = {_parameter(key): value for key, value in options.items()}
    taken = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    if unknown := sorted(bound.keys() - taken):
        near = get_close_matches(unknown[0], taken, n=1)
        meant = f"did you mean `{near[0]}`? Its" if near else "its"
        msg = f"objective `{name}` has no option {', '.join(f'`{key}`' for key in unknown)}\n\nHint: {meant} options are {', '.join(sorted(taken)) or 'none'}."
        raise RecipeError(msg)
    required = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
    given = [name for name in BALANCED & required if bound.get(name) is not None]
    if 0 < len(given) < len(BALANCED & required):
        msg = f"objective `{name}` needs {' and '.join(f'`{key}`' for key in sorted(BALANCED))}, or neither: then they are balanced"
        raise RecipeError(msg)
    bound = {**dict.fromkeys(required & BALANCED), **bound}
    if missing := sorted(required - bound.keys()):
        msg = f"objective `{name}` needs the option {', '.join(f'`{key}`' for key in missing)}, which has no default"
        raise RecipeError(msg)
    needs = {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY}
    if strange := sorted(needs - {field.name for field in fields(Scored)}):
        msg = f"objective `{name}` asks for {', '.join(f'`{key}`' for key in strange)}\n\nHint: it can have {', '.join(field.name for field in fields(Scored))}."
        raise RecipeError(msg)
    if ("chosen" in needs) == ("responses" in needs) or ("chosen" in needs) != ("rejected" in needs):
        msg = f"objective `{name}` must ask for `chosen` and `rejected`, or for `responses`"
        raise RecipeError(msg)
    if "kl" in needs and "desirable" not in needs:
        msg = f"objective `{name}` asks for `kl`, which is estimated for judged answers only: ask for `desirable` too"
        raise RecipeError(msg)
    if "wpo" in taken and not bound.get("wpo"):
        needs.discard("agreement")
    objective = Objective(name, function, bound, frozenset(needs))
    return replace(objective, coupled=couples_rows(objective)) if attribute else objective


def couples_rows(objective: Objective) -> bool:
    """Say whether made-up rows have other losses or rewards than either half of them; weights that are to be balanced are 1.

    Raises:
        RecipeError: there is no loss, or another one the second time.
    """
    objective = replace(objective, options={**objective.options, **dict.fromkeys(objective.open_weights, 1.0)})
    rows = 16
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(2, 5, (rows,), generator=generator)
    policy, reference, agreement = (-counts * torch.rand(rows, generator=generator) for _ in range(3))
    liked = torch.arange(rows) % 5 < 2  # another share of either half

    def told(first: int, last: int) -> tuple[Tensor, Tensor]:
        indices = torch.arange(last - first)
        part = slice(first, last)
        scored = Scored(
            policy_logps=policy[part],
            reference_logps=reference[part],
            token_counts=counts[part],
            chosen=indices[::2],
            rejected=indices[1::2],
            responses=indices,
            desirable=liked[part],
            mean_tokens=3.0,
            agreement=agreement[part],
            kl=torch.tensor(0.1),
        )
        found = objective(scored)
        return found.losses.detach(), found.rewards.detach()

    try:
        together, again = told(0, rows), told(0, rows)
        halves = [torch.cat(parts) for parts in zip(told(0, rows // 2), told(rows // 2, rows), strict=True)]
    except RecipeError:
        raise
    except Exception as error:  # a function of the user's may raise anything
        shown = ", ".join(f"{name}={value!r}" for name, value in objective.options.items())
        msg = f"objective `{objective.name}` gives made-up rows no loss, with the options {shown or '(none)'}: {type(error).__name__}: {error}"
        raise RecipeError(msg) from error
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(together, again, strict=True)):
        msg = f"objective `{objective.name}` gives the same rows another loss each time it is asked, so a run would depend on workers and on what was asked before\n\nHint: keep nothing between calls, and draw nothing at random."
        raise RecipeError(msg)
    return not all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in zip(together, halves, strict=True)
    )


def _parameter(option: str) -> str:
    # `lambda` is a word of Python.
    return f"{option}_" if keyword.iskeyword(option) else option


def sft(policy_logps: Tensor, token_counts: Tensor, responses: Tensor, mean_tokens: float) -> Losses:
    """Negative log-likelihood of the responses, a mean over all their tokens: -S / mean(n); section 3.5 of https://arxiv.org/abs/2203.02155.

    The reward is the mean log-probability of a token.
    """
    return Losses(-policy_logps[responses] / mean_tokens, _means(policy_logps, token_counts).detach())


def dpo(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    token_counts: Tensor,
    mean_tokens: float,
    agreement: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    length_weight: float = 0.0,
    wpo: bool = False,
) -> Losses:
    """Direct Preference Optimization: -logsigmoid(beta (h_w - h_l)), equation 7 of https://arxiv.org/abs/2305.18290.

    With `label_smoothing` e it is conservative DPO (https://ericmitchell.ai/cdpo.pdf, equation 3), which assumes that
    a share e of the labels is flipped. With `wpo` the loss of each pair is weighed by how likely the policy is to give
    its responses itself (WPO, https://arxiv.org/abs/2406.11827, equations 2 and 3). With `sft_weight` a it is RPO
    (https://arxiv.org/abs/2404.19733, equation 1, and https://arxiv.org/abs/2405.16436): a times the negative
    log-likelihood of the chosen responses is added, averaged over all their tokens as TRL's
    `loss_type=["sigmoid", "sft"]` does; `wpo` does not weigh it. With `length_weight` a it is R-DPO
    (https://arxiv.org/abs/2403.19159): a for each token that the chosen response is longer is added to the margin, so a
    pair that length alone explains teaches little, and one against its length teaches more. The rewards do not hold it.
    """
    rewards = beta * (policy_logps - reference_logps)
    margins = rewards[chosen] - rewards[rejected]
    if length_weight:
        margins = margins + length_weight * (token_counts[chosen] - token_counts[rejected]).to(margins.dtype)
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    if wpo:
        assert agreement is not None  # noqa: S101  `Objective` asks for it where the option is set
        losses = losses * (agreement[chosen] + agreement[rejected]).exp()
    if sft_weight:
        losses = losses - sft_weight * policy_logps[chosen] / mean_tokens
    return Losses(losses, rewards.detach())


def robust(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Losses:
    """Robust DPO, equation 6 of https://arxiv.org/abs/2403.00409: unbiased where a share e of the labels is flipped.

    (-(1 - e) logsigmoid(m) + e logsigmoid(-m)) / (1 - 2 e) with m = beta (h_w - h_l).
    """
    rewards = beta * (policy_logps - reference_logps)
    margins = rewards[chosen] - rewards[rejected]
    kept, flipped = (1 - label_smoothing) * logsigmoid(margins), label_smoothing * logsigmoid(-margins)
    return Losses((flipped - kept) / (1 - 2 * label_smoothing), rewards.detach())


def ipo(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    token_counts: Tensor,
    *,
    beta: float = 0.1,
    normalize: Literal["token_mean", "sum"] = "token_mean",
) -> Losses:
    """Identity Preference Optimization, equation 17 of https://arxiv.org/abs/2310.12036: (m - 1 / (2 beta))^2.

    m is h_w / n_w - h_l / n_l (`token_mean`, as in TRL) or h_w - h_l (`sum`, as in the paper and in OpenRLHF).
    """
    log_ratios = policy_logps - reference_logps
    scaled = _means(log_ratios, token_counts) if normalize == "token_mean" else log_ratios
    return Losses((scaled[chosen] - scaled[rejected] - 1 / (2 * beta)) ** 2, (beta * log_ratios).detach())


def hinge(
    policy_logps: Tensor, reference_logps: Tensor, chosen: Tensor, rejected: Tensor, *, beta: float = 0.1
) -> Losses:
    """Hinge loss on the margin of DPO: max(0, 1 - beta (h_w - h_l)).

    SLiC's loss (https://arxiv.org/abs/2305.10425) in the form of https://arxiv.org/abs/2309.06657, table 1.
    """
    rewards = beta * (policy_logps - reference_logps)
    return Losses(relu(1 - (rewards[chosen] - rewards[rejected])), rewards.detach())


def dpo_norm(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    token_counts: Tensor,
    *,
    beta: float = 5.0,
) -> Losses:
    """Length-normalised DPO: -logsigmoid(beta (h_w / n_w - h_l / n_l)), equation 6 of https://arxiv.org/abs/2411.15124.

    It is a mean over tokens, so beta is of another size than in DPO: 5 there. So are the rewards, by which a pair counts
    as right; TRL's `sigmoid_norm` reports beta h, as for every loss.
    """
    rewards = beta * _means(policy_logps - reference_logps, token_counts)
    return Losses(-logsigmoid(rewards[chosen] - rewards[rejected]), rewards.detach())


def apo_zero(
    policy_logps: Tensor, reference_logps: Tensor, chosen: Tensor, rejected: Tensor, *, beta: float = 0.1
) -> Losses:
    """Anchored Preference Optimization for chosen answers better than the policy's own.

    1 - sigmoid(beta h_w) + sigmoid(beta h_l): up with the chosen, down with the rejected, each against the reference;
    https://arxiv.org/abs/2408.06266, section 4.
    """
    rewards = beta * (policy_logps - reference_logps)
    return Losses(1 - rewards[chosen].sigmoid() + rewards[rejected].sigmoid(), rewards.detach())


def apo_down(
    policy_logps: Tensor, reference_logps: Tensor, chosen: Tensor, rejected: Tensor, *, beta: float = 0.1
) -> Losses:
    """Anchored Preference Optimization for chosen answers worse than the policy's own.

    sigmoid(beta h_w) + 1 - sigmoid(beta (h_w - h_l)): both go down, the rejected further;
    https://arxiv.org/abs/2408.06266, section 4.
    """
    rewards = beta * (policy_logps - reference_logps)
    margins = rewards[chosen] - rewards[rejected]
    return Losses(rewards[chosen].sigmoid() + 1 - margins.sigmoid(), rewards.detach())


def dpop(
    policy_logps: Tensor,
    reference_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    penalty: float = 5.0,
) -> Losses:
    """DPO-Positive: -logsigmoid(beta (h_w - h_l - penalty max(0, R_w - S_w))).

    Equation 3 of https://arxiv.org/abs/2402.13228: the chosen response's likelihood is kept from falling below the
    reference's.
    """
    log_ratios = policy_logps - reference_logps
    fallen = relu(-log_ratios[chosen])
    margins = beta * (log_ratios[chosen] - log_ratios[rejected] - penalty * fallen)
    return Losses(-logsigmoid(margins), (beta * log_ratios).detach())


def simpo(
    policy_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    token_counts: Tensor,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    label_smoothing: float = 0.0,
) -> Losses:
    """SimPO: -logsigmoid(beta (S_w / n_w - S_l / n_l - gamma / beta)), equation 6 of https://arxiv.org/abs/2405.14734.

    The margin is given as `gamma_beta_ratio`, as its authors advise: it is of the size of a mean log-probability.
    """
    rewards = beta * _means(policy_logps, token_counts)
    margins = rewards[chosen] - rewards[rejected] - beta * gamma_beta_ratio
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    return Losses(losses, rewards.detach())


def cpo(
    policy_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    mean_tokens: float,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
) -> Losses:
    """Contrastive Preference Optimization: -logsigmoid(beta (S_w - S_l)) - nll_weight S_w / mean(n_w).

    Equations 3 to 5 of https://arxiv.org/abs/2401.08417.
    """
    rewards = beta * policy_logps
    losses = -logsigmoid(rewards[chosen] - rewards[rejected])
    return Losses(losses - nll_weight * policy_logps[chosen] / mean_tokens, rewards.detach())


def orpo(
    policy_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    token_counts: Tensor,
    mean_tokens: float,
    *,
    lambda_: float = 0.1,
    nll_scope: Literal["response"] = "response",  # noqa: ARG001  names what is measured
) -> Losses:
    """ORPO: the likelihood of the chosen response, and lambda times -logsigmoid(log odds ratio).

    Equations 6 and 7 of https://arxiv.org/abs/2403.07691, with odds(p) = p / (1 - p) of the mean log-probability of a
    token. The likelihood is that of the chosen responses' tokens (`nll_scope`); TRL takes the prompt's too.
    """
    means = _means(policy_logps, token_counts)
    ratios = _log_odds(means[chosen]) - _log_odds(means[rejected])
    losses = -policy_logps[chosen] / mean_tokens - lambda_ * logsigmoid(ratios)
    return Losses(losses, (lambda_ * means).detach())


def kto(
    policy_logps: Tensor,
    reference_logps: Tensor,
    responses: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float,
    undesirable_weight: float,
) -> Losses:
    """Kahneman-Tversky Optimization, equations 7 and 8 of https://arxiv.org/abs/2402.01306.

    desirable_weight (1 - sigmoid(beta (h - z))) for desirable responses, undesirable_weight (1 - sigmoid(beta (z - h)))
    for others, with z = max(0, kl). Where a recipe gives no weights they are balanced.
    """
    log_ratios = policy_logps - reference_logps
    gains = beta * (log_ratios[responses] - kl.clamp(min=0))
    losses = torch.where(
        desirable, desirable_weight * (1 - gains.sigmoid()), undesirable_weight * (1 - (-gains).sigmoid())
    )
    return Losses(losses, (beta * log_ratios).detach())


def apo_zero_unpaired(
    policy_logps: Tensor,
    reference_logps: Tensor,
    responses: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float,
    undesirable_weight: float,
) -> Losses:
    """APO-zero on responses judged one by one (https://arxiv.org/abs/2408.06266, appendix): KTO with kl = 0.

    desirable_weight (1 - sigmoid(beta h)) for desirable responses, undesirable_weight sigmoid(beta h) for others.
    """
    rewards = beta * (policy_logps - reference_logps)
    up = rewards[responses].sigmoid()
    return Losses(torch.where(desirable, desirable_weight * (1 - up), undesirable_weight * up), rewards.detach())


def _means(sums: Tensor, token_counts: Tensor) -> Tensor:
    return sums / token_counts


def _log_odds(log_p: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log p < 0; a certain answer has large, finite odds."""
    log_p = log_p.clamp(max=_ALMOST_CERTAIN)
    return log_p - torch.log(-torch.expm1(log_p))
