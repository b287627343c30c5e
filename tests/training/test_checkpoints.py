"""Checkpoints: whatever is killed or damaged and whenever, a run ends with the bits of an unbroken one."""

import errno
import itertools
import json
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import save, save_file

from app.errors import DataError, TrainingError
from app.storage import Artifact, Home
from app.training import checkpoints
from app.training.checkpoints import Checkpoints, Resumed
from app.training.engine import SingleWorker
from app.training.policy import build_policy
from tests.training.fork_server import fork_server
from tests.training.killed_runs import IDENTITY, STEPS, killed_after, killed_around, train
from tests.training.tiny_runs import SECTION, Threads, engine_of

SEEDS, SEEDS_OF_HARM = range(10), range(20)


def test_what_a_model_drops_at_random_is_the_same_after_a_resume(start, home, other_homes):
    def dropping(rate: float):
        loaded = start()
        loaded.model.config.attention_dropout = rate
        for module in loaded.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = rate
        return loaded

    whole, _ = train(partial(dropping, 0.3), other_homes())
    broken = other_homes()
    train(partial(dropping, 0.3), broken, until=1)
    torch.manual_seed(99)
    assert train(partial(dropping, 0.3), broken)[0] == whole
    assert train(partial(dropping, 0.0), other_homes())[0] != whole


def names(home: Home) -> list[str]:
    return home.names("runs/run/checkpoints")


def folder(home: Home, name: str) -> Path:
    return home.local("runs", "run", "checkpoints", name)


def in_a_child(work: Callable[..., None], *arguments: object) -> int | None:
    """Run in a process of its own, which is killed or leaves; return its exit code, less than zero for a signal."""
    # Not a copy of this process: in one that has run other libraries' threads a copy crashes, which is no kill.
    child = fork_server().Process(target=work, args=(torch.get_num_threads(), *arguments))
    child.start()
    child.join(120)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail("a run of seconds was not over after two minutes")
    return child.exitcode


@pytest.fixture
def unbroken(start, home) -> Iterator[str]:
    digest, numbers = train(start, home)
    assert numbers == list(range(1, len(STEPS) + 1))
    yield digest


@pytest.fixture
def other_homes(home, tmp_path) -> Callable[[], Home]:
    """Copies of the home, without its run."""
    counter = itertools.count()

    def another() -> Home:
        place = tmp_path / f"home-{next(counter)}"
        shutil.copytree(home.local(), place, ignore=shutil.ignore_patterns("runs"))
        return Home.at(place)

    return another


@pytest.mark.parametrize("before", [True, pytest.param(False, marks=pytest.mark.full)], ids=["before", "after"])
def test_a_run_killed_around_any_write_ends_with_the_bits_of_an_unbroken_one(
    start, unbroken, other_homes, before, claim
):
    points = 0
    for number in itertools.count(1):
        home = other_homes()
        code = in_a_child(killed_around, start, home, number, before)
        if code == 0:
            break
        points += 1
        assert code == -signal.SIGKILL
        digest, numbers = train(start, home)
        assert digest == unbroken, f"killed {'before' if before else 'after'} call {number}"
        # What was complete is not done again, what was not is done once.
        assert numbers == list(range(len(STEPS) - len(numbers) + 1, len(STEPS) + 1))
        shutil.rmtree(home.local())
    assert points >= 4 * len(STEPS), "a checkpoint has at least a state, a manifest and their folder"
    moment = "before" if before else "after"
    claim(
        f"killed {moment} any fsync, rename or removal of a checkpoint, a run ends with the bits of an unbroken one",
        figure=f"{points} of {points} points",
    )


@pytest.mark.full
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_an_unbroken_one(start, unbroken, other_homes, claim):
    # The first one waits for the fork server's imports.
    assert in_a_child(killed_after, start, other_homes(), 60.0) == 0
    began = time.perf_counter()
    assert in_a_child(killed_after, start, other_homes(), 60.0) == 0
    whole = time.perf_counter() - began
    kills = 0
    for seed in SEEDS:
        home, after = other_homes(), random.Random(seed).uniform(0, whole)
        codes = [in_a_child(killed_after, start, home, after) for _ in range(3)]
        assert set(codes) <= {0, -signal.SIGKILL}
        kills += codes.count(-signal.SIGKILL)
        digest, _ = train(start, home)
        assert digest == unbroken, f"seed {seed}"
    assert kills >= len(SEEDS)
    claim(
        "a process killed up to three times at random moments ends with the bits of an unbroken one",
        figure=f"{len(SEEDS)} of {len(SEEDS)} runs, {kills} kills",
        seed=f"{SEEDS[0]} to {SEEDS[-1]}",
    )


def truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def flipped(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


@pytest.mark.parametrize("kind", ["state-00000.safetensors", "manifest.json"])
@pytest.mark.parametrize("harm", [truncated, flipped])
def test_a_damaged_file_is_noticed_named_and_the_checkpoint_before_is_used(start, home, kind, harm, claim):
    train(start, home)
    _, newest = names(home)
    path = folder(home, newest) / kind
    content = path.read_bytes()
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    noticed = 0
    for seed in SEEDS_OF_HARM:
        path.write_bytes(harm(content, random.Random(seed)))
        resumed = Checkpoints(home, IDENTITY, SingleWorker()).load_newest(engine)
        assert resumed.step == len(STEPS) - 1, f"seed {seed}"
        noticed += newest in resumed.skipped[0]
    assert noticed == len(SEEDS_OF_HARM)
    path.write_bytes(content)
    assert Checkpoints(home, IDENTITY, SingleWorker()).load_newest(engine).step == len(STEPS)
    claim(
        f"a checkpoint whose {kind} is {harm.__name__} is named, and the one before is used",
        figure=f"{noticed} of {len(SEEDS_OF_HARM)}",
        seed=f"{SEEDS_OF_HARM[0]} to {SEEDS_OF_HARM[-1]}",
    )


@pytest.mark.parametrize("kind", ["state-00000.safetensors", "manifest.json"])
def test_a_file_that_is_gone_or_another_checkpoints_is_noticed(start, home, kind, claim):
    train(start, home)
    before, newest = names(home)
    path = folder(home, newest) / kind
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    path.write_bytes((folder(home, before) / kind).read_bytes())
    swapped = Checkpoints(home, IDENTITY, SingleWorker()).load_newest(engine)
    assert (swapped.step, newest in " ".join(swapped.skipped)) == (len(STEPS) - 1, True)
    path.unlink()
    gone = Checkpoints(home, IDENTITY, SingleWorker()).load_newest(engine)
    # A folder without a manifest is no checkpoint, as one that was never completed.
    assert gone.step == len(STEPS) - 1
    assert len(gone.skipped) == (kind != "manifest.json")
    claim(
        f"a checkpoint whose {kind} is gone or another checkpoint's is passed over, and the one before is used",
        figure=f"of {len(STEPS)} steps {gone.step} and {swapped.step} were kept",
    )


def test_nothing_is_read_of_a_checkpoint_that_another_key_signed(start, home, monkeypatch, claim):
    train(start, home, until=1)
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    monkeypatch.setenv("PREFLOOP_SIGNING_KEY", "another key of somebody else, 32 characters")
    opened = []
    monkeypatch.setattr(checkpoints, "safe_open", lambda *arguments, **options: opened.append(arguments))
    # To begin again would throw away what the run has done, without a word.
    with pytest.raises(
        TrainingError, match=r"none that can be trusted: .*is not signed with this home's key[\s\S]*SIGNING_KEY"
    ):
        Checkpoints(home, IDENTITY, SingleWorker()).load_newest(engine)
    assert opened == []
    claim("nothing is opened of a checkpoint that another key signed", figure=f"{len(opened)} files")


def test_a_manifest_without_a_signature_is_skipped(start, home, monkeypatch, claim):
    train(start, home, until=2)
    name = names(home)[-1]
    path = folder(home, name) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["signature"]
    path.write_text(json.dumps(manifest))
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    opened, real = [], checkpoints.safe_open
    monkeypatch.setattr(checkpoints, "safe_open", lambda path, **how: opened.append(str(path)) or real(path, **how))
    resumed = Checkpoints(home, IDENTITY, SingleWorker()).load_newest(engine)
    assert (resumed.step, name in resumed.skipped[0]) == (1, True)
    assert opened
    of_it = [path for path in opened if name in path]
    assert of_it == []
    claim(
        "nothing is opened of a checkpoint without a signature, and the one before is used",
        figure=f"{len(of_it)} of its files, {len(opened)} of the one before",
    )


def test_a_run_whose_only_checkpoint_is_damaged_begins_again(start, home):
    train(start, home, until=1)
    [name] = names(home)
    (folder(home, name) / "state-00000.safetensors").write_bytes(b"half")
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    resumed = Checkpoints(home, IDENTITY, SingleWorker()).load_newest(engine)
    assert (resumed.step, name in resumed.skipped[0]) == (0, True)


def test_a_checkpoint_that_fails_is_told_before_the_next_one_is_due(start, home, monkeypatch):
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    kept = Checkpoints(home, IDENTITY, SingleWorker())
    kept.require_no_failure()

    def away(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoints, "file_digest", away)
    kept.save(engine, step=1)
    end = time.monotonic() + 30
    with pytest.raises(DataError, match=r"cannot be written: .*Input/output error"):
        while time.monotonic() < end:
            kept.require_no_failure()
            time.sleep(0.01)


def test_a_worker_reads_its_own_part_of_a_state_alone_where_the_checkpoint_lies_elsewhere(home, monkeypatch):
    """Four ranks kept a slice each in a store; the third reads its own and the first, and knows how long the others are."""
    monkeypatch.setenv("PREFLOOP_SIGNING_KEY", "k" * 32)
    away = Home.at(f"memory://{home.uri}")
    artifact = away.artifact("runs/run/checkpoints", "step-00000001-attempt0")
    for rank in range(4):
        piece = {"parameter/a": torch.full((3,), float(rank)), "parameter/b": torch.full((2,), 10.0 * rank)}
        artifact.filesystem.pipe_file(f"{artifact.path}/state-{rank:05d}.safetensors", save(piece))
    content = {"step": 1, "identity": asdict(IDENTITY), "reports": [], "score": None, "ranks": 4}
    artifact.write_manifest(content, key=away.signing_key(), purpose=checkpoints._PURPOSE)
    brought, get = [], type(artifact.filesystem).get_file

    def counted(filesystem, remote, local, **options):
        brought.append(remote.rsplit("/", 1)[-1])
        return get(filesystem, remote, local, **options)

    monkeypatch.setattr(type(artifact.filesystem), "get_file", counted)

    class Third:
        def ranks_to_read(self, ranks):
            assert ranks == 4
            return (0, 2)

        def restore(self, stored):
            self.a, self.b = stored("parameter/a"), stored("parameter/b")
            self.found = [self.a.slice(6, 9).tolist(), self.b.slice(0, 2).tolist(), self.b.slice(4, 6).tolist()]

    engine = Third()
    assert Checkpoints(away, IDENTITY, SingleWorker()).load_newest(engine).step == 1
    assert engine.found == [[2.0, 2.0, 2.0], [0.0, 0.0], [20.0, 20.0]]
    assert (engine.a.numel, engine.b.numel) == (12, 8)
    assert sorted(brought) == ["state-00000.safetensors", "state-00002.safetensors"]
    artifact.filesystem.pipe_file(f"{artifact.path}/state-00002.safetensors", save({"parameter/a": torch.zeros(3)}))
    damaged = Checkpoints(away, IDENTITY, SingleWorker()).load_newest(Third())
    assert (damaged.step, "differs from its manifest" in damaged.skipped[0]) == (0, True)


def test_a_checkpoint_tells_where_the_run_goes_on_and_what_was_measured(start, home):
    train(start, home, until=2)
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    assert Checkpoints(home, IDENTITY, SingleWorker()).load_newest(engine) == Resumed(2, ({"step": 2},), ())


def test_a_checkpoint_of_another_snapshot_is_refused(start, home):
    train(start, home, until=1)
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    with pytest.raises(TrainingError, match="checkpoints of another snapshot_id"):
        Checkpoints(home, replace(IDENTITY, snapshot_id="other"), SingleWorker()).load_newest(engine)


def test_a_checkpoint_from_before_the_references_digest_is_read(start, home):
    train(start, home, until=1)
    [name] = names(home)
    artifact = home.artifact("runs/run/checkpoints", name)
    old = artifact.manifest()
    content = {key: old[key] for key in ("step", "reports", "score", "ranks")}
    content["identity"] = {key: value for key, value in old["identity"].items() if key != "reference_digest"}
    artifact.write_manifest(content, key=home.signing_key(), purpose=checkpoints._PURPOSE)
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    assert Checkpoints(home, IDENTITY, SingleWorker()).load_newest(engine).step == 1


def test_a_checkpoint_from_before_the_first_update_is_read(start, home):
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    kept = Checkpoints(home, IDENTITY, SingleWorker())
    kept.save(engine, step=1)
    kept.finish()
    assert kept.load_newest(engine).step == 1


def test_the_newest_two_and_the_best_are_kept(start, home):
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    kept = Checkpoints(home, IDENTITY, SingleWorker())
    for step, score in enumerate((0.5, 0.9, None, 0.6, None, None), start=1):
        kept.save(engine, step=step, score=score)
    kept.finish()
    assert [int(name.split("-")[1]) for name in names(home)] == [2, 5, 6]


def test_what_an_attempt_left_unfinished_is_removed_by_the_next(start, home):
    train(start, home, until=1)
    left = folder(home, "step-00000002-dead0000")
    left.mkdir()
    (left / "state-00000.safetensors").write_bytes(b"half")
    train(start, home)
    assert not left.exists()
    assert len(names(home)) == 2


def test_training_goes_on_while_a_checkpoint_is_written_and_waits_for_the_one_before(start, home, monkeypatch):
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    kept = Checkpoints(home, IDENTITY, SingleWorker())
    written = threading.Event()
    digest = checkpoints.file_digest

    def slow(*arguments):
        written.wait(30)
        return digest(*arguments)

    monkeypatch.setattr(checkpoints, "file_digest", slow)
    kept.save(engine, step=1)
    assert names(home) == [], "it is being written"
    threading.Timer(0.5, written.set).start()
    assert kept.save(engine, step=2) > 0.4, "two at once would be two copies of the state"
    kept.finish()
    assert [name[:13] for name in names(home)] == ["step-00000001", "step-00000002"]


def test_training_waits_for_no_home_that_is_slow(start, home, monkeypatch):
    """A folder may be a file system of the network."""
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    kept = Checkpoints(home, IDENTITY, SingleWorker())
    reached, bring = threading.Event(), checkpoints._bring

    def slow(*arguments):
        assert reached.wait(30)
        bring(*arguments)

    monkeypatch.setattr(checkpoints, "_bring", slow)
    before = set(home.local().rglob("*"))
    kept.save(engine, step=1)
    assert set(home.local().rglob("*")) == before, "the thread of training touches it"
    reached.set()
    kept.finish()
    assert kept.load_newest(engine).step == 1


def test_a_home_on_another_disk_gets_a_copy_of_the_same_bytes(tmp_path, monkeypatch):
    def elsewhere(self, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    (tmp_path / "state").write_bytes(b"all of it")
    monkeypatch.setattr(Path, "replace", elsewhere)
    checkpoints._bring(tmp_path / "state", LocalFileSystem(), str(tmp_path / "home" / "step" / "state"))
    assert (tmp_path / "home" / "step" / "state").read_bytes() == b"all of it"


def test_storage_that_lets_nothing_go_ends_no_run(start, home, monkeypatch, caplog):
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    kept = Checkpoints(home, IDENTITY, SingleWorker())

    def locked(*arguments, **options):
        raise PermissionError(errno.EPERM, "object lock")

    monkeypatch.setattr(LocalFileSystem, "rm", locked)
    for step in range(1, 6):
        kept.save(engine, step=step)
    kept.finish()
    assert [int(name.split("-")[1]) for name in names(home)] == [1, 2, 3, 4, 5]
    assert len(kept.left) == 3
    assert "cannot be removed: [Errno 1] object lock" in caplog.text
    half = folder(home, "step-00000009-dead0000")
    half.mkdir()
    (half / "state-00000.safetensors").write_bytes(b"half")
    again = Checkpoints(home, IDENTITY, SingleWorker())
    assert again.load_newest(engine).step == 5
    monkeypatch.undo()
    again.save(engine, step=6)
    again.finish()
    assert [int(name.split("-")[1]) for name in names(home)] == [5, 6]
    assert not again.left


def test_a_checkpoint_that_is_never_done_ends_the_run_in_bounded_time(start, home, monkeypatch):
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    kept = Checkpoints(home, IDENTITY, SingleWorker())
    monkeypatch.setattr(checkpoints, "STALL_S", 0.2)
    held = threading.Event()
    monkeypatch.setattr(checkpoints, "file_digest", lambda *arguments: held.wait(30))
    kept.save(engine, step=1)
    with pytest.raises(DataError, match=r"is not written after 0 s"):
        kept.finish()
    held.set()


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(start, home, monkeypatch):
    train(start, home, until=1)
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    kept = Checkpoints(home, IDENTITY, SingleWorker())

    def full(tensors, path):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(DataError, match=r"cannot be written: .*No space left on device[\s\S]*make room"):
        kept.save(engine, step=2)
    monkeypatch.undo()
    assert kept.load_newest(engine).step == 1
    assert not list(home.local("runs").rglob("step-00000002*/state*"))
    assert not list(Path(tempfile.gettempdir()).glob(f"{kept._scratch}*"))


def test_a_storage_that_fails_while_training_goes_on_is_told_at_the_next_checkpoint(start, home, monkeypatch):
    engine = engine_of(build_policy(start(), SECTION), SECTION)
    kept = Checkpoints(home, IDENTITY, SingleWorker())
    monkeypatch.setattr(checkpoints, "file_digest", lambda *arguments: (_ for _ in ()).throw(OSError("it went away")))
    kept.save(engine, step=1)
    with pytest.raises(DataError, match=r"step-00000001-\w+` cannot be written: it went away"):
        kept.save(engine, step=2)


class Sliced:
    """An engine of which every rank keeps a part."""

    def __init__(self, rank: int) -> None:
        self.value, self.read = float(rank), []

    def state(self):
        return {"w": torch.full((3,), self.value)}

    def ranks_to_read(self, ranks):
        return range(ranks)

    def restore(self, stored):
        self.read = stored("w").slice(0, 6).tolist()


def test_ranks_leave_receipts_and_the_first_one_signs_for_all(home):
    threads = Threads(2)

    def work(number: int):
        kept = Checkpoints(home, IDENTITY, threads.rank(number))
        engine = Sliced(number)
        kept.save(engine, step=4)
        kept.finish()
        threads.barrier.wait()
        return kept.load_newest(engine).step, engine.read

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [(4, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])] * 2
    [name] = names(home)
    manifest = home.artifact("runs/run/checkpoints", name).manifest()
    assert sorted(manifest["files"]) == ["state-00000.safetensors", "state-00001.safetensors"]


def gone(path: Path) -> None:
    path.unlink()


def of_the_other_rank(path: Path) -> None:
    [other] = [file for file in path.parent.glob("state-*") if file != path]
    path.write_bytes(other.read_bytes())


def cut_short(path: Path) -> None:
    path.write_bytes(truncated(path.read_bytes(), random.Random(0)))


def changed(path: Path) -> None:
    path.write_bytes(flipped(path.read_bytes(), random.Random(0)))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("harm", [cut_short, changed, gone, of_the_other_rank])
def test_a_damaged_part_of_any_rank_sends_all_of_them_to_the_checkpoint_before(home, rank, harm, claim):
    threads = Threads(2)

    def work(number: int):
        kept = Checkpoints(home, IDENTITY, threads.rank(number))
        engine = Sliced(number)
        for step in (4, 5):
            engine.value += 10
            kept.save(engine, step=step)
            kept.finish()
        threads.barrier.wait()
        if number == 0:
            harm(folder(home, names(home)[-1]) / f"state-{rank:05d}.safetensors")
        threads.barrier.wait()
        resumed = kept.load_newest(engine)
        return resumed.step, engine.read, len(resumed.skipped)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, range(2)))
    assert found == [(4, [10.0, 10.0, 10.0, 11.0, 11.0, 11.0], 1)] * 2
    claim(
        f"a part of any rank that is {harm.__name__.replace('_', ' ')}: all ranks go on from the checkpoint before",
        figure=f"{len(found)} ranks from step {found[0][0]}",
    )


def test_a_receipt_that_nobody_signed_completes_nothing(home):
    threads = Threads(2)

    def work(number: int):
        kept = Checkpoints(home, IDENTITY, threads.rank(number))
        if number:
            kept.receipt = lambda files: json.dumps({"files": files, "signature": "0" * 64}).encode()
        kept.save(Sliced(number), step=4)
        if number:
            kept.finish()
            return
        with pytest.raises(DataError, match="not signed with this home's key"):
            kept.finish()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert names(home) == []


def test_slices_of_several_ranks_are_cut_anew_for_any_other_number(tmp_path):
    whole = torch.arange(10.0)
    for ranks in (1, 2, 3, 4, 7):
        width = -(-10 // ranks)
        padded = torch.cat([whole, torch.zeros(ranks * width - 10)])
        files = [f"state-{ranks}-{rank:05d}.safetensors" for rank in range(ranks)]
        for rank, name in enumerate(files):
            save_file({"w": padded[rank * width : (rank + 1) * width].clone()}, tmp_path / name)
        reader = checkpoints._reader(Artifact(str(tmp_path)), tmp_path, files)
        stored = reader("w")
        for start, stop in ((0, 10), (0, 1), (3, 8), (9, 10)):
            assert stored.slice(start, stop).tolist() == whole[start:stop].tolist()
        assert reader("v") is None
