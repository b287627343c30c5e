"""Storage: complete or not there, verified by hash, versions refused by name, secrets for their owner only."""

import json
import multiprocessing
import os
import stat
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from app.errors import DataError
from app.schemas import PAIR_SCHEMA, QUARANTINE_SCHEMA, SCHEMA_VERSION
from app.storage import Artifact, Home, read_parquet, write_atomically

ROWS = [{"place": f"file:{i}", "reason": "empty", "detail": "é 🙂", "raw": str(i)} for i in range(10)]


@pytest.fixture
def artifact(home) -> Artifact:
    made = home.artifact("pairs", "one")
    made.write_rows(ROWS, QUARANTINE_SCHEMA, rows_per_file=4)
    made.write_manifest({"rows": 10})
    return made


def test_rows_come_back_in_order_over_several_files(artifact):
    assert len(artifact.part_uris()) == 3
    assert artifact.read_table(QUARANTINE_SCHEMA).to_pylist() == ROWS


def test_no_rows_are_one_empty_file_of_the_schema(home):
    made = home.artifact("pairs", "none")
    assert made.write_rows([], PAIR_SCHEMA, rows_per_file=4) == 0
    made.write_manifest({})
    assert made.read_table(PAIR_SCHEMA).num_rows == 0


def test_an_artifact_exists_exactly_when_its_manifest_does(home):
    made = home.artifact("pairs", "half")
    made.write_rows(ROWS, QUARANTINE_SCHEMA, rows_per_file=4)
    assert not made.exists()
    assert home.names("pairs") == []
    with pytest.raises(DataError, match="no complete artifact at"):
        made.manifest()
    made.write_manifest({})
    assert made.exists()
    assert home.names("pairs") == ["half"]


def test_the_manifest_names_every_file_but_itself(artifact):
    assert sorted(artifact.verify()["files"]) == [f"part-0000{i}.parquet" for i in range(3)]


@pytest.mark.parametrize("place", [0, 1, 50, -1])
def test_a_flipped_bit_is_found(artifact, place):
    path = Path(artifact.part_uris()[1])
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="part-00001.parquet` differs from its manifest"):
        artifact.verify()


@pytest.mark.parametrize("length", [0, 10, -1])
def test_a_truncated_file_is_found(artifact, length):
    path = Path(artifact.part_uris()[2])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match="part-00002.parquet` differs from its manifest"):
        artifact.verify()


def test_a_deleted_file_is_found(artifact):
    Path(artifact.part_uris()[0]).unlink()
    with pytest.raises(DataError, match="lacks the file `part-00000.parquet` that its manifest names"):
        artifact.verify()


def test_an_artifact_is_whole_until_a_file_is_damaged(artifact, tmp_path):
    assert artifact.is_whole()
    Path(artifact.part_uris()[2]).write_bytes(b"damaged")
    assert not artifact.is_whole()
    assert not Artifact(str(tmp_path / "none")).is_whole()


def test_swapped_files_are_found(artifact):
    first, second, _ = map(Path, artifact.part_uris())
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(DataError, match="differs from its manifest"):
        artifact.verify()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"rows": 1', "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[]", "written by a newer prefloop"),
        (json.dumps({"schema_version": SCHEMA_VERSION + 1}).encode(), "written by a newer prefloop"),
    ],
)
def test_a_damaged_or_newer_manifest_is_refused(artifact, content, message):
    Path(artifact.path, "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        artifact.manifest()


def test_an_interrupted_write_leaves_nothing_half_done(tmp_path, monkeypatch, home):
    path = tmp_path / "file"
    write_atomically(home.filesystem, str(path), b"old")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(home.filesystem, str(path), b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["file"]


def write(path: Path, table: pa.Table) -> str:
    pq.write_table(table, path, write_page_checksum=True)
    return str(path)


@pytest.mark.parametrize("keep", [0, 1, 100, -8])
def test_an_empty_or_truncated_parquet_file_is_refused_by_name(tmp_path, home, keep):
    path = tmp_path / "rows.parquet"
    write(path, pa.Table.from_pylist(ROWS, schema=QUARANTINE_SCHEMA))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="rows.parquet` is (empty|no readable Parquet file)"):
        read_parquet(home.filesystem, str(path), QUARANTINE_SCHEMA)


def test_a_foreign_a_newer_and_a_changed_parquet_file_are_refused(tmp_path, home):
    foreign = write(tmp_path / "foreign.parquet", pa.table({"x": [1]}))
    with pytest.raises(DataError, match=r"is not a prefloop quarantine file \(its kind: None\)(.|\n)*prefloop import"):
        read_parquet(home.filesystem, foreign, QUARANTINE_SCHEMA)
    other_kind = write(tmp_path / "pairs.parquet", PAIR_SCHEMA.empty_table())
    with pytest.raises(DataError, match="its kind: 'pairs'"):
        read_parquet(home.filesystem, other_kind, QUARANTINE_SCHEMA)
    metadata = {**QUARANTINE_SCHEMA.metadata, b"prefloop.schema_version": str(SCHEMA_VERSION + 1).encode()}
    newer = write(tmp_path / "newer.parquet", QUARANTINE_SCHEMA.with_metadata(metadata).empty_table())
    with pytest.raises(DataError, match=f"has schema version {SCHEMA_VERSION + 1}(.|\n)*upgrade prefloop"):
        read_parquet(home.filesystem, newer, QUARANTINE_SCHEMA)
    fewer = pa.schema([("place", pa.int64())], metadata=QUARANTINE_SCHEMA.metadata).empty_table()
    with pytest.raises(DataError, match=r"columns missing: \['reason', 'detail', 'raw'\]; .*type: \['place'\]"):
        read_parquet(home.filesystem, write(tmp_path / "fewer.parquet", fewer), QUARANTINE_SCHEMA)


def test_columns_of_a_later_writer_are_ignored(tmp_path, home):
    more = pa.Table.from_pylist(ROWS, schema=QUARANTINE_SCHEMA).append_column("new", pa.array(range(10)))
    path = write(tmp_path / "more.parquet", more)
    assert read_parquet(home.filesystem, path, QUARANTINE_SCHEMA).to_pylist() == ROWS


def test_text_that_is_not_utf8_is_refused(tmp_path, home):
    broken = pa.array([b"\xff"]).view(pa.string())
    path = write(tmp_path / "broken.parquet", pa.table({"x": broken}))
    with pytest.raises(DataError, match="(?i)utf"):
        read_parquet(home.filesystem, path, None)


def test_the_api_key_is_for_its_owner_only_and_stays(home):
    key = home.api_key()
    assert key.startswith("pl-")
    assert len(key) > 40
    assert stat.S_IMODE(home.local("api_key").stat().st_mode) == 0o600
    assert home.api_key() == key


def test_many_first_readers_get_one_api_key(home):
    keys: list[str] = []
    barrier = threading.Barrier(8)

    def read() -> None:
        barrier.wait()
        keys.append(home.api_key())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1
    assert [p.name for p in home.local().iterdir()] == ["api_key"]


def test_the_home_is_absolute_and_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFLOOP_HOME", raising=False)
    assert Home.from_environment().uri == str(tmp_path / ".prefloop")
    monkeypatch.setenv("PREFLOOP_HOME", "elsewhere")
    assert Home.from_environment().uri == str(tmp_path / "elsewhere")
    monkeypatch.setenv("PREFLOOP_HOME", "s3://bucket/home/")
    assert Home.from_environment().uri == "s3://bucket/home"


def test_the_default_home_of_a_ray_job_is_not_its_working_copy(tmp_path, monkeypatch):
    copy = tmp_path / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.delenv("PREFLOOP_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Home.from_environment().uri == str(tmp_path / ".prefloop")


def test_what_may_be_lost_with_a_machine_lies_in_a_home_that_is_a_folder_or_beside_one_that_is_not(home):
    assert home.near("demo", "x") == home.local("demo", "x")
    one, other = (Home.at(f"memory://{name}/home").near("demo", "x") for name in ("one", "other"))
    assert one.is_absolute()
    assert one.parts[-2:] == other.parts[-2:] == ("demo", "x")
    assert one != other, "two homes share nothing"


def test_a_remote_home_keeps_artifacts_but_no_sqlite_ledger(monkeypatch):
    monkeypatch.delenv("PREFLOOP_LEDGER", raising=False)
    home = Home.at("memory://home")
    made = home.artifact("pairs", "remote")
    made.write_rows(ROWS, QUARANTINE_SCHEMA, rows_per_file=4)
    made.write_manifest({"rows": 10})
    assert made.verify()["rows"] == 10
    assert home.names("pairs") == ["remote"]
    with made.local_copy() as folder:
        assert (folder / "manifest.json").is_file()
        assert len(list(folder.glob("part-*.parquet"))) == 3
    with pytest.raises(DataError, match="remote, so the ledger cannot be a SQLite file(.|\n)*PREFLOOP_LEDGER"):
        _ = home.ledger_url
    with pytest.raises(DataError, match="set PREFLOOP_API_KEY"):
        home.api_key()
    monkeypatch.setenv("PREFLOOP_LEDGER", "postgresql://server/base")
    assert home.ledger_url == "postgresql://server/base"


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class Far(fsspec.AbstractFileSystem):
    """A store that several processes reach: a folder, by another name."""

    protocol = "far"
    fetched: ClassVar = []  # by all threads of a process; each has an instance

    def get_file(self, rpath, lpath, **_):
        self.fetched.append(rpath)
        super().get_file(rpath, lpath)

    def info(self, path, **_):
        return LocalFileSystem().info(path)

    def _open(self, path, mode="rb", **_):
        return Path(path).open(mode)


def _read_copy(uri: str, place: str) -> int:
    """Read an artifact of a store; return how many files this process fetched."""
    fsspec.register_implementation("far", Far, clobber=True)
    tempfile.tempdir = place
    made = Artifact(uri)
    with made.verified_copy(made.manifest()["files"]):
        Path(place, f"reads-{os.getpid()}").touch()
        end = time.monotonic() + 60
        while len(list(Path(place).glob("reads-*"))) < 2:
            assert time.monotonic() < end, "the other process does not come"
            time.sleep(0.01)
    return len(Far.fetched)


def test_two_processes_fetch_each_file_once(tmp_path):
    folder = tmp_path / "store" / "one"
    folder.mkdir(parents=True)
    for number in range(20):
        (folder / f"{number}.txt").write_text(str(number))
    Artifact(str(folder)).write_manifest({})
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        counts = list(pool.map(_read_copy, [f"far://{folder}"] * 2, [str(tmp_path)] * 2))
    assert sum(counts) == 20
    assert not list(tmp_path.glob("prefloop-copies-*/*/"))


def test_who_reads_an_artifact_of_a_store_at_the_same_time_shares_a_copy_that_goes_with_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = Home.at("memory://shared").artifact("pairs", "one")
    made.write_rows(ROWS, QUARANTINE_SCHEMA, rows_per_file=4)
    made.filesystem.pipe_file(f"{made.path}/more/words.txt", b"words")
    files = made.write_manifest({})["files"]
    [words] = [name for name in files if name.endswith("words.txt")]
    first, *_ = files
    left = tmp_path / f"prefloop-copies-{os.getuid()}" / "killed"
    with made.verified_copy(files, [first]) as one:
        assert everything(one) == [first]
        # What a process leaves that was killed, and what another is reading.
        left.mkdir()
        left.with_suffix(".used").touch()
        made.filesystem.rm_file(f"{made.path}/{first}")  # not asked for again
        with made.verified_copy(files) as two:
            assert one == two
            assert everything(one) == sorted(files)
            assert (two / words).read_bytes() == b"words"
            assert not left.exists()
        assert (one / first).is_file(), "the first still reads"
    assert not one.exists()
    with pytest.raises(DataError, match=f"lacks the file `{first}`"), made.verified_copy(files):
        pass
    assert not one.exists()


def test_a_damaged_file_of_a_store_is_no_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = Home.at("memory://damaged").artifact("pairs", "one")
    made.write_rows(ROWS, QUARANTINE_SCHEMA, rows_per_file=4)
    files = made.write_manifest({})["files"]
    first, *_ = files
    made.filesystem.pipe_file(f"{made.path}/{first}", b"else")
    for _ in range(2):
        with pytest.raises(DataError, match=f"{first}` differs from its manifest"), made.verified_copy(files):
            pass


def test_a_folder_of_copies_that_somebody_else_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = Home.at("memory://stranger").artifact("pairs", "one")
    made.write_rows(ROWS, QUARANTINE_SCHEMA, rows_per_file=4)
    files = made.write_manifest({})["files"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"prefloop-copies-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(DataError, match="belongs to somebody else"), made.verified_copy(files):
        pass


def _write_part(uri: str) -> int:
    made = Artifact(uri)
    return sum(made.write_rows(ROWS * 50, QUARANTINE_SCHEMA, rows_per_file=100) for _ in range(10))


def test_a_reader_never_sees_half_of_a_part_that_is_written_again(home):
    made = home.artifact("pairs", "busy")
    made.write_rows(ROWS * 50, QUARANTINE_SCHEMA, rows_per_file=100)
    made.write_manifest({})
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        writing = pool.submit(_write_part, made.uri)
        reads = 0
        while not writing.done() or not reads:
            assert made.read_table(QUARANTINE_SCHEMA).num_rows == 500
            reads += 1
        assert writing.result() == 5000
    made.verify()


def test_parts_left_by_an_interrupted_write_do_not_stay(home):
    made = home.artifact("pairs", "again")
    made.write_rows(ROWS, QUARANTINE_SCHEMA, rows_per_file=1)
    made.write_rows(ROWS, QUARANTINE_SCHEMA, rows_per_file=100)
    made.write_manifest({})
    assert made.read_table(QUARANTINE_SCHEMA).to_pylist() == ROWS
