"""Where things live, and how they are written so that a reader never sees half of one.

A *home* is a folder or any fsspec URI:

    home/
      ledger.db            the SQL ledger, unless PREFLOOP_LEDGER names another
      api_key              key of the gateway (0600)
      signing_key          key that signs verdicts and checkpoints (0600)
      pairs/ID/            part-*.parquet, quarantine-*.parquet, manifest.json      immutable, content-addressed
      training/ID/         train-*.parquet, held_out-*.parquet, manifest.json       immutable, content-addressed
      models/ID/           safetensors, tokenizer, config, manifest.json          immutable
      evaluations/ID/      report.json, .md, .html, judgements-*.parquet, manifest.json   a verdict and all behind it
      runs/ID/             checkpoints and exports of a run
      cache/               may be deleted at any time

An artifact is complete exactly when its `manifest.json` exists: it is written last, through a temporary name and a
rename where the file system has one. The manifest holds the sha256 and size of every other file. This module does not
know what the files mean.
"""

import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from app.errors import DataError
from app.schemas import SCHEMA_VERSION, canonical_json, check_schema, content_hash

HOME_VARIABLE = "PREFLOOP_HOME"
LEDGER_VARIABLE = "PREFLOOP_LEDGER"
SIGNING_VARIABLE = "PREFLOOP_SIGNING_KEY"
API_KEY_VARIABLE = "PREFLOOP_API_KEY"
_SHORTEST_KEY = 32
MANIFEST = "manifest.json"
UNDIGESTED = ("README.md",)
"""Of a model: what its digest leaves out; the card names the digest."""
REPORT_PAGE = "report.html"
"""Of an evaluation: the page to open."""
JUDGEMENTS = "judgements"
"""Of an evaluation: every comparison, as Parquet."""
_CHUNK = 1 << 20
_FILES_AT_ONCE = 8
_USED = ".used"
"""Beside a copy: locked, shared, by each process that reads it; an empty file for each artifact, which stays."""
_RAY_WORKING_DIRECTORY = "working_dir_files"


def place_of(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system that a URI names, and the path there."""
    # Object stores remember what they listed, and other processes write.
    filesystem, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    return filesystem, str(path)


@dataclass(frozen=True)
class Home:
    """The root of a state: an absolute path or a URI. Cheap to make and to pickle; touches nothing."""

    uri: str

    @classmethod
    def from_environment(cls) -> "Home":
        """Return `PREFLOOP_HOME`, or `.prefloop` of the working directory, made absolute.

        Ray runs a job in a temporary copy of its working directory, which is no place for a state: there the default
        is `~/.prefloop`.
        """
        in_job = _RAY_WORKING_DIRECTORY in Path.cwd().parts
        return cls.at(os.environ.get(HOME_VARIABLE) or ("~/.prefloop" if in_job else ".prefloop"))

    @classmethod
    def at(cls, place: str | Path) -> "Home":
        """Return the home at a path (made absolute) or a URI."""
        text = str(place)
        return cls(text.rstrip("/") if "://" in text else str(Path(text).expanduser().resolve()))

    @property
    def is_local(self) -> bool:
        """True where the home is a folder of this machine."""
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The fsspec file system that holds the home."""
        return place_of(self.uri)[0]

    @property
    def ledger_url(self) -> str:
        """SQLAlchemy URL of the ledger; raises DataError for a remote home without `PREFLOOP_LEDGER`."""
        url = os.environ.get(LEDGER_VARIABLE)
        if url:
            return url
        if not self.is_local:
            msg = f"home `{self.uri}` is remote, so the ledger cannot be a SQLite file in it\n\nHint: set {LEDGER_VARIABLE} to a PostgreSQL URL."
            raise DataError(msg)
        return f"sqlite:///{self.local() / 'ledger.db'}"

    def local(self, *parts: str) -> Path:
        """Return a path inside a local home; raises DataError where the home is remote."""
        if not self.is_local:
            msg = f"`{'/'.join(parts)}` needs a local folder, the home is `{self.uri}`"
            raise DataError(msg)
        return Path(place_of(self.uri)[1], *parts)

    def near(self, *parts: str) -> Path:
        """Return a path on this machine's disk for what may be lost with it: in the home, or in a temporary folder."""
        if self.is_local:
            return self.local(*parts)
        return Path(tempfile.gettempdir(), f"prefloop-{hashlib.sha256(self.uri.encode()).hexdigest()[:12]}", *parts)

    def path(self, *parts: str) -> str:
        """Return a path inside the home as its file system has it."""
        return "/".join([place_of(self.uri)[1].rstrip("/"), *parts])

    def artifact(self, kind: str, name: str) -> "Artifact":
        """Return the artifact `kind/name`, which need not exist."""
        return Artifact(f"{self.uri}/{kind}/{name}")

    def names(self, kind: str) -> list[str]:
        """List the complete artifacts of a kind, sorted."""
        filesystem, root = place_of(f"{self.uri}/{kind}")
        return sorted(p.split("/")[-2] for p in filesystem.glob(f"{root}/*/{MANIFEST}"))

    def api_key(self) -> str:
        """Return the gateway's key: of the environment, or one made at the first call in a local home.

        Raises:
            DataError: the one of the environment is short, or the home is remote and there is none.
        """
        given = self._given_secret(API_KEY_VARIABLE, what="gateway's key", who="that serves or ships")
        return given or self._secret("api_key")

    def signing_key(self) -> bytes:
        """Return the key that signs verdicts and checkpoints: of the environment, or one made at the first call in a local home.

        Whoever can write to a local home can put another key there, and what was signed with it; only a key that lies
        elsewhere keeps them out.

        Raises:
            DataError: the one of the environment is short, the home is remote and there is none, or somebody else can
                read or write the file.
        """
        given = self._given_secret(
            SIGNING_VARIABLE,
            what="key that signs verdicts and checkpoints",
            who="that trains, evaluates or ships",
        )
        if given is not None:
            return given.encode()
        key, found = self._secret("signing_key"), self.local("signing_key").stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            msg = f"`{self.local('signing_key')}` belongs to user {found.st_uid} with mode {found.st_mode & 0o777:o}, so others may have signed with it\n\nHint: make it yours alone (chmod 600), or set {SIGNING_VARIABLE}."
            raise DataError(msg)
        return key.encode()

    def _given_secret(self, variable: str, *, what: str, who: str) -> str | None:
        given = os.environ.get(variable) or None
        if given is not None and len(given) < _SHORTEST_KEY:
            msg = f"{variable} has {len(given)} characters, {_SHORTEST_KEY} are needed\n\nHint: `openssl rand -hex 32` makes one."
            raise DataError(msg)
        if given is None and not self.is_local:
            msg = f"home `{self.uri}` is remote, so the {what} cannot be a file in it\n\nHint: set {variable}, to the same value for every job {who}."
            raise DataError(msg)
        return given

    def _secret(self, name: str) -> str:
        path = self.local(name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{name}-{os.getpid()}-{secrets.token_hex(4)}")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as stream:
                stream.write(f"pl-{secrets.token_urlsafe(32)}\n")
            try:
                # A link fails where another process was first; its key counts.
                os.link(temporary, path)
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        return path.read_text(encoding="ascii").strip()


@dataclass(frozen=True)
class Artifact:
    """A folder of files that is complete when its manifest exists."""

    uri: str

    @property
    def name(self) -> str:
        """Last part of the URI."""
        return self.uri.rsplit("/", 1)[-1]

    @property
    def path(self) -> str:
        """Path of the folder on its file system."""
        return place_of(self.uri)[1]

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The file system that holds the folder."""
        return place_of(self.uri)[0]

    def exists(self) -> bool:
        """True when the artifact is complete."""
        return bool(self.filesystem.exists(f"{self.path}/{MANIFEST}"))

    def manifest(self, *, key: bytes | None = None, purpose: bytes = b"") -> dict[str, Any]:
        """Read the manifest, and where there is a key, believe it only with its signature.

        Raises:
            DataError: it is missing, damaged, of a newer version or not signed with the key.
        """
        place = f"{self.uri}/{MANIFEST}"
        try:
            found: Any = json.loads(self.filesystem.cat_file(f"{self.path}/{MANIFEST}"))
        except FileNotFoundError:
            msg = f"no complete artifact at `{self.uri}` (it has no {MANIFEST})"
            raise DataError(msg) from None
        except ValueError as error:
            msg = f"`{place}` is damaged: {error}"
            raise DataError(msg) from None
        version = found.get("schema_version", 0) if isinstance(found, dict) else None
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            msg = f"`{place}` was written by a newer prefloop (this one reads up to version {SCHEMA_VERSION})"
            raise DataError(msg)
        manifest: dict[str, Any] = found
        if key is not None:
            signed = {name: value for name, value in manifest.items() if name != "signature"}
            if not same_signature(manifest.get("signature"), signature(signed, key, purpose=purpose)):
                msg = f"`{place}` is not signed with this home's key, so nothing of it is read"
                raise DataError(msg)
        return manifest

    def write_manifest(
        self,
        content: dict[str, Any],
        *,
        files: dict[str, dict[str, Any]] | None = None,
        key: bytes | None = None,
        purpose: bytes = b"",
    ) -> dict[str, Any]:
        """Write the manifest, which completes the artifact.

        Args:
            content: what it says beside the files.
            files: sha256 and size of each, by who wrote them; default: of every file that is there.
            key: signs it, for `purpose`.
            purpose: keeps a signature of one kind from standing for another.
        """
        filesystem, root = self.filesystem, self.path
        if files is None:
            names = sorted(str(p).removeprefix(f"{root}/") for p in filesystem.find(root))
            files = {
                n: file_digest(filesystem, f"{root}/{n}") for n in names if n != MANIFEST and not n.startswith(".")
            }
        manifest = {**content, "schema_version": SCHEMA_VERSION, "files": files}
        if key is not None:
            manifest = {**manifest, "signature": signature(manifest, key, purpose=purpose)}
        write_atomically(filesystem, f"{root}/{MANIFEST}", json.dumps(manifest, indent=1, sort_keys=True).encode())
        return manifest

    def verify(self) -> dict[str, Any]:
        """Compare every file with the manifest.

        Raises:
            DataError: names the first file that is missing or differs.
        """
        manifest = self.manifest()
        files, filesystem, root = manifest["files"], self.filesystem, self.path
        # A listing tells what is missing or cut off at once, where hashes would take as long as the files are large.
        sizes = {str(path): entry["size"] for path, entry in filesystem.find(root, detail=True).items()}
        for name, expected in files.items():
            if sizes.get(f"{root}/{name}") != expected["size"]:
                self._compare(filesystem, f"{root}/{name}", name, expected)
        self._compare_all(filesystem, root, files)
        return manifest

    def is_whole(self) -> bool:
        """True when the artifact is complete and every file is as the manifest says.

        Raises:
            DataError: the manifest itself is damaged, or of a newer version.
        """
        if not self.exists():
            return False
        self.manifest()
        try:
            self.verify()
        except DataError:
            return False
        return True

    def _compare_all(
        self, filesystem: fsspec.AbstractFileSystem, root: str, files: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Compare files of a folder, this one or a copy, with what is expected of them; raises DataError as `_compare`."""
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            compared = [
                pool.submit(self._compare, filesystem, f"{root}/{n}", n, expected) for n, expected in files.items()
            ]
            for each in compared:
                each.result()

    def _compare(
        self, filesystem: fsspec.AbstractFileSystem, path: str, name: str, expected: Mapping[str, Any]
    ) -> None:
        """Compare one file with its sha256 and size; raises DataError where it is missing or differs."""
        try:
            found = file_digest(filesystem, path)
        except FileNotFoundError:
            raise self._lacks(name) from None
        if found != expected:
            msg = f"`{self.uri}/{name}` differs from its manifest: {found['size']} bytes, sha256 {found['sha256'][:12]}…, expected {expected['size']} bytes, {expected['sha256'][:12]}…"
            raise DataError(msg)

    def _lacks(self, name: str) -> DataError:
        msg = f"`{self.uri}` lacks the file `{name}` that its manifest names"
        return DataError(msg)

    def content_digest(self, *, without: Sequence[str] = ()) -> str:
        """Return the hash of all files that the manifest names, 32 hex digits; `verify` compares the files themselves."""
        files = {name: file["sha256"] for name, file in self.manifest()["files"].items() if name not in without}
        return content_hash(files)

    @contextmanager
    def verified_copy(
        self,
        files: Mapping[str, Mapping[str, Any]],
        wanted: Iterable[str] | None = None,
        *,
        shared: Iterable[str] | None = None,
    ) -> Iterator[Path]:
        """Yield the folder on this machine after comparing what is read from it with its hashes.

        Where it is not local, processes of one machine that read it at the same time share one copy, which goes with the last
        of them; what a killed one left goes when the next one comes.

        Args:
            files: sha256 and size of each, as the manifest has them.
            wanted: the files that are read; default: all.
            shared: the files to compare where they lie in a folder, and other processes compare the rest; default: `wanted`.

        Raises:
            DataError: names the first file that is missing or differs.
        """
        names = list(files if wanted is None else wanted)
        if isinstance(self.filesystem, LocalFileSystem):
            self._compare_all(self.filesystem, self.path, {n: files[n] for n in (names if shared is None else shared)})
            yield Path(self.path)
            return
        folder = _copies() / content_hash([self.uri, files])[:16]
        with folder.with_suffix(_USED).open("a+") as used:
            fcntl.flock(used, fcntl.LOCK_SH)
            (folder / "files").mkdir(parents=True, exist_ok=True)
            try:
                with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
                    fetched = [pool.submit(self._fetch, name, files[name], folder) for name in names]
                    try:
                        for each in fetched:
                            each.result()
                    except BaseException:
                        pool.shutdown(cancel_futures=True)  # it waits for those that run: they write into the folder
                        raise
                yield folder / "files"
            finally:
                _remove_unused(used, folder)

    def _fetch(self, name: str, expected: Mapping[str, Any], folder: Path) -> None:
        """Copy and compare one file, where no other process of this machine has done so."""
        target, coming = folder / "files" / name, folder / "coming" / name
        for path in (target, coming):
            path.parent.mkdir(parents=True, exist_ok=True)
        with coming.with_name(f"{coming.name}.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if target.exists():
                    return
                self.filesystem.get_file(f"{self.path}/{name}", str(coming))
                self._compare(LocalFileSystem(), str(coming), name, expected)
                coming.replace(target)
            except FileNotFoundError:
                raise self._lacks(name) from None
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """Yield the folder on this machine: itself where it is local, else a temporary copy of its own.

        Raises:
            DataError: a file that is to be copied is missing.
        """
        if isinstance(self.filesystem, LocalFileSystem):
            yield Path(self.path)
            return
        with tempfile.TemporaryDirectory(prefix="prefloop-copy-") as scratch:
            for name in [*self.manifest()["files"], MANIFEST]:
                target = Path(scratch, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self.filesystem.get_file(f"{self.path}/{name}", str(target))
                except FileNotFoundError:
                    raise self._lacks(name) from None
            yield Path(scratch)

    def write_rows(
        self, rows: Iterable[dict[str, Any]], schema: pa.Schema, *, rows_per_file: int, stem: str = "part"
    ) -> int:
        """Write rows to `STEM-00000.parquet`, …, cast to the schema, with page checksums; return their number.

        Each file appears whole, and files that an interrupted write left behind are removed.
        """
        filesystem, root = self.filesystem, self.path
        filesystem.makedirs(root, exist_ok=True)
        total, part = 0, 0
        buffer: list[dict[str, Any]] = []

        def flush() -> None:
            nonlocal part
            table = pa.Table.from_pylist(buffer, schema=schema)
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
            write_atomically(filesystem, f"{root}/{stem}-{part:05d}.parquet", sink.getvalue().to_pybytes())
            part += 1
            buffer.clear()

        for row in rows:
            buffer.append(row)
            total += 1
            if len(buffer) == rows_per_file:
                flush()
        if buffer or not part:
            flush()
        for stale in self.part_uris(stem)[part:]:
            filesystem.rm_file(stale)
        return total

    def part_uris(self, stem: str = "part") -> list[str]:
        """List the Parquet parts in order, as paths of the file system."""
        return sorted(str(p) for p in self.filesystem.glob(f"{self.path}/{stem}-*.parquet"))

    def read_table(self, schema: pa.Schema, *, stem: str = "part") -> pa.Table:
        """Read all parts into one table; raises DataError for a damaged or foreign file."""
        tables = [read_parquet(self.filesystem, path, schema) for path in self.part_uris(stem)]
        return pa.concat_tables(tables) if tables else schema.empty_table()


def _copies() -> Path:
    """Return the folder of this machine's copies, without those that killed processes left; raises DataError where it is not ours."""
    place = Path(tempfile.gettempdir(), f"prefloop-copies-{os.getuid()}")
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
    if place.is_symlink() or not place.is_dir() or place.stat().st_uid != os.getuid():
        msg = f"`{place}` belongs to somebody else, who could exchange the models in it\n\nHint: remove it, or set TMPDIR to a folder of your own."
        raise DataError(msg)
    for path in place.glob(f"*{_USED}"):
        with path.open("a+") as used:
            _remove_unused(used, path.with_suffix(""))
    return place


def _remove_unused(used: IO[str], folder: Path) -> None:
    """Remove a copy that no process reads: each that does has a shared lock, which ends with it however it ends."""
    with suppress(BlockingIOError):
        fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    # Closing is not enough where a forked child has the file too.
    fcntl.flock(used, fcntl.LOCK_UN)


def read_parquet(filesystem: fsspec.AbstractFileSystem, path: str, schema: pa.Schema | None) -> pa.Table:
    """Read one Parquet file in one request, verify page checksums and UTF-8, and check the schema where one is given.

    Raises:
        DataError: the file is empty, truncated, corrupt, not UTF-8 or of another schema.
    """
    try:
        content = filesystem.cat_file(path)
        if not content:
            msg = f"`{path}` is empty (0 bytes)"
            raise DataError(msg)
        table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
        table.validate(full=True)
    except FileNotFoundError:
        msg = f"no file at `{path}`"
        raise DataError(msg) from None
    except (pa.ArrowException, OSError) as error:
        msg = f"`{path}` is no readable Parquet file: {str(error).splitlines()[0]}"
        raise DataError(msg) from None
    if schema is not None:
        check_schema(table.schema, schema, place=path)
        table = table.select(schema.names)
    return table


def arrow_filesystem(uri: str) -> pa.fs.FileSystem | None:
    """Return how pyarrow reads a place that it does not know itself; None where it does, by the URI alone."""
    try:
        pa.fs.FileSystem.from_uri(uri if "://" in uri else Path(uri).as_uri())
    except pa.ArrowInvalid:
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(place_of(uri)[0]))
    return None


def signature(content: Mapping[str, Any], key: bytes, *, purpose: bytes) -> str:
    """Return the HMAC-SHA256 (RFC 2104) of plain values under a key, in hex; `purpose` keeps one kind from standing for another."""
    # As they are read back: a tuple is a list then.
    plain = json.loads(json.dumps(dict(content)))
    return hmac.new(key, purpose + canonical_json(plain).encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def same_signature(given: object, expected: str) -> bool:
    """Compare in constant time; what is no text is no signature."""
    return isinstance(given, str) and hmac.compare_digest(given.encode(), expected.encode())


def file_digest(filesystem: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    """Return sha256 and size of a file."""
    digest, size = hashlib.sha256(), 0
    with filesystem.open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"sha256": digest.hexdigest(), "size": size}


def write_atomically(filesystem: fsspec.AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new content; on a local disk it is durable on return."""
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(path, content)  # object stores replace an object in one step
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_if_allowed(filesystem: fsspec.AbstractFileSystem, path: str) -> bool:
    """Remove a folder that nobody needs, and say whether that could be done; where not, what stands against it is logged.

    A role without the right to delete, or objects that are locked, must not end what is done without them.
    """
    try:
        filesystem.rm(path, recursive=True)
    except FileNotFoundError:
        return True
    except Exception as error:  # noqa: BLE001  stores raise many kinds
        logging.getLogger(__name__).warning("`%s` is no longer needed and cannot be removed: %s", path, error)
        return False
    return True
