"""`prefloop …`: the command line. It starts jobs and services as child processes and imports none of them.

Exit codes: 0 done or shipped, 3 the gate holds, 130 interrupted, 2 wrong usage, 1 any other error.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from app.errors import Interrupted, PrefloopError, RecipeError
from app.storage import HOME_VARIABLE, Home

cli = typer.Typer(
    name="prefloop",
    help="Close the preference loop on Ray: collect feedback, build pairs, train, evaluate, ship, collect again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(help="Recipe (YAML).", metavar="RECIPE")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value.")]
Actor = Annotated[str | None, typer.Option(help="Who acts, for the audit log; default: the user.")]
_ROUNDS = 3
_DEMO_RECIPE = Path("recipes/demo_only.yaml")


def main() -> None:
    """Run the command line."""
    try:
        cli()
    except PrefloopError as error:
        Console(stderr=True).print(f"prefloop: {error}", highlight=False, markup=False)
        sys.exit(error.exit_code)


@cli.command()
def demo(
    audience: Annotated[str, typer.Option(help="`style`, or `random` for thumbs without meaning.")] = "style",
    style: Annotated[Path | None, typer.Option(help="JSON of another house style.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of other prompts (`prompt`).")] = None,
    recipe: Annotated[Path, typer.Option(help="Recipe of the demo.")] = _DEMO_RECIPE,
    overrides: Overrides = [],  # noqa: B006  typer reads the default
) -> None:
    """Run the whole loop once on the embedded model, with a simulated audience."""
    from app.demo.runner import run_demo

    raise typer.Exit(
        run_demo(_home(), recipe=recipe, audience=audience, style=style, prompts=prompts, overrides=overrides)
    )


@cli.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="Parquet, JSONL or JSON files, also gzipped.")],
    to: Annotated[str, typer.Option("--to", help="Name of the pair snapshot.")],
    recipe: Annotated[Path | None, typer.Option(help="Recipe whose `pairs` section rules the import.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="The model that labelled the pairs; it may not judge what learned from them.")
    ] = None,
) -> None:
    """Bring preference or instruction data in as a pair snapshot."""
    from app.config import PairSection, load_recipe
    from app.ledger import Ledger
    from app.preferences.imports import import_files, print_import

    home = _home()
    section = load_recipe(recipe).pairs if recipe else PairSection()
    try:
        ledger = Ledger.open(home.ledger_url)
        snapshot, report = import_files(home, ledger, files, name=to, section=section, judge=judge)
    except KeyboardInterrupt:
        # typer would leave without a word.
        msg = "interrupted; nothing was imported, the same command begins anew"
        raise Interrupted(msg) from None
    print_import(Console(), to, snapshot, report)


@cli.command("build-pairs")
def build_pairs(recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
    """Turn the feedback of the ledger into a pair snapshot."""
    _job("build_pairs", recipe, overrides)


@cli.command()
def prepare(recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
    """Tokenise a pair snapshot and score it by the frozen reference, where the objective has one."""
    _job("prepare", recipe, overrides)


@cli.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    run: Annotated[str | None, typer.Option(help="Run id; an existing one continues.")] = None,
) -> None:
    """Prepare a pair snapshot, train, and say whether the model learned; nothing is evaluated or shipped."""
    _job("train", recipe, overrides, *_given("--run", run))


@cli.command()
def certify(
    cases: Annotated[Path | None, typer.Argument(help="JSON of cases; default: the golden table.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare every objective with given losses, most of them computed by TRL; exit code 1 on any miss."""
    from app.training.certify import GOLDEN, certify

    # Jobs run as `python -m`, which finds functions of one's own in this folder; so must we.
    sys.path.insert(0, str(Path.cwd()))
    verdicts = certify(cases or GOLDEN)
    missed = sum(not verdict.passed for verdict in verdicts)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts], indent=1))
    else:
        for verdict in verdicts:
            typer.echo(verdict.line())
        typer.echo(f"{len(verdicts) - missed} of {len(verdicts)} cases hold")
    raise typer.Exit(1 if missed else 0)


@cli.command()
def evaluate(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe (YAML).", metavar="RECIPE")] = None,
    overrides: Overrides = [],  # noqa: B006
    model: Annotated[str | None, typer.Option(help="Model id; default: the newest.")] = None,
    published: Annotated[
        str | None, typer.Option("--verify-published", metavar="DIR", help="Compare our numbers with published ones.")
    ] = None,
) -> None:
    """Measure a candidate and let the gate decide; exit code 3 is HOLD."""
    if (recipe is None) == (published is None):
        msg = "give a recipe to evaluate by, or --verify-published DIR alone"
        raise RecipeError(msg)
    if recipe is not None:
        _job("evaluate", recipe, overrides, *_given("--model", model))
        return
    if model is not None or overrides:
        msg = "--model and --set have no effect with --verify-published: remove them"
        raise RecipeError(msg)
    from app.evaluation.published import verify_published

    assert published is not None  # noqa: S101  checked above
    checks = []
    typer.echo("ours | published | difference | allowed")
    for check in verify_published(published):
        checks.append(check)
        mark = "" if check.holds else "  MISSED"
        numbers = f"{check.ours:.6g} | {check.published:.6g} | {check.difference:+.2g} | {check.tolerance:g}"
        typer.echo(f"{check.what}: {numbers}{mark}")
    held = sum(check.holds for check in checks)
    typer.echo(f"{held} of {len(checks)} hold")
    raise typer.Exit(0 if held == len(checks) else 1)


@cli.command()
def ship(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    model: Annotated[str | None, typer.Option(help="Model id; default: the newest evaluated.")] = None,
    actor: Actor = None,
) -> None:
    """Make a model with verdict SHIP the champion, without dropping a request."""
    _job("ship", recipe, overrides, *_given("--actor", actor), *_given("--model", model))


@cli.command()
def rollback(recipe: RecipePath, overrides: Overrides = [], actor: Actor = None) -> None:  # noqa: B006
    """Put the previous champion back."""
    _job("ship", recipe, overrides, "--rollback", *_given("--actor", actor))


@cli.command()
def loop(recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
    """Run every step from feedback to ship; continues where it was interrupted."""
    _job("loop", recipe, overrides)


@cli.command(
    # What follows is the child's to read, its `--help` and `--` too.
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
    options_metavar="",
)
def jobs(
    arguments: Annotated[list[str], typer.Argument(metavar="submit|list|logs|stop ...", help="See `jobs --help`.")],
) -> None:
    """Submit jobs to a Ray cluster, list them, read what they print, stop them."""
    _run([sys.executable, "-m", "ray_jobs.jobs", *arguments])


@cli.command()
def serve(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe (YAML).", metavar="RECIPE")] = None,
    overrides: Overrides = [],  # noqa: B006
    detach: Annotated[bool, typer.Option("--detach", help="Return when healthy and leave it running.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop what --detach left running.")] = False,
) -> None:
    """Serve the champion behind the gateway and collect feedback."""
    if stop == (recipe is not None):
        msg = "give a recipe to serve, or --stop alone"
        raise RecipeError(msg)
    if recipe is None:
        _run([sys.executable, "-m", "serving.deploy", "--stop"])
    else:
        _run([sys.executable, "-m", "serving.deploy", *_recipe(recipe, overrides), *(["--detach"] if detach else [])])


@cli.command()
def dashboard(
    recipe: RecipePath,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 8501,
) -> None:
    """See the loop, judge answers, ship and roll back in a browser."""
    _run([sys.executable, "-m", "dashboard.launch", str(recipe), "--port", str(port)])


@cli.command()
def status() -> None:
    """Show the champion, the service, and the newest snapshots, runs and verdicts."""
    from app.ledger import Ledger
    from app.status import read_status

    home = _home()
    console = Console()
    for title, columns, rows in read_status(home, Ledger.open(home.ledger_url)):
        table = Table(*columns, title=title, title_justify="left", box=None)
        for row in rows:
            table.add_row(*row)
        console.print(table)


@cli.command()
def ratings(
    file: Annotated[Path, typer.Argument(help="Battles (CSV, JSONL, JSON): left, right, winner; Arena-Hard's too.")],
    baseline: Annotated[str | None, typer.Option(help="Model whose rating is 1000; scores are against it.")] = None,
    style_control: Annotated[bool, typer.Option("--style-control", help="Ratings at equal style.")] = False,
    answers: Annotated[
        list[str], typer.Option(metavar="FILE", help="Answers, for the style: Arena-Hard's files.")
    ] = [],  # noqa: B006
    level: Annotated[float, typer.Option(help="Confidence level of the intervals.", min=0.5, max=0.999)] = 0.95,
    samples: Annotated[int, typer.Option(help="Resamples.", min=100)] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the resamples.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Rate any file of battles: Bradley-Terry, win rates, scores against a baseline, intervals by row and by prompt."""
    from app.evaluation.battles import read_answer_texts, read_battles, with_texts
    from app.evaluation.intervals import Resampling
    from app.evaluation.ratings import STYLE_FEATURES, rate
    from app.evaluation.report import ratings_tables

    if answers and not style_control:
        msg = "--answers has no effect without --style-control: remove it"
        raise RecipeError(msg)
    battles = read_battles(str(file))
    if answers:
        battles = with_texts(battles, read_answer_texts(answers))
    found = rate(
        battles,
        baseline=baseline,
        style=STYLE_FEATURES if style_control else (),
        resampling=Resampling(level, samples, seed),
    )
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(found), "unused_columns": battles.unused}, indent=1))
        return
    console = Console()
    for table in ratings_tables(found):
        console.print(table)
    if battles.unused:
        console.print(f"columns that were not used: {', '.join(battles.unused)}", markup=False, highlight=False)


judges = typer.Typer(help="Whether a judge can be believed.", no_args_is_help=True)
cli.add_typer(judges, name="judges")


@judges.command()
def calibrate(
    human: Annotated[Path, typer.Option(help="Battles that humans judged; several votes on a pair are counted.")],
    judge: Annotated[Path, typer.Option(help="The same pairs, judged; both orders of a pair show flips.")],
    judge_model: Annotated[str | None, typer.Option(help="The judge's own model among them: self-preference.")] = None,
    level: Annotated[float, typer.Option(help="Confidence level of the intervals.", min=0.5, max=0.999)] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hold a judge against human labels: agreement, kappa, ties, flips, length, its own answers."""
    from app.evaluation.battles import read_battles
    from app.evaluation.intervals import Resampling
    from app.evaluation.judge_health import calibrate as calibration
    from app.evaluation.report import calibration_table

    found = calibration(
        read_battles(str(human)), read_battles(str(judge)), judge_model=judge_model, resampling=Resampling(level)
    )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        Console().print(calibration_table(found))


@cli.command()
def bench(
    what: Annotated[
        Literal["train", "ablate", "scale"], typer.Argument(help="The trainer against TRL's, its parts, its workers.")
    ],
    data: Annotated[Path, typer.Option(help="Preference data, as for `import`.")],
    pairs: Annotated[
        int | None, typer.Option(help="Pairs, at most; default: 64, or what makes three steps.", min=1)
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a prompt and one answer together.", min=8)] = 512,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Compute type.")] = "bfloat16",
    lora: Annotated[bool, typer.Option("--lora", help="Adapters; default: full fine-tuning.")] = False,
    groups: Annotated[int | None, typer.Option(help="Sample K answers to each prompt.", metavar="K", min=2)] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Cut prompts to their last tokens.", min=1)] = None,
    epochs: Annotated[int, typer.Option(help="Passes of every arm over the pairs.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="How often every arm runs, one after the other.", min=1)] = _ROUNDS,
    model: Annotated[str, typer.Option(help="`embedded`, a folder, a URI or a hub id.")] = "embedded",
    micro_batch_tokens: Annotated[
        int | None, typer.Option(help="Token budget of our forward; default: as in a recipe.", min=16)
    ] = None,
    only: Annotated[
        Literal["online", "cached", "headline"] | None, typer.Option(help="The only part that is measured.")
    ] = None,
    targets: Annotated[
        Literal["hh_rlhf", "llamafactory_demo", "groups_of_4", "one_token_prompts"] | None,
        typer.Option(help="Our targets for this data; exit code 1 where one is missed."),
    ] = None,
    expect: Annotated[list[str], typer.Option(metavar="RATIO=X", help="Exit code 1 where it is missed.")] = [],  # noqa: B006
    into: Annotated[Path | None, typer.Option("--json", help="Write all measurements to this file.")] = None,
) -> None:
    """Measure speed as ratios on the same work in the same run: against TRL, without one technique, on more workers."""
    from app.bench.command import BenchSettings, bench_ablate, bench_train, bench_workers

    settings = BenchSettings(
        data=data,
        pairs=pairs,
        max_length=max_length,
        dtype=dtype,
        adapter="lora" if lora else "full",
        answers=groups,
        prompt_tokens=prompt_tokens,
        rounds=rounds,
        model=model,
        micro_batch_tokens=micro_batch_tokens,
        epochs=epochs,
        only=only,
    )
    say = partial(typer.echo, err=True)
    if into is not None and not into.resolve().parent.is_dir():
        msg = f"`--json {into}`: there is no folder `{into.resolve().parent}`"
        raise RecipeError(msg)
    if what != "train" and (expect or targets or only or epochs != 1):
        msg = f"--expect, --targets, --only and --epochs have no effect on `bench {what}`: remove them"
        raise RecipeError(msg)
    if what == "scale" and (groups or prompt_tokens or rounds != _ROUNDS):
        msg = "--groups, --prompt-tokens and --rounds have no effect on `bench scale`: remove them"
        raise RecipeError(msg)
    if targets and rounds < _ROUNDS:
        msg = f"--targets are of the median of {_ROUNDS} rounds at least, and --rounds is {rounds}\n\nHint: say what you expect of fewer with --expect."
        raise RecipeError(msg)
    if what == "train":
        outcome = bench_train(_home(), settings, expect=expect, targets=targets, say=say, tell=typer.echo)
    else:
        outcome = {"ablate": bench_ablate, "scale": bench_workers}[what](_home(), settings, say=say, tell=typer.echo)
    if into is not None:
        into.write_text(json.dumps(outcome.tree, indent=1), encoding="utf-8")
    raise typer.Exit(1 if outcome.missed else 0)


def _home() -> Home:
    return Home.from_environment()


def _job(name: str, recipe: Path, overrides: Sequence[str], *arguments: str) -> None:
    _run([sys.executable, "-m", "ray_jobs", name, *_recipe(recipe, overrides), *arguments])


def _recipe(recipe: Path, overrides: Sequence[str]) -> list[str]:
    return [str(recipe), *(part for override in overrides for part in ("--set", override))]


def _given(option: str, value: str | None) -> tuple[str, ...]:
    return (option, value) if value else ()


def _run(command: Sequence[str]) -> None:
    """Run a child with the home made absolute, and leave with its exit code; Ctrl-C reaches the child first."""
    environment = {**os.environ, HOME_VARIABLE: _home().uri}
    with subprocess.Popen(list(command), env=environment) as child:
        previous = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            while True:
                try:
                    code = child.wait()
                    break
                except KeyboardInterrupt:
                    continue  # the terminal sent it to the child too, which unwinds on its own
        finally:
            signal.signal(signal.SIGTERM, previous)
    raise typer.Exit(Interrupted.exit_code if code == -signal.SIGINT else abs(code))
