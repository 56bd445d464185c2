"A fake of Google Cloud Storage, for what cannot run here: the JSON API that gcsfs speaks, on loopback, with faults on demand."
import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, unquote, urlsplit

UNIT = 1 << 18    # a resumable upload keeps whole units of 256 KiB


class Answer(Exception):
    "What a request gets when it is not what it should be."
    def __init__(self, status, message): self.status, self.message = status, message


class FakeGCS:
    """A fake bucket server: `with FakeGCS('bucket') as gcs:` sets STORAGE_EMULATOR_HOST for this process and those that it starts.
    Objects change at once and as a whole, as in the real one; an overwritten generation is gone.
    Faults match a regular expression against 'METHOD /path?query' and wear out after `times` requests."""
    def __init__(self, *buckets, page=1000):
        self.buckets = {b: {} for b in buckets}     # bucket -> key -> object
        self.page, self.sessions, self.faults, self.asked = page, {}, [], []
        self.login, self.seconds, self.made = False, 0., 0    # seconds: of every 64 KiB on the line
        self.gate = threading.Event()                         # cleared: the line stands still
        self.gate.set()
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'gcs': self}))
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(.05,), daemon=True).start()
        self.before, os.environ['STORAGE_EMULATOR_HOST'] = os.environ.get('STORAGE_EMULATOR_HOST'), self.url
        return self

    def __exit__(self, *exc):
        os.environ.pop('STORAGE_EMULATOR_HOST')
        if self.before: os.environ['STORAGE_EMULATOR_HOST'] = self.before
        self.server.shutdown()
        self.server.server_close()

    def fail(self, match='', status=503, times=1):
        "Answer with an error."
        self.faults.append(dict(match=match, times=times, status=status))

    def cut(self, match='', after=0, times=1):
        "Lose the connection after so many bytes of the body, the one that comes in or the one that goes out."
        self.faults.append(dict(match=match, times=times, after=after))

    def lose(self, match='', times=1):
        "Do what is asked, and lose the connection before the answer."
        self.faults.append(dict(match=match, times=times, lose=True))

    def count(self, match): return sum(bool(re.search(match, a)) for a in self.asked)

    def keys(self, bucket): return sorted(self.buckets[bucket])

    def data(self, bucket, key): return self.buckets[bucket][key]['data']

    def put(self, bucket, key, data, kind='application/octet-stream'):
        with self.lock:
            self.made += 1
            now = datetime.now(timezone.utc).strftime('%Y-%m-%dT%H:%M:%S.%fZ')
            self.buckets[bucket][key] = dict(data=bytes(data), kind=kind, generation=1_700_000_000_000_000 + self.made, at=now)
        return self.about(bucket, key)

    def about(self, bucket, key):
        o = self.buckets[bucket][key]
        md5 = base64.b64encode(hashlib.md5(o['data']).digest()).decode()
        return dict(kind='storage#object', id=f'{bucket}/{key}/{o["generation"]}', name=key, bucket=bucket, generation=str(o['generation']),
                    metageneration='1', contentType=o['kind'], storageClass='STANDARD', size=str(len(o['data'])), md5Hash=md5,
                    etag=str(o['generation']), timeCreated=o['at'], updated=o['at'])

    def fault(self, line, kind):
        with self.lock:
            for f in self.faults:
                if kind in f and f['times'] > 0 and re.search(f['match'], line):
                    f['times'] -= 1
                    return f

    def bucket(self, name):
        if name not in self.buckets: raise Answer(404, 'The specified bucket does not exist.')
        return self.buckets[name]

    def object(self, bucket, key, query):
        o = self.bucket(bucket).get(key)
        if o is None or query.get('generation', str(o['generation'])) != str(o['generation']):
            raise Answer(404, f'No such object: {bucket}/{key}')
        return o

    def listing(self, bucket, query):
        prefix, delimiter, found = query.get('prefix', ''), query.get('delimiter'), {}
        for key in self.keys(bucket):
            if not key.startswith(prefix): continue
            rest = key[len(prefix):]
            folder = prefix + rest.split(delimiter)[0] + delimiter if delimiter and delimiter in rest else None
            found[folder or key] = folder
        names, first = sorted(found), int(query.get('pageToken', 0))
        last = first + min(self.page, int(query.get('maxResults', self.page)))
        out = dict(kind='storage#objects', items=[self.about(bucket, n) for n in names[first:last] if not found[n]],
                   prefixes=[n for n in names[first:last] if found[n]])
        return {k: v for k, v in out.items() if v} | ({'nextPageToken': str(last)} if last < len(names) else {})

    def chunk(self, session, span, body, whole):
        "One part of a resumable upload; what of it is kept counts in whole units, and bytes that are there already are passed over."
        s = self.sessions[session]
        m = re.fullmatch(r'bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)', span or '')
        if not m: raise Answer(400, f'Invalid Content-Range: {span}')
        if s['done']: return 200, s['done']
        total = None if m[3] == '*' else int(m[3])
        if m[1]:
            a, b = int(m[1]), int(m[2])
            if a > len(s['data']): raise Answer(400, 'Invalid request: there is a hole before this chunk.')
            if whole and b - a + 1 != len(body) or total is not None and b >= total:
                raise Answer(400, 'Invalid request: Content-Range does not fit.')
            if whole and total != b + 1 and len(body) % UNIT: raise Answer(400, 'Invalid request: a chunk is a multiple of 256 KiB.')
            s['data'] += body[len(s['data']) - a:]
            if total is None or len(s['data']) < total: del s['data'][len(s['data']) // UNIT * UNIT:]
        if total == len(s['data']):
            s['done'] = self.put(s['bucket'], s['key'], s['data'], s['kind'])
            return 200, s['done']
        return 308, None


class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = 'HTTP/1.1', True

    def log_message(self, *args): pass

    def handle(self):
        try: super().handle()
        except OSError: pass      # the other side has gone

    def hang_up(self):
        "What a lost connection looks like from the other side."
        self.close_connection = True
        try:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError: pass

    def read(self, cut):
        "The body, as much of it as comes; 64 KiB at a time."
        left, out = int(self.headers.get('Content-Length', 0)), bytearray()
        while left and (cut is None or len(out) < cut):
            got = self.rfile.read(min(left, 1 << 16, left if cut is None else cut - len(out)))
            if not got: break
            time.sleep(self.gcs.seconds)
            out, left = out + got, left - len(got)
        return bytes(out), not left

    def answer(self, status, body=b'', headers={}, cut=None):
        if not isinstance(body, bytes): headers, body = {'Content-Type': 'application/json', **headers}, json.dumps(body).encode()
        self.send_response(status)
        for k, v in ({'Content-Length': len(body)} | headers).items(): self.send_header(k, str(v))
        self.end_headers()
        for i in range(0, len(body), 1 << 16):
            if cut is not None and i + (1 << 16) > cut:
                self.wfile.write(body[i:cut])
                self.wfile.flush()
                return self.hang_up()
            time.sleep(self.gcs.seconds)
            self.wfile.write(body[i:i + (1 << 16)])

    def error(self, status, message):
        self.answer(status, dict(error=dict(code=status, message=message, errors=[dict(message=message, domain='global', reason='fake')])))

    def do(self):
        gcs, line = self.gcs, f'{self.command} {self.path}'
        gcs.gate.wait()
        gcs.asked.append(line)
        cut = gcs.fault(line, 'after') if self.command != 'GET' else None
        body, whole = self.read(cut and cut['after'])
        try:
            if bad := gcs.fault(line, 'status'): raise Answer(bad['status'], 'a fault that the test asked for')
            if gcs.login and not self.headers.get('Authorization'):
                raise Answer(401, 'Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object.')
            with gcs.lock: status, out, headers = self.work(body, whole)
            if gcs.fault(line, 'lose') or not whole: return self.hang_up()
            cut = gcs.fault(line, 'after') if self.command == 'GET' else None
            self.answer(status, out, headers, cut and cut['after'])
        except Answer as e: self.error(e.status, e.message) if whole else self.hang_up()
        except OSError: self.close_connection = True      # the other side has gone

    do_GET = do_POST = do_PUT = do_DELETE = do

    def work(self, body, whole):
        "(status, answer, headers) of a request; `whole` says whether all of its body came."
        url, gcs = urlsplit(self.path), self.gcs
        query = dict(parse_qsl(url.query))
        if m := re.fullmatch(r'/upload/storage/v1/b/([^/]+)/o', url.path): return self.upload(unquote(m[1]), query, body, whole)
        if not whole: raise Answer(400, 'torn')
        if m := re.fullmatch(r'(/download)?/storage/v1/b/([^/]+)/o/([^/]+)', url.path):
            bucket, key = unquote(m[2]), unquote(m[3])
            o = gcs.object(bucket, key, query)
            if self.command == 'DELETE':
                del gcs.buckets[bucket][key]
                return 204, b'', {}
            return self.media(o) if m[1] or query.get('alt') == 'media' else (200, gcs.about(bucket, key), {})
        if m := re.fullmatch(r'/storage/v1/b/([^/]+)(/o)?', url.path):
            bucket = unquote(m[1])
            gcs.bucket(bucket)
            return 200, gcs.listing(bucket, query) if m[2] else dict(kind='storage#bucket', id=bucket, name=bucket), {}
        raise Answer(404, f'Not Found: {self.path}')

    def media(self, o):
        data, n = o['data'], len(o['data'])
        headers = {'Content-Type': o['kind'], 'X-Goog-Generation': o['generation']}
        if not (span := self.headers.get('Range')): return 200, data, headers
        m = re.fullmatch(r'bytes=(\d+)-(\d*)', span)
        if not m or int(m[1]) >= n: raise Answer(416, 'Requested range not satisfiable')
        a, b = int(m[1]), min(int(m[2] or n), n - 1)
        return 206, data[a:b + 1], headers | {'Content-Range': f'bytes {a}-{b}/{n}'}

    def upload(self, bucket, query, body, whole):
        gcs, held = self.gcs, self.gcs.bucket(bucket)
        if session := query.get('upload_id'):
            if session not in gcs.sessions: raise Answer(404, 'Not Found: no such upload')
            if self.command == 'DELETE':
                del gcs.sessions[session]
                return 499, b'', {}
            status, out = gcs.chunk(session, self.headers.get('Content-Range'), body, whole)
            if status == 200: return 200, out, {}
            kept = len(gcs.sessions[session]['data'])
            return 308, b'', {'Range': f'bytes=0-{kept - 1}'} if kept else {}
        if not whole: raise Answer(400, 'torn')
        def free(key):
            if query.get('ifGenerationMatch') == '0' and key in held: raise Answer(412, 'A pre-condition did not hold.')
            return key
        if query.get('uploadType') == 'resumable':
            key, session = free(query.get('name') or json.loads(body)['name']), hashlib.sha1(os.urandom(8)).hexdigest()
            gcs.sessions[session] = dict(bucket=bucket, key=key, kind=self.headers.get('X-Upload-Content-Type'), data=bytearray(), done=None)
            here = f'{gcs.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable'
            return 200, b'', {'Location': f'{here}&name={quote(key, "")}&upload_id={session}'}
        if query.get('uploadType') != 'multipart': raise Answer(400, 'Invalid request: uploadType')
        mark = b'--' + re.search(r'boundary="?([^";]+)', self.headers['Content-Type'])[1].encode()
        head, rest = body.split(mark, 2)[1:]
        about = json.loads(re.split(rb'\r?\n\r?\n', head, maxsplit=1)[1])
        kind, data = re.split(rb'\r?\n\r?\n', rest[:rest.rindex(mark)], maxsplit=1)
        data = data[:-2] if data.endswith(b'\r\n') else data[:-1]
        return 200, gcs.put(bucket, free(about['name']), data, re.search(rb'Content-Type: *([^\r\n]+)', kind)[1].decode()), {}


def fake_package(folder, name, version, code=None, requires=()):
    "An installed package, as far as Python can tell: its metadata, and a module that runs `code` unless that is None."
    info = folder/f'{name}-{version}.dist-info'
    info.mkdir(parents=True)
    lines = ['Metadata-Version: 2.1', f'Name: {name}', f'Version: {version}', *(f'Requires-Dist: {r}' for r in requires)]
    (info/'METADATA').write_text('\n'.join(lines) + '\n')
    if code is None: return
    (folder/name).mkdir()
    (folder/name/'__init__.py').write_text(code)
