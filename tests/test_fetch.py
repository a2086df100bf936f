"""Downloads from a server that cuts, forgets, changes its mind and lies."""
import fcntl
import hashlib
import http.server
import os
import threading

import numpy as np
import pytest

from data_prep.fetch import Entry, fetch_all, read_list
from ssl_jax.data import download as module
from ssl_jax.data import transfer
from ssl_jax.data.download import fetch
from ssl_jax.errors import UserError

CONTENT = np.random.default_rng(0).bytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def do_GET(self):
        served = self.server.served
        asked = self.headers.get('Range')
        served.requests.append((self.path, asked, self.headers.get('If-Range')))
        script = served.script.pop(0) if served.script else {}
        if 'content' in script:
            served.content, served.validators = script['content'], script['validators']
        status = served.missing.get(self.path) or script.get('status')
        if status:
            self.send_response(status)
            for name, value in script.get('headers', {}).items():
                self.send_header(name, value)
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        start, content = 0, served.content
        same = self.headers.get('If-Range') in (None, *served.validators.values()) or served.ignores_if_range
        if asked and served.ranges and same:
            start = int(asked.removeprefix('bytes=').removesuffix('-'))
            if start >= len(content):
                self.send_response(416)
                self.send_header('Content-Length', '0')
                self.end_headers()
                return
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        else:
            self.send_response(200)
        for name, value in served.validators.items():
            self.send_header(name, value)
        self.send_header('Content-Type', served.kind)
        body = content[start:]
        if served.framing == 'length':
            self.send_header('Content-Length', str(len(body)))
        elif served.framing == 'chunked':
            self.send_header('Transfer-Encoding', 'chunked')
        else:
            self.close_connection = True
        self.end_headers()
        sent = body[:script.get('cut', len(body))]
        if served.framing == 'chunked':
            for i in range(0, len(sent), 50_000):
                chunk = sent[i:i + 50_000]
                self.wfile.write(b'%x\r\n%s\r\n' % (len(chunk), chunk))
            if len(sent) == len(body):
                self.wfile.write(b'0\r\n\r\n')
        else:
            self.wfile.write(sent)
        if len(sent) < len(body):
            self.close_connection = True


class Served:
    """What the server does: `script` has one dict per request to come: cut, status, headers, or a new content."""

    def __init__(self, url):
        self.url, self.content, self.validators = url, CONTENT, {'ETag': '"1"', 'Last-Modified': 'yesterday'}
        self.ranges, self.ignores_if_range, self.framing, self.kind = True, False, 'length', 'application/octet-stream'
        self.script, self.missing, self.requests = [], {}, []

    @property
    def ranges_asked(self):
        return [r for _, r, _ in self.requests]


@pytest.fixture(scope='module')
def server():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def served(server):
    server.served = Served(f'http://127.0.0.1:{server.server_port}/x.bin')
    return server.served


def get(served, path, *more, **options):
    return fetch(served.url, path, *more, quiet=True, wait=0, **options)


def test_a_file_comes_whole_and_is_never_asked_for_again(served, tmp_path):
    path = tmp_path / 'new' / 'x.bin'
    assert get(served, path, DIGEST.upper()) == path
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ['x.bin']
    get(served, path)
    get(served, path, DIGEST)
    assert len(served.requests) == 1
    with pytest.raises(UserError, match='x.bin has SHA-256 .* expected 0{64}: move it away'):
        get(served, path, '0' * 64)
    assert path.read_bytes() == CONTENT and len(served.requests) == 1


@pytest.mark.parametrize('framing', ['length', 'chunked'])
def test_a_cut_transfer_goes_on_after_the_last_byte(served, tmp_path, framing):
    served.framing = framing
    served.script = [{'cut': 100_000}, {'cut': 50_000}, {'status': 503}, {}]
    get(served, tmp_path / 'x.bin')
    assert (tmp_path / 'x.bin').read_bytes() == CONTENT
    assert served.requests[1:] == [('/x.bin', 'bytes=100000-', '"1"'), ('/x.bin', 'bytes=150000-', '"1"'),
                                   ('/x.bin', 'bytes=150000-', '"1"')]


def test_a_later_call_goes_on_too(served, tmp_path):
    served.script = [{'cut': 100_000}]
    with pytest.raises(UserError, match=r'failed 1 times in a row \(.*(100000|IncompleteRead)') as stopped:
        get(served, tmp_path / 'x.bin', tries=1)
    assert '\n' not in str(stopped.value)
    assert (tmp_path / 'x.bin.part').read_bytes() == CONTENT[:100_000] and not (tmp_path / 'x.bin').exists()
    get(served, tmp_path / 'x.bin')
    assert (tmp_path / 'x.bin').read_bytes() == CONTENT and served.ranges_asked == [None, 'bytes=100000-']
    # killed between the last byte and the rename: nothing is left to ask for
    (tmp_path / 'y.bin.part').write_bytes(CONTENT)
    (tmp_path / 'y.bin.part.json').write_text(
        f'{{"url": "{served.url}", "validator": "\\"1\\"", "total": {len(CONTENT)}}}')
    get(served, tmp_path / 'y.bin')
    assert (tmp_path / 'y.bin').read_bytes() == CONTENT and len(served.requests) == 2
    # a beginning of unknown origin is not gone on with
    (tmp_path / 'z.bin.part').write_bytes(b'other')
    get(served, tmp_path / 'z.bin')
    assert (tmp_path / 'z.bin').read_bytes() == CONTENT and served.ranges_asked[-1] is None


def test_a_server_without_ranges_starts_anew(served, tmp_path):
    served.ranges, served.script = False, [{'cut': 200_000}, {'cut': 100_000}, {}]
    get(served, tmp_path / 'x.bin')
    assert (tmp_path / 'x.bin').read_bytes() == CONTENT
    assert served.ranges_asked == [None, 'bytes=200000-', 'bytes=100000-']
    served.script = [{'cut': 1000}] * 50        # it never gets further: that is no progress
    with pytest.raises(UserError, match='failed 4 times in a row'):
        get(served, tmp_path / 'y.bin', tries=4)


@pytest.mark.parametrize('ignores', [False, True], ids=['honest', 'ignores_if_range'])
@pytest.mark.parametrize('validators', [{'ETag': '"2"'}, {'ETag': 'W/"2"', 'Last-Modified': 'today'}],
                         ids=['etag', 'weak_etag'])
def test_a_file_that_changes_between_tries_starts_anew(served, tmp_path, ignores, validators):
    new = CONTENT[::-1]
    served.ignores_if_range = ignores
    if 'Last-Modified' in validators:
        served.validators = {'ETag': 'W/"2"', 'Last-Modified': 'yesterday'}     # a weak one promises nothing
    served.script = [{'cut': 100_000}, {'content': new, 'validators': validators}]
    get(served, tmp_path / 'x.bin')
    assert (tmp_path / 'x.bin').read_bytes() == new
    assert served.requests[1][2] == ('yesterday' if 'Last-Modified' in validators else '"1"')
    served.validators, served.script = {'ETag': '"1"'}, [{'cut': 200_000},
                                                         {'content': new[:150_000], 'validators': {'ETag': '"1"'}}]
    get(served, tmp_path / 'y.bin')             # shorter than what has come: 416
    assert (tmp_path / 'y.bin').read_bytes() == new[:150_000]


def test_without_etag_and_date_only_a_checksum_allows_to_go_on(served, tmp_path):
    served.validators, served.script = {}, [{'cut': 100_000}]
    get(served, tmp_path / 'x.bin')
    served.script = [{'cut': 100_000}]
    get(served, tmp_path / 'y.bin', DIGEST)
    assert served.requests == [('/x.bin', None, None)] * 3 + [('/x.bin', 'bytes=100000-', None)]
    assert (tmp_path / 'x.bin').read_bytes() == (tmp_path / 'y.bin').read_bytes() == CONTENT


def test_wrong_checksum(served, tmp_path):
    with pytest.raises(UserError, match=f'x.bin has SHA-256 {DIGEST}, expected 0{{64}}: http.* is another file'):
        get(served, tmp_path / 'x.bin', '0' * 64)
    assert not os.listdir(tmp_path)


def test_what_cannot_be_had_fails_at_once(served, tmp_path):
    path = tmp_path / 'x.bin'
    served.script = [{'status': 404}]
    with pytest.raises(UserError, match='x.bin: HTTP 404 Not Found'):
        get(served, path)
    served.kind = 'text/html; charset=utf-8'
    with pytest.raises(UserError, match='is a web page, not a file'):
        get(served, path)
    served.kind, served.framing = 'application/octet-stream', 'close'
    with pytest.raises(UserError, match='tells no length'):
        get(served, path)
    assert len(served.requests) == 3 and not os.listdir(tmp_path)
    get(served, path, DIGEST)
    assert path.read_bytes() == CONTENT
    for url, message in (('file:///etc/hostname', 'is no URL that begins with http'), ('x.bin', 'is no URL that'),
                         ('http://[::1', 'Invalid IPv6 URL'), ('http://a b/', 'is no URL .*control')):
        with pytest.raises(UserError, match=message):
            fetch(url, tmp_path / 'y.bin', quiet=True, tries=1)
    with pytest.raises(UserError, match="sha256 'abc' is not 64"):
        get(served, tmp_path / 'y.bin', 'abc')


def test_passing_failures(served, tmp_path):
    served.script = [{'status': 429, 'headers': {'Retry-After': '0'}}, {'status': 500}]
    get(served, tmp_path / 'x.bin')
    served.script = [{'status': 502}] * 9
    with pytest.raises(UserError, match=r'failed 3 times in a row \(HTTP 502 Bad Gateway\); what has come \(0 bytes'):
        get(served, tmp_path / 'y.bin', tries=3)
    with pytest.raises(UserError, match='failed 1 times in a row .ConnectionRefusedError'):
        fetch('http://127.0.0.1:9/y.bin', tmp_path / 'y.bin', quiet=True, tries=1)
    assert os.listdir(tmp_path) == ['x.bin']


def test_disk_and_other_processes(served, tmp_path, monkeypatch):
    with open(tmp_path / 'x.bin.part', 'ab') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match='another download is writing to'):
            get(served, tmp_path / 'x.bin')
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 1000}))
    with pytest.raises(UserError, match='x.bin: 0.0003 GB are to come, .* has 1e-06 GB free'):
        get(served, tmp_path / 'x.bin')


def test_lists(served, tmp_path, capsys):
    base = served.url.removesuffix('x.bin')
    served.missing = {'/c.bin': 404}
    text = f'# all\n{base}a%20b.bin  # with a space\n\n{base}b?dl=0 b.bin {DIGEST}\n{base}c.bin\n{base}d.bin {DIGEST}\n'
    (tmp_path / 'urls.txt').write_text(text)
    entries = read_list(tmp_path / 'urls.txt')
    assert entries == [Entry(f'{base}a%20b.bin', 'a b.bin'), Entry(f'{base}b?dl=0', 'b.bin', DIGEST),
                       Entry(f'{base}c.bin', 'c.bin'), Entry(f'{base}d.bin', 'd.bin', DIGEST)]
    with pytest.raises(UserError, match=r'1 of 4 downloads failed; first: .*c.bin: HTTP 404'):
        fetch_all(entries, tmp_path / 'out', threads=3, wait=0)
    assert sorted(os.listdir(tmp_path / 'out')) == ['a b.bin', 'b.bin', 'd.bin']
    assert '1/4 a b.bin: 0.3 MB' in capsys.readouterr().out
    served.missing, served.requests = {}, []
    paths = fetch_all(entries, tmp_path / 'out', quiet=True)
    assert [p.name for p in paths] == ['a b.bin', 'b.bin', 'c.bin', 'd.bin'] and len(served.requests) == 1
    for line, message in (('ftp://x/y', 'urls.txt:1: .* is no URL'), ('http://x/', 'is no file name'),
                          ('http://x/y ../z', "'../z' is no file name"), ('http://x/y ..', 'is no file name'),
                          ('http://x/y z w', 'expected URL .NAME. .SHA256., found 3 words'),
                          ('http://x/y\nhttp://z/y', "urls.txt:2: the name 'y' is that of line 1"), ('# no', 'no URL')):
        (tmp_path / 'urls.txt').write_text(line)
        with pytest.raises(UserError, match=message):
            read_list(tmp_path / 'urls.txt')


def test_dropbox_links_ask_for_the_file():
    direct = module._direct
    assert direct('https://www.dropbox.com/scl/fi/ab/1.zarr.tar?rlkey=x%2B&e=1&dl=0') == (
        'https://www.dropbox.com/scl/fi/ab/1.zarr.tar?rlkey=x%2B&e=1&dl=1')
    assert direct('https://www.dropbox.com/s/ab/1.zarr.tar') == 'https://www.dropbox.com/s/ab/1.zarr.tar?dl=1'
    assert direct('https://example.org/a?dl=0') == 'https://example.org/a?dl=0'


def test_other_file_systems(tmp_path, monkeypatch):
    fsspec = pytest.importorskip('fsspec')
    monkeypatch.setattr(transfer, 'REMOTE', ('memory',))
    system = fsspec.filesystem('memory')
    system.pipe('/bucket/x.bin', CONTENT)
    path = tmp_path / 'x.bin'
    fetch('memory://bucket/x.bin', path, DIGEST, quiet=True)
    assert path.read_bytes() == CONTENT
    # the second half, of the same file
    info = system.info('/bucket/x.bin')
    (tmp_path / 'y.bin.part').write_bytes(b'A' * 1000)
    (tmp_path / 'y.bin.part.json').write_text(f'{{"url": "memory://bucket/x.bin", "validator": "{info["created"]}", '
                                              f'"total": {len(CONTENT)}}}')
    fetch('memory://bucket/x.bin', tmp_path / 'y.bin', quiet=True)
    assert (tmp_path / 'y.bin').read_bytes() == b'A' * 1000 + CONTENT[1000:]
    with pytest.raises(UserError, match='nothing: FileNotFoundError'):
        fetch('memory://bucket/nothing', tmp_path / 'z.bin', quiet=True)
