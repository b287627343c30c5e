"""Benchmarks: both trainers do the same work, and what is told of it is what was measured."""

import json
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch

from app.bench.ablate import LAYOUTS, ablate, on_all_rows, unshared
from app.bench.arms import Arm, Measured, run_ours
from app.bench.command import TARGETS, BenchSettings, bench_ablate, bench_train, bench_workers
from app.bench.flops import ModelShape, operations
from app.bench.parity import Parity, compare
from app.bench.rival import run_trl
from app.bench.runner import watched
from app.bench.scale import ScaleSettings, bench_scale, overhead
from app.bench.train import RATIOS, Comparison, Ratio, Share, _check_steps, _tuned, compare_trainers
from app.bench.work import (
    Work,
    all_pairs,
    best_against_rest,
    cut_prompts,
    longest_pair,
    pair_tokens,
    read_work,
    sampled_groups,
)
from app.cli import bench
from app.errors import DataError, OutOfMemory, RecipeError, TrainingError
from app.ledger import Ledger
from app.models import ensure_sft, load_model
from app.storage import Home
from app.training.batch import PackedBatch
from app.training.scoring import ScoringModel
from app.training.tokenization import Group, Preference

ONLINE = Arm("ours", "prefloop", "online", "float32", batch=0)
TRL = Arm("trl", "trl", "online", "float32", batch=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home.at(tmp_path_factory.mktemp("bench") / "home")


@pytest.fixture(scope="module")
def model_id(home, tiny_model):
    ledger = Ledger.open(home.ledger_url)
    yield ensure_sft(home, ledger, str(tiny_model)).model_id
    ledger.close()


@pytest.fixture(scope="module")
def work(home, model_id, tiny_model):
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: tuple(torch.randint(2, 258, (n,), generator=generator).tolist())  # noqa: E731
    groups = tuple(
        Group(f"g{i}", f"c{i}", "train", draw(3 + i % 7), (draw(2 + i % 5), draw(2 + i % 3)), (Preference(0, 1, 1.0, f"p{i}", "x"),))
        for i in range(12)
    )  # fmt: skip
    return Work(home.uri, str(tiny_model), model_id, groups, "full", "float32", 64, 4, 32, 1e-3, threads=1, epochs=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words = ("red", "blue", "tall", "small", "kind", "old", "new", "warm", "loud", "thin")
    rows = [
        {"prompt": f"{a} {b}?", "chosen": f"yes {b} " * (1 + i % 3), "rejected": f"no {a}"}
        for i, (a, b) in enumerate((a, b) for a in words[:4] for b in words)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_one_step_of_both_trainers_has_the_same_loss_and_gradient(work, adapter):
    found = compare(replace(work, adapter=adapter))
    assert found.passed, found.line()
    assert abs(found.loss - 0.6931) > 1e-5, "the policy was not moved away from the reference"


def test_a_parity_that_is_missed_is_seen():
    assert not Parity(0.6931, 0.6932, 0.0, 4).passed
    assert not Parity(0.6931, 0.6931, 2e-4, 4).passed


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("reference", ["online", "cached"])
def test_the_timed_runs_of_both_trainers_take_the_same_steps(work, adapter, reference):
    ours = run_ours(replace(work, adapter=adapter), replace(ONLINE, reference=reference))
    theirs = run_trl(replace(work, adapter=adapter), replace(TRL, reference=reference))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert ours.losses[-1] != pytest.approx(ours.losses[0], rel=1e-4), "nothing was learned"
    assert ours.step_pairs == theirs.step_pairs == (4, 4, 4)
    assert len(theirs.step_seconds) == len(ours.step_seconds) == 3
    assert (ours.score_seconds > 0, theirs.score_seconds > 0) == (reference == "cached",) * 2
    assert ours.computed_tokens == sum(group.num_tokens for group in work.groups)
    assert theirs.computed_tokens > ours.computed_tokens
    assert ours.step_tokens == theirs.step_tokens
    assert ours.logps == pytest.approx(theirs.logps, rel=1e-5)
    assert (len(theirs.score_shapes) > 0) == (reference == "cached")
    _check_steps(ours, theirs, dtype="float32")
    for wrong in ({"losses": (float("nan"),) * 3}, {"logps": (1.0, 1.0, 1.0)}, {"step_tokens": (1, 1, 1)}):
        with pytest.raises(TrainingError, match="did not do the same work"):
            _check_steps(replace(ours, **wrong), theirs, dtype="float32")


@pytest.mark.parametrize("reference", ["online", "cached"])
def test_both_trainers_pass_over_the_rows_as_often_as_they_are_told(work, reference):
    once, twice = (run_ours(replace(work, epochs=n), replace(ONLINE, reference=reference)) for n in (1, 2))
    theirs = run_trl(replace(work, epochs=2), replace(TRL, reference=reference))
    assert twice.losses[:3] == once.losses
    assert twice.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert len(theirs.step_seconds) == len(twice.step_seconds) == 6
    assert twice.step_tokens == theirs.step_tokens == once.step_tokens * 2
    assert twice.computed_tokens == 2 * once.computed_tokens
    _check_steps(twice, theirs, dtype="float32")


def test_trl_goes_by_length_where_it_is_told_to(work):
    told = run_trl(work, replace(TRL, reference="cached", order="by_length", batch=2))
    assert told.computed_tokens < run_trl(work, replace(TRL, batch=2)).computed_tokens
    # The step that the steady state leaves out has neither the longest rows nor the shortest.
    assert sorted(told.step_tokens)[1] == told.step_tokens[0]
    assert told.step_tokens[1] > told.step_tokens[2]


@pytest.mark.parametrize("layout", [name for name, _ in LAYOUTS])
def test_a_layout_changes_the_cost_and_not_the_numbers(work, home, model_id, layout):
    scorer = ScoringModel(load_model(home, model_id, dtype="float32").model)
    groups = all_pairs(
        [
            replace(group, responses=(*group.responses, *other.responses))
            for group, other in zip(work.groups[:6], work.groups[6:], strict=True)
        ]
    )

    def margins(batches):
        with torch.no_grad():
            scores = [(batch, scorer(batch).logps) for batch in batches]
        return sorted(float(m) for batch, logps in scores for m in logps[batch.chosen] - logps[batch.rejected])

    batches = dict(LAYOUTS)[layout](groups, 64)
    assert margins(batches) == pytest.approx(margins([PackedBatch.pack(groups)]), abs=1e-5)
    tokens = sum(batch.input_ids.numel() for batch in batches)
    rows = sum(len(batch.target_ids) for batch in batches)
    shared = sum(group.num_tokens for group in groups)
    assert (tokens > shared) == (layout in ("no sharing", "none"))
    assert (rows > sum(len(r) for g in groups for r in g.responses)) == (layout in ("all rows", "none"))


def test_prompts_are_cut_to_their_last_tokens(work):
    for cut, group in zip(cut_prompts(work.groups, 2), work.groups, strict=True):
        assert cut == replace(group, prompt_ids=group.prompt_ids[-2:])
        assert len(cut.prompt_ids) == 2


def test_the_head_takes_each_row_of_an_unshared_layout_once(work):
    batch = on_all_rows(unshared(work.groups[:2]))
    assert sorted(batch.predictor_rows.tolist()) == list(range(batch.input_ids.numel()))


def test_operations_are_counted_by_hand(home, model_id, work):
    shape = ModelShape.of(load_model(home, model_id, dtype="float32").model)
    # two layers of q 32x32, k and v 16x32, o 32x32, gate, up and down 64x32
    assert shape == ModelShape(backbone=2 * (2 * 1024 + 2 * 512 + 3 * 2048), head=258 * 32, attention=2 * 32)
    one = replace(
        work, groups=(Group("g", "c", "train", (5, 6), ((7, 8, 1), (9, 1)), (Preference(0, 1, 1, "p", "x"),)),)
    )
    none = Measured(0.0, (1.0,), (1,), (10,), (0.5,), (-1.0,), (), (), 1)
    attended = 5 * 5 + 2 * (2 + 2)
    assert operations(shape, one, ONLINE, none, compact=False) == 4 * (
        2 * shape.backbone * 7 + 2 * shape.head * 5 + 4 * 64 * attended
    )
    recomputed = operations(shape, one, replace(ONLINE, checkpointing=True), none, compact=False)
    assert (
        recomputed == operations(shape, one, ONLINE, none, compact=False) + 2 * shape.backbone * 7 + 4 * 64 * attended
    )
    # Twice the steps, and twice the reference where it is asked in each of them.
    forward = 2 * shape.backbone * 7 + 2 * shape.head * 5 + 4 * 64 * attended
    twice = replace(one, epochs=2)
    assert operations(shape, twice, ONLINE, none, compact=False) == 8 * forward
    assert operations(shape, twice, replace(ONLINE, reference="cached"), none, compact=False) == 7 * forward
    long = replace(one, groups=(replace(one.groups[0], prompt_ids=(5,) * 597),))
    more_tokens = 595 * 4 * 2 * shape.backbone
    assert operations(shape, long, ONLINE, none, compact=False) == 4 * forward + more_tokens + 4 * 4 * 64 * (
        512 * 512 + 88 * 600 + 2 * (597 + 2) - attended
    )
    padded = replace(none, shapes=((2, 5),))
    counted = 2 * 10 * (4 * shape.backbone + 5 * shape.head) + 4 * 4 * 64 * 50
    assert operations(shape, one, TRL, padded, compact=False) == counted
    cached = replace(padded, score_shapes=((2, 6),))
    more = counted + 2 * 2 * (shape.backbone + shape.head) + 4 * 64 * (72 - 50)
    assert operations(shape, one, TRL, cached, compact=False) == more
    for compact in (False, True):
        both = replace(padded, shapes=padded.shapes * 2)
        once = operations(shape, one, TRL, padded, compact=compact)
        assert operations(shape, twice, TRL, both, compact=compact) == 2 * once
    assert operations(shape, one, TRL, padded, compact=True) == counted - 5 * 2 * shape.head * (10 - 5)


def test_answers_are_sampled_once_and_paired_best_or_all(home, model_id, data, tmp_path):
    loaded = load_model(home, model_id, dtype="float32")
    sample = lambda: sampled_groups(data, loaded, answers=3, prompts=4, max_length=160, kept_in=tmp_path)  # noqa: E731
    groups = sample()
    assert len(groups) == 4
    assert all(len(set(group.responses)) == 3 for group in groups)
    [kept] = tmp_path.iterdir()
    stamp = kept.stat().st_mtime_ns
    assert sample() == groups
    assert kept.stat().st_mtime_ns == stamp
    best, every = (
        [(p.chosen, p.rejected) for p in pair(groups[:1])[0].pairs] for pair in (best_against_rest, all_pairs)
    )
    assert (best, every) == ([(0, 1), (0, 2)], [(0, 1), (0, 2), (1, 2)])


def test_work_comes_back_from_its_file(work, tmp_path):
    work.save(tmp_path / "work.json")
    assert Work.load(tmp_path / "work.json") == work


def test_the_pairs_of_a_benchmark_are_steps_of_like_length_of_all_lengths_in_random_order(home, model_id, data):
    loaded = load_model(home, model_id, dtype="float32")
    _, every = read_work(data, loaded, max_length=64, pairs=40, batch_pairs=8)
    pairs, groups = read_work(data, loaded, max_length=64, pairs=17, batch_pairs=8)
    assert len(groups) == len(pairs) == 16
    lengths = sorted(map(longest_pair, every), reverse=True)
    assert sorted(map(longest_pair, groups), reverse=True) == lengths[8:16] + lengths[24:32]
    assert [longest_pair(group) for group in groups] != sorted(map(longest_pair, groups), reverse=True)


def test_cut_prompts_are_sorted_by_the_length_that_is_left(home, model_id, data):
    loaded = load_model(home, model_id, dtype="float32")
    _, every = read_work(data, loaded, max_length=64, pairs=40, batch_pairs=8, prompt_tokens=1)
    _, groups = read_work(data, loaded, max_length=64, pairs=16, batch_pairs=8, prompt_tokens=1)
    assert {len(group.prompt_ids) for group in groups} == {1}
    lengths = sorted(map(longest_pair, every), reverse=True)
    assert sorted(map(longest_pair, groups), reverse=True) == lengths[8:16] + lengths[24:32]


def test_too_few_pairs_are_told(home, model_id, data):
    loaded = load_model(home, model_id, dtype="float32")
    pairs, groups = read_work(data, loaded, max_length=64, pairs=17, batch_pairs=8)
    assert len(groups) == len(pairs) == 16
    assert [pair.pair_id for pair in pairs] == [group.pairs[0].pair_id for group in groups]
    with pytest.raises(DataError, match="has 40 pairs on prompts shorter than 64 tokens, fewer than --pairs 48"):
        read_work(data, loaded, max_length=64, pairs=48, batch_pairs=8)


def test_a_share_is_held_against_an_upper_limit():
    assert Share("data wait", 0.004).line(0.01).endswith("0.40%  ok: at most 1.0% expected")
    assert "MISSED" in Share("ray overhead", 0.06).line(0.05)
    assert Share("ray overhead", -0.02).line(None).endswith("-2.00%")


def test_a_comparison_tells_medians_ranges_and_what_was_missed():
    ratio = Ratio("online", (3.0, 2.0, 4.0), predicted=2.5)
    assert ratio.median == 3.0
    assert "3.00x  [2.00, 4.00]  by operations 2.50  ok: 2.5 expected" in ratio.line(2.5)
    assert "MISSED: 3.5 expected" in ratio.line(3.5)
    shapes = ((8, 10), (8, 5))
    measured = Measured(1.0, (2.0, 1.0), (8, 8), (90, 50), (0.7, 0.6), (-9.0, -8.0), shapes, (), 2, peak_pss=2**30)
    assert (measured.total, measured.steady, measured.computed_tokens) == (4.0, 0.02, 120)
    assert measured.speed == 8.0
    peaks = {"bfloat16": 1e11}
    told = Comparison("t", Parity(0.6, 0.6, 0.0, 4), {"ours": (measured,)}, (ratio,), 60, peaks, {"ours": 0.5}, TRL)
    text = "\n".join(told.lines({}))
    assert "100 GFLOP/s in bfloat16" in text
    assert "4.000 pairs/s" in text
    assert "(50% useful)  peak 1.00 GiB  50% of the machine" in text
    assert json.loads(json.dumps(told.tree()))["ratios"]["online"]["median"] == 3.0


def test_an_arm_that_fails_is_told_with_its_last_words():
    with pytest.raises(TrainingError, match=r"`arm` ended with exit code 3:\nlast words"):
        watched(["sh", "-c", "echo last words; exit 3"], name="arm", environment={})


def test_the_memory_of_an_arm_is_that_of_its_whole_family():
    hold = "import time; held = bytearray(b'x') * (64 * 2**20); time.sleep(5)"
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    _, peak = watched(["python3", "-c", command], name="arm", environment={})
    assert 64 * 2**20 < peak < 128 * 2**20


def settings_of(data, tiny_model, **changed):
    return BenchSettings(data, 32, 64, "float32", "full", None, None, 1, str(tiny_model), 64) if not changed else replace(
        settings_of(data, tiny_model), **changed
    )  # fmt: skip


def test_an_expectation_of_what_is_not_measured_is_refused(home, data, tiny_model):
    settings = settings_of(data, tiny_model)
    with pytest.raises(RecipeError, match="`--expect speed`: no such ratio; there are: `online`"):
        bench_train(home, settings, expect=["speed=2"], targets=None, say=print, tell=print)
    with pytest.raises(RecipeError, match="`--expect online` is not of the form RATIO=NUMBER"):
        bench_train(home, settings, expect=["online"], targets=None, say=print, tell=print)


def test_ratios_count_only_where_both_compute_the_same(work, monkeypatch):
    monkeypatch.setattr("app.bench.train.run_parity", lambda _: Parity(0.7, 0.6, 0.0, 4))
    shape = ModelShape(1, 1, 1)
    with pytest.raises(TrainingError, match="do not compute the same, so no ratio counts"):
        compare_trainers("t", work, parts=("online",), shape=shape, peaks={}, rounds=1, say=lambda _: None)


def test_trl_is_tuned_over_types_and_over_batches_until_they_become_slower(work, monkeypatch):
    keep, recompute = False, True
    seconds = {
        ("bfloat16", 1, keep): 5.0,
        ("bfloat16", 2, keep): 4.0,
        ("bfloat16", 4, keep): 3.0,
        ("bfloat16", 1, recompute): 6.0,
        ("bfloat16", 2, recompute): 7.0,
        ("float32", 1, keep): 3.3,
        ("float32", 2, keep): 3.7,
        ("float32", 1, recompute): 3.1,
        ("float32", 2, recompute): 3.5,
    }
    again = {("bfloat16", 4, keep): 3.0, ("float32", 1, recompute): 2.9}
    tried, longest = [], []

    def run(trial, arm):
        assert (arm.trainer, arm.reference, arm.order) == ("trl", "cached", "by_length")
        if trial.batch_pairs == 8:
            longest.append((arm.dtype, arm.batch, arm.checkpointing))
            return Measured(0.5, (1.0,), (8,), (10,), (0.5,), (-1.0,), (), (), 1)
        assert trial.batch_pairs == 16
        tried.append((arm.dtype, arm.batch, arm.checkpointing))
        took = (again if tried.count(tried[-1]) > 1 else seconds)[tried[-1]]
        return Measured(0.5, (took - 0.5,), (16,), (10,), (0.5,), (-1.0,), (), (), 1)

    monkeypatch.setattr("app.bench.train.run_arm", run)
    work = replace(work, groups=work.groups * 2)
    best = _tuned(work, {"bfloat16": 2.0, "float32": 1.0}, lambda _: None)
    assert (best.dtype, best.batch, best.checkpointing) == ("float32", 1, recompute)
    # Steps of four pairs have no batches of eight, and two pairs were already much slower than one in fp32.
    assert tried == [*seconds, *again]
    assert longest == [("float32", 1, recompute)]


@pytest.mark.parametrize("answers", [3, 4])
def test_trl_is_tuned_over_all_batches_where_a_prompt_has_several_pairs(work, monkeypatch, answers):
    groups = [replace(g, responses=tuple((*g.responses[0], k) for k in range(answers))) for g in work.groups * 2]
    tried = []

    def run(trial, arm):
        tried.append((trial.pairs, trial.batch_pairs, arm.batch))
        return Measured(0.5, (1.0,), (24,), (10,), (0.5,), (-1.0,), (), (), 1)

    monkeypatch.setattr("app.bench.train.run_arm", run)
    for paired in (best_against_rest(groups), all_pairs(groups)):
        tried.clear()
        _tuned(replace(work, groups=tuple(paired), batch_pairs=24), {"bfloat16": 1.0, "float32": 1.0}, lambda _: None)
        assert {batch for _, _, batch in tried} == {1, 2, 4, 8}
        *trials, (longest, whole, _) = tried
        assert {pairs for pairs, _, _ in trials} == {batch_pairs for _, batch_pairs, _ in trials} <= {16, 24}
        assert longest == whole in {8, 24}


def test_a_trial_has_short_and_long_pairs_in_whole_batches_of_like_length(work, monkeypatch):
    trials = []

    def run(trial, arm):
        trials.append([longest_pair(group) for group in trial.groups])
        return Measured(0.5, (1.0,), (16,), (10,), (0.5,), (-1.0,), (), (), 1)

    monkeypatch.setattr("app.bench.train.run_arm", run)
    groups = [replace(g, prompt_ids=(2,) * (3 + i)) for i, g in enumerate(work.groups * 4)]
    _tuned(replace(work, groups=tuple(groups[::-1]), batch_pairs=8), {"bfloat16": 1.0, "float32": 1.0}, lambda _: None)
    lengths = sorted(map(longest_pair, groups), reverse=True)
    assert trials[0] == lengths[8:16] + lengths[32:40]
    assert trials[-1] == lengths[:8], "memory holds the longest too"


def test_a_type_that_the_machine_emulates_is_not_tried_for_trl(work, monkeypatch):
    tried, said = [], []

    def run(trial, arm):
        tried.append(arm.dtype)
        return Measured(0.5, (1.0 + len(tried),), (trial.batch_pairs,), (10,), (0.5,), (-1.0,), (), (), 1)

    monkeypatch.setattr("app.bench.train.run_arm", run)
    best = _tuned(replace(work, groups=work.groups * 2), {"bfloat16": 1.0, "float32": 12.0}, said.append)
    assert best.dtype == "float32"
    assert set(tried) == {"float32"}
    assert said[0] == "tuning TRL: bfloat16 is left out, its matrix products take 12 times as long"


def test_ablation_times_every_layout(work):
    found = ablate(work, rounds=1, say=lambda _: None)
    assert [row.name for row in found] == [name for name, _ in LAYOUTS]
    assert found[0].slower == 1.0
    assert found[0].head_rows == sum(len(r) for g in work.groups for r in g.responses)


@pytest.mark.full
def test_ablation_takes_sampled_answers(home, data, tiny_model):
    found = bench_ablate(
        home, settings_of(data, tiny_model, answers=3, pairs=72, max_length=160), say=print, tell=print
    )
    assert list(found.tree) == ["best against the rest: ", "all pairs: "]


def test_cut_prompts_have_no_headline(home, data, tiny_model):
    settings = settings_of(data, tiny_model, prompt_tokens=1)
    with pytest.raises(RecipeError, match="`--expect headline`: no such ratio"):
        bench_train(home, settings, expect=["headline=1"], targets=None, say=print, tell=print)


def test_targets_are_held_against_what_is_measured_alone(home, data, tiny_model, monkeypatch):
    prompts = set()

    def run(work, arm):
        prompts.update(len(group.prompt_ids) for group in work.groups)
        rows = (work.pairs, tuple(map(pair_tokens, work.groups)))
        seconds = 2.0 if arm.trainer == "trl" else 1.0
        return Measured(0.0, (seconds,) * 2, rows[:1] * 2, rows[1], (0.5,), (-1.0,), ((8, 10),), (), 1)

    monkeypatch.setattr("app.bench.train.run_arm", run)
    monkeypatch.setattr("app.bench.train.run_parity", lambda _: Parity(0.7, 0.7, 0.0, 4))
    monkeypatch.setattr("app.bench.command.gemm_peak", lambda dtype, threads: 1e11)
    told = []
    settings = settings_of(data, tiny_model, rounds=1, only="cached", pairs=32)
    found = bench_train(home, settings, expect=["steady=3"], targets="hh_rlhf", say=print, tell=told.append)
    assert found.missed == ["steady"]
    assert [line for line in told if line.startswith("cached ") and "2.00x" in line and "ok: 2 expected" in line]
    assert set(found.tree["works"]["pairs"]["ratios"]) == set(RATIOS["cached"])
    assert max(prompts) > 1
    for cut in (
        replace(settings, prompt_tokens=1),
        replace(settings, prompt_tokens=1, answers=3, pairs=72, max_length=160),
    ):
        prompts.clear()
        bench_train(home, cut, expect=[], targets=None, say=print, tell=print)
        assert prompts == {1}
    assert not [line for line in told if line.startswith(("online", "headline"))]
    with pytest.raises(RecipeError, match="--targets groups_of_4: none of them is about what is measured here"):
        bench_train(
            home,
            replace(settings, answers=4),
            expect=["all pairs: cached=1"],
            targets="groups_of_4",
            say=print,
            tell=print,
        )
    with pytest.raises(RecipeError, match="--only headline: sampled answers and cut prompts are no text"):
        cut = replace(settings, only="headline", prompt_tokens=1)
        bench_train(home, cut, expect=[], targets=None, say=print, tell=print)


@pytest.mark.parametrize(
    ("targets", "changed"),
    [
        ("hh_rlhf", {"answers": 4}),
        ("hh_rlhf", {"prompt_tokens": 1}),
        ("hh_rlhf", {"adapter": "lora"}),
        ("groups_of_4", {}),
        ("groups_of_4", {"answers": 3}),
        ("one_token_prompts", {"prompt_tokens": 2}),
    ],
)
def test_targets_of_other_work_are_refused(home, data, tiny_model, targets, changed):
    settings = settings_of(data, tiny_model, rounds=1) if not changed else settings_of(data, tiny_model, **changed)
    with pytest.raises(RecipeError, match=f"--targets {targets} are of .*, (and this is of|not of --lora)"):
        bench_train(home, settings, expect=[], targets=targets, say=print, tell=print)


def test_a_way_of_trl_that_memory_does_not_hold_is_told_and_left_out(work, monkeypatch):
    def run(trial, arm):
        if arm.batch > 1 or arm.dtype == "float32" or (trial.batch_pairs == 8 and not arm.checkpointing):
            raise OutOfMemory("killed")
        return Measured(0.5, (2.0 if arm.checkpointing else 1.0,), (16,), (10,), (0.5,), (-1.0,), (), (), 1)

    monkeypatch.setattr("app.bench.train.run_arm", run)
    told = []
    best = _tuned(replace(work, groups=work.groups * 2), {"bfloat16": 1.0, "float32": 1.0}, told.append)
    assert (best.dtype, best.batch, best.checkpointing) == ("bfloat16", 1, True), (
        "the longest rows are too long to keep"
    )
    assert "tuning TRL: batches of 2 pairs, bfloat16, keeping activations: left out, memory does not hold it" in told
    monkeypatch.setattr("app.bench.train.run_arm", lambda trial, arm: run(trial, replace(arm, batch=2)))
    with pytest.raises(TrainingError, match="memory does not hold TRL with a cached reference in any way"):
        _tuned(work, {"bfloat16": 1.0, "float32": 1.0}, told.append)


@pytest.mark.parametrize("command", ["kill -KILL $$", "echo 'torch.OutOfMemoryError: CUDA out of memory'; exit 1"])
def test_an_arm_that_memory_does_not_hold_is_told_apart(command):
    with pytest.raises(OutOfMemory, match="`arm` ended with exit code"):
        watched(["sh", "-c", command], name="arm", environment={})


def test_every_target_is_of_something_that_is_measured():
    known = {name for names in RATIOS.values() for name in names}
    assert {name.rpartition(": ")[2] for targets in TARGETS.values() for name in targets} <= known
    [named, _] = get_args(get_type_hints(bench)["targets"])
    assert set(get_args(named)) == set(TARGETS)


@pytest.mark.parametrize(("answers", "pairs"), [(None, 64), (2, 64), (4, 72), (8, 168)])
def test_pairs_that_nobody_counts_make_three_steps_at_least(data, tiny_model, answers, pairs):
    settings = settings_of(data, tiny_model, pairs=None, answers=answers)
    assert settings.most_pairs == pairs
    assert pairs >= 3 * settings.batch_pairs


def test_fewer_than_three_steps_are_refused_before_anything_runs(home, data, tiny_model):
    with pytest.raises(RecipeError, match=r"--pairs 16 makes fewer than 4 steps of 8 pairs.*\n\nHint: at least 32"):
        bench_train(home, settings_of(data, tiny_model, pairs=16), expect=[], targets=None, say=print, tell=print)
    with pytest.raises(RecipeError, match=r"--pairs 16 makes fewer than 3 steps of 8 pairs.*\n\nHint: at least 24"):
        bench_workers(home, settings_of(data, tiny_model, pairs=16), say=print, tell=print)


@pytest.mark.full
def test_the_trainer_is_compared_with_trl_from_snapshot_to_model(home, data, tiny_model, monkeypatch):
    monkeypatch.setattr("app.bench.train._TUNED_BATCHES", (4, 8))
    told = []
    expect = ["online=1000", "cached=0.0001", "data wait=1", "ray overhead=-1"]
    # Two rounds end in one model: their weights are the same.
    found = bench_train(
        home,
        settings_of(data, tiny_model, rounds=2, epochs=2),
        expect=expect,
        targets=None,
        say=print,
        tell=told.append,
    )
    assert found.missed == ["ray overhead", "online"]
    assert any(line.startswith("headline: 32 pairs") for line in told)
    ratios = found.tree["works"]["pairs"]["ratios"]
    assert set(ratios) == {*RATIOS["online"], *RATIOS["cached"]}
    assert {len(ratio["rounds"]) for ratio in ratios.values()} == {2}
    assert {len(m["losses"]) for arm in found.tree["works"]["pairs"]["measured"].values() for m in arm} == {8}
    assert found.tree["headline"]["data_wait"]["value"] < 1
    assert json.loads(json.dumps(found.tree)) is not None


@pytest.mark.full
@pytest.mark.timeout(900)
def test_more_workers_read_no_more_of_a_snapshot_and_make_no_more_collectives(data, tiny_model, claim):
    found = bench_scale(ScaleSettings(data, 40, 64, str(tiny_model), "lora", "float32", 64), say=print)
    whole = [layout for layout in found if layout.sharding == "none"]
    sliced = [layout for layout in found if layout.sharding == "zero3"]
    assert [layout.workers for layout in whole] == [1, 2, 4, 8]
    assert [layout.workers for layout in sliced] == [1, 2, 4]
    read = [layout.read_by_stream for layout in found]
    assert read == [pytest.approx(1.0, abs=0.05)] * len(found)
    assert whole[0].collectives == 0
    assert len({layout.collectives for layout in whole[1:]}) == 1
    # As many as a rank has micro-batches, which are fewer where there are more ranks.
    assert min(layout.collectives for layout in sliced[1:]) > whole[1].collectives, "weights are gathered"
    claim(
        "as much is read of a snapshot with 1, 2, 4 and 8 workers; a step of 2, 4 and 8 makes as many collectives, of one none",
        figure=f"{', '.join(f'{share:.2f}' for share in read)} times the file; {whole[1].collectives:.0f} collectives, {sliced[1].collectives:.0f} with weights in slices on two workers; two workers with a thread each over one with two: {overhead(found):+.0%} (a tiny model)",
    )
