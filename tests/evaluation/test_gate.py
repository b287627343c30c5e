"""The gate ships only what holds every rule; constant, shortened and unfinished answers cannot buy a verdict."""

import random
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from app.config import GateSection
from app.evaluation import gate, suites
from app.evaluation.intervals import Estimate, Resampling, mean_rate
from app.evaluation.measurements import Measurements, Sides
from app.evaluation.metrics import Metric
from app.evaluation.report import EvaluationReport, Look
from app.evaluation.rules import parse_style
from app.evaluation.scored import compare, style_score
from app.evaluation.suites import Answer, GoldenResult, WinRate

QUICK = Resampling(samples=400)
GATE = GateSection()
STYLE = parse_style(
    {
        "name": "s",
        "rules": [
            {"name": "you", "pattern": r"(?i)\byou\b", "weight": 2},
            {"name": "hedge", "pattern": "may", "weight": -1},
        ],
    },
    place="x",
)
WORDS = [f"{a}{b}" for a in ("tea", "sun", "oak", "bee", "salt", "wool", "iron", "rain") for b in range(20)]
PROMPTS = {f"p{i}": f"Explain {word} in one sentence." for i, word in enumerate(WORDS)}


def decide(measurements, section):
    return gate.decide(measurements.metrics(), section)


def rules(**changes):
    return GateSection(rules=changes)


def estimate(value=0.8, low=0.7, high=0.9, n=150, method="bootstrap"):
    return Estimate(value, low, high, 0.95, n, n, method)


def win(**kwargs):
    return WinRate(estimate(**kwargs), 100, 40, 10, 3, 2, 0.77)


GOOD = Measurements(
    over_champion=win(),
    over_sft=win(),
    length_ratio=estimate(1.05, 0.95, 1.15),
    finished=Sides(0.95, 0.97),
    looping=Sides(0.01, 0.02),
    distinct=Sides(0.98, 1.0),
    relevance=Sides(0.7, 0.8),
    golden=(GoldenResult("paris", True, ""),),
    perplexity=Sides(28.0, 27.0),
    reward_accuracy=estimate(0.75, 0.6, 0.85, n=40),
    n_prompts=160,
)


def test_a_candidate_that_holds_every_rule_ships():
    verdict = decide(GOOD, GATE)
    assert verdict.decision == "SHIP"
    assert verdict.reasons == ()
    assert len({rule.name for rule in verdict.rules}) == len(verdict.rules) == 12
    assert verdict.power.startswith("with 150 prompt clusters a true win rate over SFT of 64.")


@pytest.mark.parametrize(
    ("rule", "change", "words"),
    [
        ("judged_prompts", {"over_champion": win(n=80)}, "20 more"),
        ("win_rate_champion", {"over_champion": win(value=0.56, low=0.48)}, "prompts would be needed"),
        ("win_rate_sft", {"over_sft": win(value=0.5, low=0.5, method="constant")}, "more than 0.5 is needed"),
        ("win_rate_sft", {"over_sft": win(value=0.4, low=0.3)}, "win_rate.sft is 0.4 [0.3, 0.9] on 150 (100 wins"),
        ("win_rate_sft", {"over_sft": win(value=0.5, low=0.0, n=0, method="empty")}, "no answer could be judged"),
        ("reward_accuracy", {"reward_accuracy": estimate(0.6, 0.45)}, "chance"),
        ("reward_accuracy", {"reward_accuracy": None}, "could not be measured"),
        ("length_ratio_min", {"length_ratio": estimate(0.6, 0.5)}, "at least 0.7"),
        ("length_ratio_max", {"length_ratio": estimate(1.5, 1.3)}, "at most 1.4"),
        ("golden_pass_rate", {"golden": (GoldenResult("paris", False, "must contain 'Paris'"),)}, "paris"),
        ("finished", {"finished": Sides(0.8, 0.95)}, "at least -0.1 is needed"),
        ("repetition", {"looping": Sides(0.2, 0.05)}, "at most 0.1 is allowed"),
        ("distinct", {"distinct": Sides(0.4, 1.0)}, "distinct"),
        ("relevance", {"relevance": Sides(0.1, 0.8)}, "relevance"),
        ("perplexity", {"perplexity": Sides(40.0, 27.0)}, "perplexity"),
    ],
)
def test_each_rule_alone_can_hold_and_says_why(rule, change, words):
    verdict = decide(replace(GOOD, **change), GATE)
    assert verdict.decision == "HOLD"
    (failed,) = [result for result in verdict.rules if not result.passed]
    assert failed.name == rule
    assert words in verdict.reasons[0]


def test_values_on_their_bounds_pass_and_a_win_rate_must_exceed_its_bound():
    on_bounds = replace(GOOD, finished=Sides(0.9 - 0.1, 0.9), looping=Sides(0.3, 0.2), length_ratio=estimate(1.4))
    assert decide(on_bounds, GATE).decision == "SHIP"
    assert decide(replace(GOOD, over_sft=win(value=0.6, low=0.5)), GATE).decision == "HOLD"


def test_a_champion_must_be_beaten_unless_the_recipe_says_that_not_worse_will_do():
    equal = replace(GOOD, over_champion=win(value=0.53, low=0.48, high=0.58))
    assert decide(equal, GATE).decision == "HOLD"
    assert decide(equal, rules(win_rate_champion={"threshold": 0.47})).decision == "SHIP"


LOOKS = (Look("prompts", "p.jsonl", 4),)


def shown(rate, prompts, generator):
    """A win rate on so many independent prompts, when the candidate wins this share of them."""
    values = (generator.random(prompts) < rate).astype(float)
    return mean_rate(values.tolist(), [str(i) for i in range(prompts)], resampling=QUICK)


def ships(champion, sft, section=GATE):
    measures = replace(GOOD, over_champion=WinRate(champion, 0, 0, 0, 0, 0, 0), over_sft=WinRate(sft, 0, 0, 0, 0, 0, 0))
    return decide(measures, section).decision == "SHIP"


@pytest.mark.full
def test_equal_models_rarely_ship_and_a_better_one_mostly_does():
    generator = np.random.default_rng(0)
    equal = [ships(e, e) for e in (shown(0.5, 300, generator) for _ in range(2000))]
    better = [ships(e, e) for e in (shown(0.6, 300, generator) for _ in range(2000))]
    assert np.mean(equal) <= 0.05
    assert np.mean(better) >= 0.9


@pytest.mark.full
@pytest.mark.parametrize("spread", [0.04, 0.08, 0.12])
def test_over_a_year_of_weekly_releases_the_champion_falls_two_points_below_its_best_in_few_histories(spread):
    """Each week a candidate a little better or worse than the champion, by normal log-odds, on 300 fresh prompts."""
    generator = np.random.default_rng(1)
    fallen = {0.5: 0, 0.47: 0}
    for threshold in fallen:
        for _ in range(2000):
            champion = best = 0.0
            fell = False
            for change in generator.normal(0, spread, 52):
                rates = [1 / (1 + np.exp(-odds)) for odds in (change, champion + change + 0.4)]
                # The normal interval stands for the bootstrap's, whose honesty is tested by itself: 200,000 of them.
                lows = [x - 1.96 * np.sqrt(x * (1 - x) / 300) for x in generator.binomial(300, rates) / 300]
                if lows[0] > threshold and lows[1] > 0.5:
                    champion += change
                    best = max(best, champion)
                fell |= 1 / (1 + np.exp(best - champion)) < 0.48
            fallen[threshold] += fell
    assert fallen[0.5] / 2000 <= 0.05
    # What the default would be if it asked for no more than "not worse".
    assert fallen[0.47] / 2000 > 0.1


def test_what_the_recipe_does_not_ask_for_is_no_rule():
    bare = replace(GOOD, golden=None, perplexity=None, reward_accuracy=None)
    verdict = decide(bare, rules(reward_accuracy=None))
    assert verdict.decision == "SHIP"
    assert {"golden_pass_rate", "perplexity", "reward_accuracy"}.isdisjoint(rule.name for rule in verdict.rules)


def test_a_rule_of_one_s_own_asks_any_metric_and_one_that_nothing_measures_holds():
    mine = {"metric": "mt_bench.gain", "bound": "low", "comparison": ">", "threshold": 0}
    measured = [*GOOD.metrics(), Metric("mt_bench.gain", 0.4, -0.1, 0.9, 160)]
    held = gate.decide(measured, rules(better_grades=mine))
    assert "its lower bound is -0.1, more than 0 is needed" in held.reasons[0]
    assert gate.decide(measured, rules(better_grades={**mine, "threshold": -0.2})).decision == "SHIP"
    absent = decide(GOOD, rules(better_grades={**mine, "metric": "mt_bench.gian"}))
    assert absent.reasons == ("nothing measured `mt_bench.gian`: no suite of this recipe measures it",)
    near = decide(GOOD, rules(longer={"metric": "length_ration", "comparison": "<", "threshold": 2}))
    assert near.reasons == ("nothing measured `length_ration`: did you mean `length_ratio`?",)
    no_interval = decide(
        GOOD, rules(longer={"metric": "finished.change", "bound": "low", "comparison": ">", "threshold": -1})
    )
    assert "has no low end of an interval" in no_interval.reasons[0]


def test_a_warning_is_told_and_does_not_hold():
    verdict = decide(replace(GOOD, length_ratio=estimate(1.5, 1.3)), rules(length_ratio_max={"decides": "warn"}))
    assert (verdict.decision, verdict.reasons) == ("SHIP", ())
    assert "at most 1.4 is allowed" in verdict.warnings[0]


def test_only_golden_cases_that_must_pass_hold():
    golden = (GoldenResult("a", True, ""), GoldenResult("b", False, "must contain", must_pass=False))
    assert decide(replace(GOOD, golden=golden), GATE).decision == "SHIP"
    asked = rules(all_golden={"metric": "golden.pass_rate", "comparison": ">=", "threshold": 0.9})
    assert "golden.pass_rate is 0.5" in decide(replace(GOOD, golden=golden), asked).reasons[0]


def scripted(say, model, *, reason="stop"):
    return [
        Answer(name, name, say(word, i), reason, max(1, len(say(word, i).split())), model)
        for i, (name, word) in enumerate(zip(PROMPTS, WORDS, strict=True))
    ]


def sft(word, i):
    you = "you often see" if i % 4 == 0 else "people may see"
    return f"The thing called {word} is something that {you} in the world, case {i}."


def measured(candidate):
    base = scripted(sft, "sft")
    requests = {answer.prompt_id: "?" for answer in base}
    outcomes = compare(candidate, base, style_score(STYLE), against="base", requests=requests).outcomes
    both = lambda number: Sides(number(candidate), number(base))  # noqa: E731
    return Measurements(
        over_champion=suites.win_rate(candidate, base, outcomes, resampling=QUICK),
        over_sft=suites.win_rate(candidate, base, outcomes, resampling=QUICK),
        length_ratio=suites.length_ratio(candidate, base, resampling=QUICK),
        finished=both(lambda a: suites.share_finished(a, resampling=QUICK).value),
        looping=both(lambda a: suites.share_looping(a, resampling=QUICK).value),
        distinct=both(suites.share_distinct),
        relevance=both(lambda a: suites.relevance(a, PROMPTS, seed=0)),
        golden=None,
        perplexity=None,
        reward_accuracy=estimate(0.9, 0.8),
        n_prompts=len(candidate),
    )


def failing(candidate):
    return {rule.name for rule in decide(measured(candidate), GATE).rules if not rule.passed}


def test_an_honest_improvement_in_the_style_ships():
    assert (
        failing(scripted(lambda word, i: f"The thing called {word} is what you see in the world, case {i}.", "new"))
        == set()
    )


def test_a_constant_answer_that_pleases_the_judge_holds():
    constant = scripted(lambda _w, _i: "You will see for yourself that you know all of this very well indeed.", "new")
    assert measured(constant).over_champion.estimate.low > 0.7
    assert failing(constant) == {"distinct", "relevance"}


def test_a_template_that_ignores_the_prompt_holds_although_every_answer_differs():
    empty_talk = scripted(
        lambda _w, i: f"You will see for yourself that you know number {i * 7919} of this list well.", "new"
    )
    assert failing(empty_talk) == {"relevance"}


def test_the_same_answers_only_shorter_do_not_win():
    half = scripted(lambda word, i: " ".join(sft(word, i).split()[:7]), "new")
    assert "win_rate_champion" in failing(half) or "length_ratio_min" in failing(half)
    assert {"length_ratio_min"} <= failing(half)
    a_little = scripted(lambda word, i: sft(word, i).rsplit(",", 1)[0], "new")
    assert failing(a_little) == {"win_rate_champion", "win_rate_sft"}


def test_spoiling_the_answers_that_would_lose_is_no_way_to_win():
    base = scripted(sft, "sft")
    better = [
        replace(a, model_id="new", text=a.text.replace("people may", "you"))
        if i % 3 == 0
        else replace(a, model_id="new")
        for i, a in enumerate(base)
    ]
    spoiled = [a if "you" in a.text else replace(a, finish_reason="length") for a in better]
    assert "finished" in failing(spoiled)


def test_drift_without_meaning_rarely_passes_the_two_independent_controls():
    """A coin-flip policy on 20 to 60 held-out prompts: its reward accuracy exceeds chance in at most 5 % of trials."""
    passed = 0
    for trial in range(300):
        coin = random.Random(trial)
        n = coin.choice([20, 40, 60])
        flips = [float(coin.random() < 0.5) for _ in range(n)]
        passed += mean_rate(flips, [str(i) for i in range(n)], resampling=QUICK).low > 0.5
    assert passed / 300 <= 0.05


def test_the_report_says_the_same_in_json_markdown_and_on_the_card():
    held = replace(GOOD, length_ratio=estimate(1.6, 1.5, 1.7))
    report = EvaluationReport(
        "e", "new-1", "sft-1", "sft-1", "rules", "the job", "p.jsonl", 0.95, held, {}, {}, LOOKS, decide(held, GATE)
    )
    content = report.as_json()
    assert content["verdict"] == "HOLD"
    assert content["figures"]["length_ratio"] == 1.6
    assert content["figures"]["golden"] == {"passed": 1, "of": 1}
    console = Console(record=True, width=140)
    console.print(report.as_card())
    for text in (report.as_markdown(), console.export_text()):
        assert "HOLD" in text
        assert "length_ratio_max" in text
        assert "at most 1.4" in text
