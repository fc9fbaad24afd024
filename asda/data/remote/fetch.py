"""Fetch bytes through fsspec, with retries, or say in one sentence why it fails.

A request is repeated, with growing waits and a bounded number of times, if the failure may be temporary: a broken
connection, a silent server, HTTP 503, wrong bytes. A failure that is final (404, 403) is not repeated. Credentials in a
location (user:password@, ?signature) are used and never shown: they are cut out of every message.
"""

import asyncio
import io
import logging
import re
import threading
import time
from collections.abc import Iterable
from concurrent.futures import wait
from functools import partial
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit, urlunsplit

import tenacity
from fsspec import filesystem
from fsspec.asyn import AsyncFileSystem, get_loop
from xxhash import xxh3_128

from asda.data.remote.cache import CacheConfig, StoredFile
from asda.errors import UserError

# Scheme of a location -> the package that fsspec needs for it. What would run commands or other code is not here.
PACKAGES = {
    "http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
    "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "hf": "huggingface_hub", "hdfs": "pyarrow",
    "webhdfs": "requests", "oss": "ossfs",
}  # fmt: skip
OURS = ("aiohttp", "s3fs")  # which the extra asda[remote] installs
HTTP = ("http", "https")
URL_SAFE = "%/:@!$&'()*+,;=~-._"  # in a path, beside letters and digits

PIECE_BYTES = 4 << 20  # per request to what is not HTTP
SLOWEST_BYTES_PER_S = 1024  # less is no transfer that would end
WATCH_S = 0.1  # between two looks at a transfer that is under way
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # before the second attempt, and between later ones; doubled each time
TEMPORARY_STATUS = (408, 425, 429)  # HTTP errors below 500 that may be temporary
# What aiohttp and botocore raise beside OSError; by name, because both are extras.
NETWORK_ERRORS = {
    "ClientConnectionError", "ClientPayloadError", "ClientResponseError",
    "ConnectionError", "HTTPClientError", "IncompleteReadError", "ResponseParserError",
}  # fmt: skip

_log = logging.getLogger(__name__)


class TransferError(Exception):
    """Nothing arrives, or bytes that are not the file."""


class UnreachableError(UserError):
    """A file cannot be fetched, after all attempts; asking for another part of it would take as long."""


class LocalDiskError(Exception):
    """Holds the OSError of a write to this machine's disk; asking the server again would not help."""


class RemoteFolder:
    """A folder elsewhere: every read is a request, and nothing is kept. Any thread may read at any time."""

    def __init__(self, location: str, config: CacheConfig):
        """Open `location`, scheme://..., without a request. Raises UserError if a package is missing."""
        self._location = location
        self._scheme = location.partition("://")[0].lower()
        self._config = config
        self._fs = _open_filesystem(self._scheme, location, config.timeout_s)

    def __str__(self) -> str:
        return self.where("").rstrip("/")

    def where(self, name: str) -> str:
        """Return the file's address for messages, without credentials."""
        return f"{without_credentials(self._location).rstrip('/')}/{name}"

    def read_unlisted(self, name: str, limit_bytes: int) -> bytes:
        """Return the whole of a file whose length is not known. Raises UserError if it is missing or longer."""
        out = io.BytesIO()
        num_bytes = self._fetch(name, range(limit_bytes), out, exact=False)
        return out.getvalue()[:num_bytes]

    def read(self, file: StoredFile, start: int, stop: int) -> bytes:
        """Return the bytes from start to stop, not verified. Raises UserError if they cannot be fetched."""
        out = io.BytesIO()
        self._fetch(file.name, range(start, stop), out, ranged=(start, stop) != (0, file.bytes))
        return out.getvalue()

    def read_whole(self, file: StoredFile) -> bytes:
        """Return all bytes of a small file."""
        return self.read(file, 0, file.bytes)

    def read_ahead(self, file: StoredFile) -> None:
        """Do nothing, since nothing is kept."""

    def renew(self, file: StoredFile) -> bool:
        """Return True: bytes may have been damaged on their way, so another read may give others."""
        return True

    def check_sizes(self, files: Iterable[StoredFile]) -> None:
        """Do nothing: asking takes long, and reading finds missing files and wrong sizes."""

    def download(self, file: StoredFile, out: BinaryIO) -> None:
        """Write the whole file to `out`; return only if its length and hash are right.

        Raises:
            UserError: the file cannot be fetched.
            OSError: `out` cannot be written.
        """
        self._fetch(file.name, range(file.bytes), out, digest=file.digest)

    def _fetch(
        self, name: str, span: range, out: BinaryIO, *, ranged: bool = False, exact: bool = True, digest: str = ""
    ) -> int:
        """Transfer a span of bytes until it succeeds, or fails in a way that is final; return how many have come.

        `ranged`: the span is a part of the file. `exact` refuses fewer bytes, `digest` those of another hash.
        """

        def attempt() -> int:
            arrivals = self._transfer(name, span, out, ranged=ranged)
            if exact and arrivals.num_bytes != len(span):
                raise arrivals.wrong(f"{arrivals.num_bytes} of {len(span)} bytes arrived")
            if digest and (found := arrivals.hash.hexdigest()) != digest:
                raise arrivals.wrong(f"its hash is {found}, the index says {digest}")
            return arrivals.num_bytes

        began = time.monotonic()
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._config.attempts) | tenacity.stop_after_delay(self._config.give_up_s),
            wait=tenacity.wait_exponential(FIRST_WAIT_S, LONGEST_WAIT_S) + tenacity.wait_random(0, FIRST_WAIT_S),
            retry=tenacity.retry_if_exception(_is_temporary),
            before_sleep=partial(self._log_retry, name),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except LocalDiskError as error:
            raise error.args[0] from None
        except Exception as error:  # whatever a filesystem raises; its own words may hold credentials
            attempts = f"{retrying.statistics['attempt_number']} attempts in {time.monotonic() - began:.1f} s"
            reason, tried = _reason(error), attempts if _is_temporary(error) else "not tried again"
        raise UnreachableError(
            f"cannot fetch {self.where(name)}: {reason} ({tried}); check the location and the server"
        )

    def _log_retry(self, name: str, state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        attempts = f"attempt {state.attempt_number + 1} of {self._config.attempts} in {state.upcoming_sleep:.1f} s"
        _log.warning("%s: %s; %s", self.where(name), _reason(state.outcome.exception()), attempts)

    def _transfer(self, name: str, span: range, out: BinaryIO, *, ranged: bool) -> "_Arrivals":
        """Fetch a span of bytes once; stop if nothing arrives any more."""
        out.seek(0)
        arrivals = _Arrivals(out, len(span), ranged=ranged)
        future = asyncio.run_coroutine_threadsafe(self._pour(name, span, arrivals, ranged=ranged), get_loop())
        timeout_s = self._config.timeout_s
        since, num_before = time.monotonic(), 0
        try:
            while not wait([future], timeout=WATCH_S).done:
                now, num_bytes = time.monotonic(), arrivals.num_bytes
                if now - arrivals.last_at > timeout_s:
                    raise TransferError(f"nothing arrived for {timeout_s:g} s")
                if now - since > timeout_s:
                    if num_bytes - num_before < SLOWEST_BYTES_PER_S * timeout_s:
                        raise TransferError(f"only {num_bytes - num_before} bytes arrived in {timeout_s:g} s")
                    since, num_before = now, num_bytes
            future.result()
        finally:
            arrivals.abandon()  # the transfer ends a little later, and must not write into the next attempt
            future.cancel()
        return arrivals

    async def _pour(self, name: str, span: range, arrivals: "_Arrivals", *, ranged: bool) -> None:
        url, fs = self._url(name), self._fs
        if self._scheme in HTTP:
            headers = {"Range": f"bytes={span.start}-{span.stop - 1}"} if ranged else {}
            await fs._get_file(url, arrivals, headers=headers)
            return
        cat_file = fs._cat_file if isinstance(fs, AsyncFileSystem) else partial(asyncio.to_thread, fs.cat_file)
        for low in span[::PIECE_BYTES]:
            high = min(low + PIECE_BYTES, span.stop)
            if arrivals.write(await cat_file(url, start=low, end=high)) < high - low:
                return  # the file ends here

    def _url(self, name: str) -> str:
        if self._scheme not in HTTP:
            return f"{self._location.rstrip('/')}/{name}"
        parts = urlsplit(self._location)  # a signature in the query stays behind the name
        return urlunsplit(parts._replace(path=f"{quote(parts.path.rstrip('/'), safe=URL_SAFE)}/{name}", fragment=""))


class _Arrivals:
    """The file object that a transfer writes to: it counts, hashes, and refuses more than was asked for."""

    def __init__(self, out: BinaryIO, limit_bytes: int, *, ranged: bool):
        self.num_bytes = 0
        self.last_at = time.monotonic()  # s
        self.hash = xxh3_128()
        self._out, self._limit_bytes, self._ranged = out, limit_bytes, ranged
        self._beginning = b""
        self._abandoned = False
        self._lock = threading.Lock()

    def read(self, _size: int = -1) -> bytes:
        """Refuse to read; fsspec takes an object for a file if it has read, close and tell."""
        raise io.UnsupportedOperation

    close = tell = read

    def abandon(self) -> None:
        """Take nothing more."""
        with self._lock:
            self._abandoned = True

    def write(self, chunk: bytes) -> int:
        """Take the next bytes."""
        with self._lock:
            if self._abandoned:
                raise asyncio.CancelledError
            self._beginning = self._beginning or chunk[:64]
            self.num_bytes += len(chunk)
            if self.num_bytes > self._limit_bytes:
                if self._ranged:
                    raise UserError("the server does not send parts of files; read it through a cache (data.cache)")
                raise self.wrong(f"more than {self._limit_bytes} bytes arrived")
            self.hash.update(chunk)
            try:
                self._out.write(chunk)
            except OSError as error:
                raise LocalDiskError(error) from error
            self.last_at = time.monotonic()
            return len(chunk)

    def wrong(self, problem: str) -> TransferError:
        """Make the error about bytes that are not the file."""
        page = self._beginning.lstrip().lower().startswith((b"<!doctype", b"<html"))
        return TransferError(problem + (", which look like a web page" if page else ""))


def without_credentials(location: str) -> str:
    """Remove user, password and query from a location, for messages."""
    return re.sub(r"//[^/\s]*@", "//", location.partition("?")[0])


def shareable(value: Any) -> Any:
    """Remove users and passwords from the addresses in a value of a configuration, or in a tree of values."""
    if isinstance(value, dict):
        return {key: shareable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(item) for item in value]
    return without_credentials(value) if isinstance(value, str) and "://" in value else value


def _open_filesystem(scheme: str, location: str, timeout_s: float) -> Any:
    options: dict[str, Any] = {}
    package = PACKAGES[scheme]
    try:
        if scheme in HTTP:
            import aiohttp  # an extra

            client = {
                "timeout": aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s),
                "headers": {"Accept-Encoding": "identity"},  # the bytes as they are on the server
                "auto_decompress": False,
                "trust_env": True,  # proxies, as other programs take them
            }
            options = {"client_kwargs": client, "encoded": True}  # the address is quoted already
        elif package == "s3fs":
            patience = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"max_attempts": 0}}
            options = {"config_kwargs": patience}
        fs = filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError:
        command = "pip install 'asda[remote]'" if package in OURS else f"pip install {package}"
        raise UserError(f"{without_credentials(location)} needs the package {package}: {command}") from None
    fs.retries = 1  # of s3fs and gcsfs: attempts are counted and logged here
    return fs


def _is_temporary(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    if (status := _http_status(error)) is not None:
        return status >= 500 or status in TEMPORARY_STATUS
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (TransferError, OSError, EOFError)) or not names.isdisjoint(NETWORK_ERRORS)


def _http_status(error: BaseException) -> int | None:
    """Return the HTTP status in an error of aiohttp or another store's client, if it has one."""
    for name in ("status", "status_code", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None


def _reason(error: BaseException | None) -> str:
    """Say why an attempt failed, in one line without credentials."""
    if isinstance(error, (TransferError, UserError)):
        return str(error)
    if error is not None and (status := _http_status(error)) is not None:
        return f"HTTP status {status}"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, PermissionError):
        return "access is refused"
    if isinstance(error, TimeoutError):
        return "the server did not answer in time"
    text = re.sub(r"\S*[/?]\S*", lambda address: without_credentials(address[0]), str(error))
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"
