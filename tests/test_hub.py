"A model goes to the hub and comes back: huggingface_hub's own client, a hub of our own on this machine."
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file

from forks import warm
from saxgpt.config import RunConfig, parse
from saxgpt.model.decoding import generate_codes
from saxgpt.pretrained import load_model
from saxgpt.training.checkpoint import save_checkpoint


class FakeHub:
    "The part of the Hugging Face hub's protocol that pushes and loads a model; a repository is a list of commits here."
    def __init__(self, token):
        self.token, self.repos, self.lfs, self.asked = token, {}, {}, []    # repos: name -> [(sha, {path: bytes})]
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def log_message(self, *args): pass

            def do(self):
                body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
                path = unquote(urlsplit(self.path).path)
                status, headers, out = hub.answer(self.command, path, self.headers, body)
                hub.asked.append((self.command, path, status, self.headers.get('Authorization')))
                out = out if isinstance(out, bytes) else json.dumps(out).encode()
                self.send_response(status)
                for k, v in ({'Content-Length': len(out)} | headers).items(): self.send_header(k, str(v))
                self.end_headers()
                if self.command != 'HEAD': self.wfile.write(out)

            do_GET = do_HEAD = do_POST = do_PUT = do

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url, self.elsewhere = (f'http://{host}:{self.server.server_port}' for host in ('127.0.0.1', 'localhost'))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, name, **changed):
        "Add a commit; its hash."
        commits = self.repos.setdefault(name, [])
        files = (commits[-1][1] if commits else {}) | changed
        sha = hashlib.sha1(repr((len(commits), files)).encode()).hexdigest()
        commits.append((sha, files))
        self.lfs |= {hashlib.sha256(b).hexdigest(): b for b in changed.values()}
        return sha

    def files(self, name): return self.repos[name][-1][1]

    def answer(self, method, path, headers, body):
        "Status, headers and body of the answer."
        def no(status, code=''): return status, {'X-Error-Code': code, 'X-Error-Message': code}, {'error': code}
        if method == 'POST' and headers['Authorization'] != f'Bearer {self.token}': return no(401)
        if path.startswith('/lfs/'):                    # on another host, which must not see the token
            if method == 'PUT': self.lfs[path[5:]] = body
            return 200, {}, b'' if method == 'PUT' else self.lfs[path[5:]]
        if path == '/api/validate-yaml': return 200, {}, {'errors': [], 'warnings': []}
        if path == '/api/repos/create':
            name = '{organization}/{name}'.format(**json.loads(body))
            there = name in self.repos
            if not there: self.commit(name, **{'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'})
            return 409 if there else 200, {}, {'url': f'{self.url}/{name}'}
        name, what, rest = re.fullmatch(r'/(?:api/models/)?([^/]+/[^/]+?)(?:/|\.git/|$)([^/]*)/?(.*)', path).groups()
        if name not in self.repos: return no(404, 'RepoNotFound')
        if what == 'preupload':
            return 200, {}, {'files': [dict(path=f['path'], shouldIgnore=False, uploadMode='lfs' if f['path'].endswith('.safetensors') else 'regular')
                                       for f in json.loads(body)['files']]}
        if what == 'info':
            return 200, {}, {'transfer': 'basic', 'objects': [o | {'actions': {'upload': {'href': f'{self.elsewhere}/lfs/{o["oid"]}'}}}
                                                             for o in json.loads(body)['objects']]}
        if what == 'commit':
            lines = [json.loads(line) for line in body.splitlines()]
            changed = {v['path']: self.lfs[v['oid']] if kind == 'lfsFile' else base64.b64decode(v['content'])
                       for kind, v in ((line['key'], line['value']) for line in lines) if kind != 'header'}
            sha = self.commit(name, **changed)
            return 200, {}, {'commitUrl': f'{self.url}/{name}/commit/{sha}', 'commitOid': sha}

        wanted, _, file = rest.partition('/')
        found = [c for c in self.repos[name] if wanted in ('', 'main', c[0])]
        if not found: return no(404, 'RevisionNotFound')
        sha, files = found[-1]
        if what in ('', 'revision'): return 200, {}, dict(id=name, sha=sha, siblings=[{'rfilename': p} for p in files])
        if what == 'tree':
            return 200, {}, [dict(type='file', path=p, size=len(b), oid=hashlib.sha1(b).hexdigest()) |
                             ({'lfs': dict(oid=hashlib.sha256(b).hexdigest(), size=len(b), pointerSize=134)} if p.endswith('.safetensors') else {})
                             for p, b in files.items()]
        assert what == 'resolve', path
        if file not in files: return no(404, 'EntryNotFound')
        about, oid = {'X-Repo-Commit': sha}, hashlib.sha256(files[file]).hexdigest()
        if not file.endswith('.safetensors'): return 200, about | {'ETag': f'"{hashlib.sha1(files[file]).hexdigest()}"'}, files[file]
        return 302, about | {'X-Linked-ETag': f'"{oid}"', 'X-Linked-Size': len(files[file]), 'Location': f'{self.elsewhere}/lfs/{oid}'}, b''


@pytest.fixture(scope='module')
def hub():
    hub = FakeHub('hf_fake')
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(scope='module')
def python(hub, tmp_path_factory):
    "Run Python as somebody who is at home at the hub."
    home = tmp_path_factory.mktemp('home')
    env = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    env |= dict(OMP_NUM_THREADS='1', NO_PROXY='127.0.0.1,localhost', HF_ENDPOINT=hub.url, HF_TOKEN='hf_fake', HF_HOME=str(home),
                HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_PROGRESS_BARS='1')
    env |= warm('saxgpt.pretrained', 'saxgpt.model.decoding', 'torch._dynamo')        # which read nothing of this
    def python(*args): return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=env, timeout=600)
    return python


backing = torch.arange(4*60).reshape(1, 4, 60)*37 % 2048

push = '''
import sys
from saxgpt.pretrained import load_model
load_model(sys.argv[1])[0].push_to_hub('somebody/sax')
'''

load = '''
import json, sys, torch
from safetensors.torch import save_file
from saxgpt.model.decoding import generate_codes
from saxgpt.model.transformer import SaxGPT
from saxgpt.pretrained import load_model
name = 'hf://somebody/sax'
models = [SaxGPT.from_pretrained('somebody/sax'), load_model(name)[0], load_model(name, local_files_only=True)[0], load_model(name, revision=sys.argv[3])[0]]
for i, m in enumerate(models):
    codes = generate_codes(m, torch.tensor(json.loads(sys.argv[2])), [0], temperature=0)
    save_file({'codes': codes} | {f'model.{k}': v.contiguous() for k, v in m.state_dict().items()}, f'{sys.argv[1]}/{i}.safetensors')
print(json.dumps([m.about['source'] for m in models]))
'''


@pytest.fixture(scope='module')
def pushed(hub, python, tmp_path_factory):
    "A model that says more than half precision can, which somebody has pushed."
    folder = tmp_path_factory.mktemp('model')/'model'
    model, about = load_model()
    for p in model.parameters(): p.data *= 1.01
    save_checkpoint(folder, model, parse(RunConfig, about['config']), about)
    r = python('-c', push, folder)
    assert r.returncode == 0, r.stderr
    return model.half().float()


def test_pushed_whole_with_the_token(hub, pushed):
    assert hub.files('somebody/sax').keys() == {'.gitattributes', 'README.md', 'config.json', 'hashes.json', 'model.safetensors'}
    tokens = {path: token for method, path, _, token in hub.asked if method == 'POST'}
    assert '/api/models/somebody/sax/commit/main' in tokens and set(tokens.values()) == {'Bearer hf_fake'}


def test_comes_back_as_it_went(hub, python, pushed, tmp_path):
    sha, codes = hub.repos['somebody/sax'][-1][0], generate_codes(pushed, backing, [0], temperature=0)
    r = python('-c', load, tmp_path, json.dumps(backing.tolist()), sha)
    assert r.returncode == 0, r.stderr
    for i, source in enumerate(json.loads(r.stdout)):
        got, want = load_file(tmp_path/f'{i}.safetensors'), {f'model.{k}': v for k, v in pushed.state_dict().items()} | {'codes': codes}
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
        assert source.startswith(('hf://somebody/sax, weights ', f'hf://somebody/sax@{sha}, weights ')[i == 3])
    assert all(status < 400 for _, path, status, _ in hub.asked if 'somebody/sax' in path)
    assert {token for _, path, _, token in hub.asked if path.startswith('/lfs/')} == {None}, 'the token went to another host'


times = []

def start_up(python):
    "Seconds that a process takes here to begin, on a busy machine as on an idle one."
    if not times:
        t0 = time.time()
        python('-c', 'import saxgpt.generate')
        times.append(time.time() - t0)
    return times[0]


def refused(python, out, name):
    "What `saxgpt.generate` says in one line, soon, of a model that cannot be used."
    t0 = time.time()
    r = python('-m', 'saxgpt.generate', 'demo', '-o', out, '--checkpoint', name)
    took, soon = time.time() - t0, 10 + 3*start_up(python)
    assert r.returncode == 2 and r.stderr.strip().count('\n') == 0 and took < soon and not out.exists(), r.stderr
    return r.stderr


def test_corrupted_is_one_line(hub, python, pushed, tmp_path):
    files = hub.files('somebody/sax')
    w = files['model.safetensors']
    hub.commit('somebody/torn', **files | {'model.safetensors': w[:-1] + bytes([w[-1] ^ 1])})
    assert 'model.safetensors is not what was saved' in refused(python, tmp_path/'x.wav', 'hf://somebody/torn')


def test_unknown_is_one_line(hub, python, tmp_path):
    assert 'hf://nobody/nothing: ' in refused(python, tmp_path/'x.wav', 'hf://nobody/nothing')
    assert 'hf://models/best' in refused(python, tmp_path/'x.wav', 'models/best')
    assert not any('models/best' in a[1] for a in hub.asked)
    assert ('GET', '/api/models/nobody/nothing', 404) in {a[:3] for a in hub.asked}
