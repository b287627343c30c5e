"""What `prefloop bench` does: make the work, run the arms, tell the ratios, compare them with what is expected."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import lcm
from pathlib import Path
from typing import Any, Literal

import psutil

from app.bench.ablate import ablate
from app.bench.arms import this_device
from app.bench.flops import ModelShape, gemm_peak
from app.bench.headline import compare_headline
from app.bench.scale import ScaleSettings, bench_scale, overhead
from app.bench.train import BATCH, RATIOS, Part, Say, compare_trainers, require_rival
from app.bench.work import Work, all_pairs, best_against_rest, cut_prompts, read_work, sampled_groups
from app.config import TrainSection
from app.errors import RecipeError
from app.ledger import Ledger
from app.models import LoadedModel, ensure_sft, load_model
from app.schemas import Pair
from app.storage import Home
from app.training.tokenization import Group

_JOB = {"ray overhead": 0.05, "data wait": 0.01}
TARGETS: Mapping[str, Mapping[str, float]] = {
    "hh_rlhf": {"online": 3.5, "cached": 2.0, "memory": 2.0, **_JOB},
    "llamafactory_demo": {"online": 1.8, "cached": 1.5, **_JOB},
    "groups_of_4": {"all pairs: online": 5.0, "best against the rest: online": 2.5},
    "one_token_prompts": {"online": 1.0, "cached": 1.0, "steady": 1.0},
}
"""What we want to reach on known data with full fine-tuning (`memory`: in bf16); of shares it is an upper limit."""
_USUAL_PAIRS = 64
_STEPS, _STEPS_OF_JOB = 3, 4
"""Fewest steps that tell something; of a job the first two and the last are left out."""
_LEARNING_RATES = {"lora": 2e-4, "full": 1e-5}


@dataclass(frozen=True)
class BenchSettings:
    """What to compare on which work."""

    data: Path
    pairs: int | None
    """At most; what does not fill an optimizer step is left out. None: 64, or as many as make three steps."""
    max_length: int
    dtype: Literal["float32", "bfloat16"]
    adapter: Literal["lora", "full"]
    answers: int | None
    """Sample so many answers to each prompt, instead of taking the pairs of the data."""
    prompt_tokens: int | None
    """Cut every prompt to its last tokens."""
    rounds: int
    model: str
    micro_batch_tokens: int | None
    """Token budget of our forward; None: what a recipe has that says nothing."""
    epochs: int = 1
    """Passes of every arm over the rows; the reference scores them once where it is cached."""
    only: Part | None = None
    """The only part that is measured; default: all that the work has."""

    @property
    def batch_pairs(self) -> int:
        """Pairs of an optimizer step: whole groups for us, whole batches for TRL, and as many in both."""
        return BATCH if self.answers is None else lcm(BATCH, *_pairs_of(self.answers))

    @property
    def most_pairs(self) -> int:
        """Pairs that are measured, at most."""
        return self.pairs or max(_USUAL_PAIRS, _STEPS * self.batch_pairs)

    @property
    def token_budget(self) -> int:
        """Tokens of a micro-batch of ours."""
        return self.micro_batch_tokens or TrainSection().token_budget(this_device().type)

    @property
    def as_text(self) -> bool:
        """Whether the work is the data's own text, so that a job can begin with it."""
        return self.answers is None and self.prompt_tokens is None

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is measured."""
        having: tuple[Part, ...] = ("online", "cached", "headline") if self.as_text else ("online", "cached")
        return having if self.only is None else (self.only,)


@dataclass(frozen=True)
class Outcome:
    """What a benchmark found."""

    tree: dict[str, Any]
    missed: list[str]
    """Ratios below what was expected."""


def bench_train(
    home: Home, settings: BenchSettings, *, expect: Sequence[str], targets: str | None, say: Say, tell: Say
) -> Outcome:
    """Compare our trainer with TRL's; progress goes to `say`, each line of the report to `tell` as soon as it is known.

    Args:
        home: its folder `bench` keeps the model and sampled answers.
        settings: what is compared on which work.
        expect: `RATIO=X`, what a ratio is to reach at least (a share at most).
        targets: the `TARGETS` to reach beside those, as far as they are about what is measured.
        say: told of what is done.
        tell: told each line of the report.

    Raises:
        TrainingError: TRL is not there, an arm failed, or the two trainers do not compute the same.
        DataError: the data has too few usable pairs.
        RecipeError: an expectation is malformed or of a ratio that is not measured, or so is the only part asked for.
    """
    require_rival()
    if settings.only == "headline" and not settings.as_text:
        msg = "--only headline: sampled answers and cut prompts are no text that a job could begin with"
        raise RecipeError(msg)
    expected, parts = _expected(expect), settings.parts
    measured = [name for part in parts for name in RATIOS[part]]
    kinds = [""] if settings.answers is None else ["best against the rest: ", "all pairs: "]
    known = [kind + ratio for kind in kinds for ratio in measured]
    if strange := [name for name in expected if name not in known]:
        msg = f"`--expect {strange[0]}`: no such ratio; there are: {', '.join(f'`{name}`' for name in known)}"
        raise RecipeError(msg)
    if targets is not None:
        expected = _targets(targets, settings, known) | expected
    bench_home, works, pairs = _works(home, settings)
    loaded = load_model(bench_home, works[kinds[0]].model_id, dtype=settings.dtype)
    shape, threads = ModelShape.of(loaded.model), works[kinds[0]].threads
    del loaded
    peaks = {dtype: gemm_peak(dtype, threads) for dtype in ("bfloat16", "float32")}
    missed = []
    tree: dict[str, Any] = {
        "settings": asdict(settings) | {"data": str(settings.data), "pairs": settings.most_pairs},
        "works": {},
    }
    for kind, work in works.items():
        wanted = {name.removeprefix(kind): value for name, value in expected.items() if name.startswith(kind)}
        title = f"{kind}{_what(settings, work)}, at most {work.max_length} tokens, {work.adapter}, {work.dtype}, {work.batch_pairs} pairs a step, epochs: {work.epochs}, {threads} threads"
        found = compare_trainers(title, work, parts=parts, shape=shape, peaks=peaks, rounds=settings.rounds, say=say)
        ratios = list(found.ratios)
        _tell(tell, found.lines(wanted))
        tree["works"][kind or "pairs"] = found.tree()
        if "headline" in parts:
            headline = compare_headline(work, pairs, rounds=settings.rounds, say=say)
            ratios.append(headline.ratio)
            _tell(tell, headline.lines(wanted))
            shares = (headline.ray_overhead, headline.data_wait)
            missed += [kind + s.name for s in shares if s.name in wanted and s.value > wanted[s.name]]
            tree["headline"] = asdict(headline) | {"median": headline.ratio.median}
        missed += [kind + r.name for r in ratios if r.name in wanted and r.median < wanted[r.name]]
    return Outcome(tree, missed)


def bench_ablate(home: Home, settings: BenchSettings, *, say: Say, tell: Say) -> Outcome:
    """Take one technique away at a time from our own step."""
    _, works, _ = _works(home, settings)
    tree = {}
    for kind, work in works.items():
        found = ablate(work, rounds=settings.rounds, say=say)
        _tell(tell, [f"{kind}{_what(settings, work)}", *(row.line() for row in found)])
        tree[kind or "pairs"] = [asdict(row) for row in found]
    return Outcome(tree, [])


def bench_workers(home: Home, settings: BenchSettings, *, say: Say, tell: Say) -> Outcome:
    """Train with 1, 2, 4 and 8 workers."""
    del home  # a run on a home that counts what is read of it needs one of its own
    _require_steps(settings, _STEPS)
    found = bench_scale(
        ScaleSettings(
            data=settings.data,
            pairs=settings.most_pairs,
            max_length=settings.max_length,
            model=settings.model,
            adapter=settings.adapter,
            dtype=settings.dtype,
            micro_batch_tokens=settings.token_budget,
        ),
        say=say,
    )
    lines = [layout.line() for layout in found]
    lost = overhead(found)
    _tell(tell, [*lines, f"overhead of two workers with a thread each over one with two: {lost:+.1%}"])
    return Outcome({"layouts": [asdict(layout) for layout in found], "overhead": lost}, [])


def _what(settings: BenchSettings, work: Work) -> str:
    cut = "" if settings.prompt_tokens is None else f", cut to {settings.prompt_tokens} tokens"
    return f"{work.pairs} pairs on {len(work.groups)} prompts of {settings.data.name}{cut}"


def _tell(tell: Say, lines: Sequence[str]) -> None:
    for line in lines:
        tell(line)


def _targets(name: str, settings: BenchSettings, known: Sequence[str]) -> dict[str, float]:
    """Return the targets that are about what is measured; raises RecipeError where they are of another work."""
    needed = {"groups_of_4": {"--groups": "4"}, "one_token_prompts": {"--prompt-tokens": "1"}}.get(name, {})
    given = {"--groups": settings.answers, "--prompt-tokens": settings.prompt_tokens}
    asked = {option: str(value) for option, value in given.items() if value is not None}
    if settings.adapter != "full":
        msg = f"--targets {name} are of full fine-tuning, not of --lora\n\nHint: say what you expect with --expect instead."
        raise RecipeError(msg)
    if asked != needed:
        wanted, found = (
            " ".join(f"{option} {value}" for option, value in work.items()) or "the pairs of the data as they are"
            for work in (needed, asked)
        )
        msg = f"--targets {name} are of {wanted}, and this is of {found}\n\nHint: say what you expect with --expect instead."
        raise RecipeError(msg)
    targets = {
        ratio: value
        for ratio, value in TARGETS[name].items()
        if ratio in known and (ratio != "memory" or settings.dtype == "bfloat16")
    }
    if not targets:
        msg = f"--targets {name}: none of them is about what is measured here; there are: {', '.join(f'`{ratio}`' for ratio in known)}"
        raise RecipeError(msg)
    return targets


def _expected(given: Sequence[str]) -> dict[str, float]:
    """Read `RATIO=X`; raises RecipeError where it is not of this form."""
    found = {}
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            msg = f"`--expect {text}` is not of the form RATIO=NUMBER"
            raise RecipeError(msg) from None
    return found


def _works(home: Home, settings: BenchSettings) -> tuple[Home, dict[str, Work], Sequence[Pair]]:
    """Return the home of benchmarks, the works by kind, and the pairs as text where the data has them."""
    bench_home = Home.at(home.local("bench"))
    ledger = Ledger.open(bench_home.ledger_url)
    model_id = ensure_sft(bench_home, ledger, settings.model).model_id
    ledger.close()
    loaded = load_model(bench_home, model_id, dtype="bfloat16")

    def work(groups: Sequence[Group]) -> Work:
        return Work(
            home_uri=bench_home.uri,
            sft=settings.model,
            model_id=model_id,
            groups=tuple(groups),
            adapter=settings.adapter,
            dtype=settings.dtype,
            max_length=settings.max_length,
            batch_pairs=settings.batch_pairs,
            micro_batch_tokens=settings.token_budget,
            learning_rate=_LEARNING_RATES[settings.adapter],
            threads=len(psutil.Process().cpu_affinity() or [0]),
            epochs=settings.epochs,
        )

    if settings.answers is None:
        _require_steps(settings, _STEPS_OF_JOB if settings.as_text else _STEPS)
        pairs, groups = read_work(
            settings.data,
            loaded,
            max_length=settings.max_length,
            pairs=settings.most_pairs,
            batch_pairs=settings.batch_pairs,
            prompt_tokens=settings.prompt_tokens,
        )
        return bench_home, {"": work(groups)}, pairs
    return bench_home, _sampled(bench_home, settings, loaded, work), ()


def _require_steps(settings: BenchSettings, steps: int) -> None:
    """Refuse so few pairs that they tell little, before answers are sampled; raises RecipeError."""
    batch_pairs = settings.batch_pairs
    if settings.most_pairs < steps * batch_pairs:
        msg = f"--pairs {settings.most_pairs} makes fewer than {steps} steps of {batch_pairs} pairs; the first and the last tell little\n\nHint: at least {steps * batch_pairs}."
        raise RecipeError(msg)


def _pairs_of(answers: int) -> tuple[int, int]:
    """Return the pairs of a prompt with so many answers: the best against the rest, and all."""
    return answers - 1, answers * (answers - 1) // 2


def _sampled(
    home: Home, settings: BenchSettings, loaded: LoadedModel, work: Callable[[Sequence[Group]], Work]
) -> dict[str, Work]:
    answers = settings.answers
    assert answers is not None  # noqa: S101  the caller asked
    best, every = _pairs_of(answers)
    _require_steps(settings, _STEPS)
    pairs = settings.most_pairs // settings.batch_pairs * settings.batch_pairs
    groups = sampled_groups(
        settings.data,
        loaded,
        answers=answers,
        prompts=pairs // best,
        max_length=settings.max_length,
        kept_in=home.local("groups"),
    )
    if settings.prompt_tokens is not None:
        groups = cut_prompts(groups, settings.prompt_tokens)
    return {
        "best against the rest: ": work(best_against_rest(groups)),
        "all pairs: ": work(all_pairs(groups[: pairs // every])),
    }
