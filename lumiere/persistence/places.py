"""Places that runs are pushed to and pulled from: folders, and everything that `fsspec` reaches by a URL.

Folders are read and written by our own functions: no link is followed, no pipe is waited for, and a file is there
completely or not at all. Credentials in a URL never appear in a message. Importing this module loads no `fsspec`.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

from lumiere.errors import LumiereError, TransferError, shortened
from lumiere.files import DISK, Disk, open_file
from lumiere.programs import install_command

CHUNK_BYTES = 1 << 20
READ_AHEAD_BYTES = 8 << 20
ANSWER_SECONDS = 10.0
"""How long to wait for a server's first answer; s3fs alone would try for a minute."""
PACKAGES = {
    "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs", "gcs": "gcsfs", "gs": "gcsfs", "http": "aiohttp",
    "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol",
}  # fmt: skip
"""What `fsspec` needs for a protocol."""
S3_HINT = (
    "the bucket must exist; credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws, another "
    "server from AWS_ENDPOINT_URL"
)
HINTS = {
    "s3": S3_HINT,
    "s3a": S3_HINT,
    "hf": "the repository must exist; credentials come from HF_TOKEN or hf auth login",
}
HINT = "check the address, the network and the credentials"

Answer = TypeVar("Answer")


class Place(Protocol):
    """Where runs can be, each in a folder of its name. Paths are relative and have slashes.

    All methods raise LumiereError; `read` raises FileNotFoundError for what does not exist.
    """

    address: str
    """As the user wrote it, without credentials."""

    def names(self) -> list[str]:
        """Return the names of the files and folders at the top."""
        ...

    def sizes(self, folder: str) -> dict[str, int | None]:
        """Return the length of each file in a folder, by its path in it; empty if the folder does not exist."""
        ...

    def read(self, path: str) -> Iterator[bytes]:
        """Yield the contents of a file."""
        ...

    def write(self, path: str, chunks: Iterable[bytes]) -> None:
        """Write a file, or replace it; nothing if `chunks` raises an exception."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, if it exists."""
        ...


def open_place(url: str) -> Place:
    """Return the place at a path, a `file://` URL, or a URL of any protocol that `fsspec` knows.

    Raises:
        LumiereError: The URL cannot be used, or a package for it is missing.
    """
    address = masked(url)
    if "\0" in url or not url.strip("/ "):
        raise LumiereError(f"{address!r} is no place for runs", "give a folder, or a URL such as s3://bucket/runs")
    protocol = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(?:://|::)", url)
    if protocol is None and (typed := url.partition(":")[0]) in {*PACKAGES, *HINTS}:
        raise LumiereError(f"{address!r} is no URL", f"did you mean {typed}://{url.partition(':')[2].lstrip('/')}?")
    if protocol is None or protocol[1] in ("file", "local"):
        path = url.removeprefix("file://").removeprefix("local://")
        return Folder(Path(os.path.expanduser(path)), address)
    if "?" in url:
        raise LumiereError(
            f"{address!r} has a query, which no place for runs needs", HINTS.get(protocol[1], "leave it out: " + HINT)
        )
    return Remote(url, protocol[1], address)


def masked(url: str) -> str:
    """Return a URL without user names, passwords and queries."""
    url = re.sub(r"://[^/@\s]*@", "://***@", url)
    url = re.sub(r"://[^@\s]*:[^@\s]*@", "://***@", url)  # a key that contains a slash
    return re.sub(r"(://[^?]*\?).+", r"\1***", url, flags=re.DOTALL)


class Folder:
    """A folder of this machine, or of a file server that is mounted."""

    def __init__(self, path: Path, address: str, disk: Disk = DISK) -> None:
        self.path = path
        self.address = address
        self.disk = disk

    def names(self) -> list[str]:
        with self._errors("read"), suppress(FileNotFoundError):
            return os.listdir(self.path)
        return []

    def sizes(self, folder: str) -> dict[str, int | None]:
        root, found = self.path / folder, {}
        with self._errors("read"):
            for parent, _, names in os.walk(root):
                for path in (Path(parent, name) for name in names):
                    with suppress(FileNotFoundError):
                        found[path.relative_to(root).as_posix()] = path.lstat().st_size
        return found

    def read(self, path: str) -> Iterator[bytes]:
        with self._errors("read", path), open_file(self._inside(path)) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def write(self, path: str, chunks: Iterable[bytes]) -> None:
        with self._errors("written", path):
            inside = self._inside(path)
            self.disk.make_folder(inside.parent, exist_ok=True)
            with self.disk.replacing(inside) as file:
                file.writelines(chunks)

    def remove(self, path: str) -> None:
        with self._errors("written", path):
            inside = self._inside(path)
            inside.unlink(missing_ok=True)
            with suppress(OSError):  # it holds other files
                inside.parent.rmdir()

    def _inside(self, path: str) -> Path:
        """Return the path of a file, to which no link leads: it could lead out of the folder."""
        inside = self.path
        for part in path.split("/"):
            inside /= part
            if inside.is_symlink():
                raise TransferError(f"{str(inside)!r} is a link", "put the file or folder itself there")
        return inside

    @contextmanager
    def _errors(self, action: str, path: str = "") -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            kind = TransferError if error.errno == errno.EINVAL else LumiereError  # a pipe, for example
            raise kind(
                f"{str(self.path / path)!r} cannot be {action}: {error.strerror or error}",
                "check the folder and its permissions",
            ) from error


class Remote:
    """A place that `fsspec` reaches."""

    def __init__(self, url: str, protocol: str, address: str) -> None:
        import fsspec

        self.address = address
        self._protocol = protocol
        self._secrets = _secrets(url)
        self._answered = False
        try:
            # Not an instance of an earlier call, whose cache may be old.
            self._files, self._root = fsspec.url_to_fs(url, skip_instance_cache=True)
        except ImportError as error:
            package = PACKAGES.get(protocol)
            hint = f"{install_command(package)}" if package else self._reason(error)
            raise LumiereError(
                f"{protocol}:// needs the package {package or 'of its protocol'}, which is not installed", hint
            ) from None
        except Exception as error:
            raise LumiereError(f"{address!r} cannot be opened: {self._reason(error)}", self._hint) from None

    def names(self) -> list[str]:
        with suppress(FileNotFoundError):
            return [
                path.rstrip("/").rpartition("/")[2] for path in self._ask(lambda: self._files.ls(self._root, False))
            ]
        return []

    def sizes(self, folder: str) -> dict[str, int | None]:
        root = self._path(folder)
        with suppress(FileNotFoundError):
            found: dict[str, Any] = self._ask(lambda: self._files.find(root, detail=True))
            # With a protocol, a bucket or a leading slash, as each of them likes it.
            return {path[path.find(f"{folder}/") + len(folder) + 1 :]: item.get("size") for path, item in found.items()}
        return {}

    def read(self, path: str) -> Iterator[bytes]:
        file = self._ask(lambda: self._files.open(self._path(path), "rb", block_size=READ_AHEAD_BYTES))
        with file:
            while chunk := self._ask(lambda: file.read(CHUNK_BYTES)):
                yield chunk

    def write(self, path: str, chunks: Iterable[bytes]) -> None:
        try:
            file = self._ask(lambda: self._opened(self._path(path)), "written")
            try:
                for chunk in chunks:
                    self._ask(lambda chunk=chunk: file.write(chunk), "written")
            except BaseException:
                # Closing it, as its destructor would, publishes the part that was written.
                with suppress(Exception):
                    file.discard()
                with suppress(AttributeError):
                    file.closed = True
                raise
            self._ask(file.close, "written")
        except FileNotFoundError as error:  # the bucket or the repository
            raise LumiereError(f"{self.address} cannot be written: {self._reason(error)}", self._hint) from None

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._ask(lambda: self._files.rm_file(self._path(path)), "written")

    def _path(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    def _opened(self, path: str) -> Any:
        try:
            return self._files.open(path, "wb")
        except FileNotFoundError:
            # Only then: of a bucket that does not exist, s3fs would make one.
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            return self._files.open(path, "wb")

    def _ask(self, call: Callable[[], Answer], action: str = "read") -> Answer:
        """Return what `call` returns, and describe what it raises, in our words."""
        try:
            if self._answered:
                return call()
            answer = _within(ANSWER_SECONDS, call)
            self._answered = True
            return answer
        except FileNotFoundError:
            raise
        except TimeoutError:
            reason = f"no answer within {ANSWER_SECONDS:.0f} seconds"
        except NotImplementedError:
            reason = f"{self._protocol}:// can only be read"
        except Exception as error:  # of any library
            reason = self._reason(error)
        raise LumiereError(f"{self.address} cannot be {action}: {reason}", self._hint)

    def _reason(self, error: Exception) -> str:
        text = masked(" ".join(str(error).split()) or type(error).__name__)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return shortened(text)

    @property
    def _hint(self) -> str:
        return HINTS.get(self._protocol, HINT)


def _secrets(url: str) -> list[str]:
    """Return what a user and password in a URL may look like in a message, the longest first."""
    found = re.match(r"[^:]+://([^/@\s]*|[^@\s]*:[^@\s]*)@", url)
    parts = re.split("[:/]", found[1]) if found else []
    return sorted({text for part in parts for text in (part, unquote(part)) if len(text) > 1}, key=len, reverse=True)


def _within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """Return what `call` returns, or raise what it raises; raise TimeoutError if that takes too long."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    # A daemon, which does not keep the process alive.
    thread = threading.Thread(target=run, name="first answer", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
