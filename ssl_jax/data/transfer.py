"""Asks a server for a file, or for the rest of one: over HTTP, or through fsspec."""
import contextlib
import dataclasses
import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable

from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

REMOTE = ('gs', 's3')      # schemes left to fsspec
TIMEOUT = 60               # seconds without a byte
PASSING = (408, 425, 429, 500, 502, 503, 504)      # HTTP statuses after which a further try may succeed


@dataclasses.dataclass(frozen=True)
class Known:
    """What the server said of the file that a .part is the beginning of."""
    url: str
    validator: str | None           # strong ETag or date; None: it gave neither
    total: int | None               # bytes


@dataclasses.dataclass(frozen=True)
class Answer:
    """A file on its way."""
    start: int                      # byte of the file at which `read` begins
    known: Known
    delimited: bool                 # `read` tells a cut from the end, though the length is unknown
    read: Callable[[int], bytes]    # at most so many bytes, b'' at the end


class Interrupted(Exception):
    """A failure that a further try may mend."""

    def __init__(self, message: str, delay: float = 0):
        super().__init__(message)
        self.delay = delay          # seconds that the server asks for


def ask(stack: contextlib.ExitStack, url: str, have: int, known: Known | None) -> Answer | None:
    """The file from byte `have` on, or, where that cannot be had, from its first byte; closed by `stack`.

    Args:
      known: what is known of the file that the bytes in hand are of; None = begin anew.
    Returns:
      None where the server gives something else than it was asked for: it may be asked for all.
    Raises:
      Interrupted: for the moment.
      UserError: for good.
    """
    return (_ask_remote if scheme(url) in REMOTE else _ask_http)(stack, url, have, known)


def scheme(url: str) -> str:
    """http, https, gs or s3.

    Raises:
      UserError: anything else.
    """
    try:
        found = urllib.parse.urlsplit(url).scheme
    except ValueError as error:
        raise UserError(f'{url!r} is no URL ({error})') from error
    if found not in ('http', 'https', *REMOTE):
        raise UserError(f'{url!r} is no URL that begins with http://, https://, {":// or ".join(REMOTE)}://')
    return found


def reason(error: Exception) -> str:
    """The error in one line."""
    return f'{type(error).__name__}: {first_line(error)}' if str(error) else type(error).__name__


def _ask_http(stack: contextlib.ExitStack, url: str, have: int, known: Known | None) -> Answer | None:
    headers = {'User-Agent': 'ssl_jax'}     # some servers refuse that of urllib
    if known:
        headers |= {'Range': f'bytes={have}-'} | ({'If-Range': known.validator} if known.validator else {})
    try:
        response = stack.enter_context(urllib.request.urlopen(urllib.request.Request(url, headers=headers),
                                                              timeout=TIMEOUT))
    except urllib.error.HTTPError as error:
        error.close()
        if known and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        status = f'HTTP {error.code} {error.reason}'
        if error.code not in PASSING:
            raise UserError(f'{url}: {status}') from error
        asked = error.headers.get('Retry-After', '')
        raise Interrupted(status, min(300, int(asked)) if asked.isdigit() else 0) from error
    except (ValueError, http.client.InvalidURL) as error:
        raise UserError(f'{url!r} is no URL ({first_line(error)})') from error
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, 'reason', error)     # urllib wraps what the socket says
        raise Interrupted(reason(cause if isinstance(cause, Exception) else error)) from error
    given = response.headers
    if given.get_content_type() == 'text/html' and not urllib.parse.urlsplit(url).path.endswith(('.html', '.htm')):
        raise UserError(f'{url} is a web page, not a file: the link may have expired, or needs a login')
    etag = given.get('ETag', '')
    validator = given.get('Last-Modified') if not etag or etag.startswith('W/') else etag
    length = given.get('Content-Length', '')
    if response.status == http.HTTPStatus.PARTIAL_CONTENT and known:
        found = re.fullmatch(r'bytes (\d+)-\d+/(\d+|\*)', given.get('Content-Range', '').strip())
        total = int(found[2]) if found and found[2] != '*' else known.total
        same = validator in (None, known.validator) and known.total in (None, total)
        if not found or int(found[1]) != have or not same:
            return None
        return Answer(have, dataclasses.replace(known, total=total), bool(response.chunked), response.read1)
    total = int(length) if length.isdigit() else None
    return Answer(0, Known(url, validator, total), bool(response.chunked), response.read1)


def _ask_remote(stack: contextlib.ExitStack, url: str, have: int, known: Known | None) -> Answer | None:
    try:
        import fsspec
        system, inner = fsspec.core.url_to_fs(url)
        info = system.info(inner)
        names = ('ETag', 'etag', 'generation', 'LastModified', 'updated', 'mtime', 'created')
        found = Known(url, next((str(info[n]) for n in names if info.get(n)), None), info['size'])
        if known and known != found:
            return None
        file = stack.enter_context(system.open(inner, 'rb'))
        file.seek(have)
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f'{url}: {reason(error)}') from error
    except ImportError as error:
        raise UserError(f"{url}: {first_line(error)}: pip install 'ssl_jax[remote]'") from error
    except OSError as error:
        raise Interrupted(reason(error)) from error
    return Answer(have, found, True, file.read)
