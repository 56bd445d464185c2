"""Runs of the training command that are killed on purpose, and what is left of them; used by test_train.py and benchmarks/bench_kills.py.

Two ways to start a run: `start` is the plain command; a `Nursery` starts warm ones (forks.py), without the seconds that importing takes.
Both are processes of their own, in a session of their own, that get real signals.

What happens inside a run is said by its traps, a list of dicts (JSON in the environment variable SAXGPT_TRAPS):

    dict(at='Trainer.train_step', n=5, do='kill', signal=9)     at the n-th call; also do='sleep', 'raise', 'flood' (stderr), 'limit' (size of files)
    dict(at='Trainer.train_step', n=5, do='wait', gate=path)    until the file `gate` is there; `gate`.reached says that the run waits
    dict(op=17, under=folder)                                   SIGKILL at the 17th operation that changes files below a folder; a file that
                                                                is being written is left torn
    dict(trace=path, under=folder)                              write down these operations
    rank=1, attempt=0, whom='group' or 'parent', after=True     only there, only before torchrun's first restart, another target, behind the call
    then=.3                                                     seconds that pass before the run goes on
"""
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

from forks import warm

HERE = Path(__file__).resolve()
MODULES = {'Trainer': 'saxgpt.training.loop', 'Saver': 'saxgpt.training.resume', 'checkpoint': 'saxgpt.training.checkpoint'}


# inside the run: traps

def _where(path, dir_fd=-1):
    "An absolute path of what an operation touches"
    if isinstance(path, int): return os.readlink(f'/proc/self/fd/{path}')
    path = os.fsdecode(path)
    if not os.path.isabs(path): path = os.path.join(os.readlink(f'/proc/self/fd/{dir_fd}') if dir_fd not in (-1, None) else os.getcwd(), path)
    return path


def _mine(trap):
    return (trap.get('rank', int(os.environ.get('RANK', 0))) == int(os.environ.get('RANK', 0)) and
            trap.get('attempt', int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))) == int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)))


def _do(trap):
    what = trap.get('do', 'kill')
    if what == 'sleep': time.sleep(trap['seconds'])
    elif what == 'wait':
        Path(f'{trap["gate"]}.reached').touch()
        while not os.path.exists(trap['gate']): time.sleep(.01)
    elif what == 'raise': raise ValueError(trap['text'])
    elif what == 'flood':
        try:
            for _ in range(trap['lines']): print('#'*99, file=sys.stderr)
        except OSError: pass
    elif what == 'limit':
        cat = subprocess.Popen(['cat'], stdin=subprocess.PIPE, stdout=1)         # what is said must not fall under the limit
        for fd in (1, 2): os.dup2(cat.stdin.fileno(), fd)
        cat.stdin.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (trap['bytes'],)*2)
    elif trap.get('whom') == 'group': os.killpg(os.getpgrp(), trap['signal'])
    else: os.kill(os.getppid() if trap.get('whom') == 'parent' else os.getpid(), trap['signal'])
    time.sleep(trap.get('then', 0))


def _wrap(owner, name, traps):
    old, calls = getattr(owner, name), [0]

    def trapped(*args, **kw):
        calls[0] += 1
        now = [t for t in traps if _mine(t) and t.get('n', calls[0]) == calls[0]]
        for t in now:
            if not t.get('after'): _do(t)
        out = old(*args, **kw)
        for t in now:
            if t.get('after'): _do(t)
        return out
    setattr(owner, name, trapped)


def _watch_files(trap):
    "Count the operations that change files below a folder, and end the process at the chosen one"
    under, n, done = os.path.realpath(trap['under']) + os.sep, trap.get('op'), [0]

    def operation(kind, path, torn=None):
        try: path = _where(*path)
        except OSError: return
        if not (os.path.realpath(path) + os.sep).startswith(under): return
        done[0] += 1
        if 'trace' in trap:
            with open(trap['trace'], 'a') as f: f.write(json.dumps([kind, path.removeprefix(under)]) + '\n')
        if done[0] != n or not _mine(trap): return
        if torn: torn(path)
        os.kill(os.getpid(), signal.SIGKILL)

    def torn_open(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, b'{"step": 3, "spl')

    def hook(event, args):
        if event == 'open' and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not isinstance(args[0], int):
            operation('open', (args[0],), torn_open)
        elif event == 'os.mkdir' and os.path.isdir(args[0]): pass
        elif event in ('os.mkdir', 'os.remove', 'os.rmdir', 'os.truncate', 'os.chmod'):
            operation(event[3:], (args[0], args[-1] if len(args) > 1 and event != 'os.truncate' else -1))
        elif event in ('os.rename', 'os.link', 'os.symlink'): operation(event[3:], (args[1], args[-1]))
    sys.addaudithook(hook)
    import safetensors.torch
    fsync, serialize = os.fsync, safetensors.torch.serialize_file

    def trapped_fsync(fd):
        operation('fsync', (fd if isinstance(fd, int) else fd.fileno(),))
        return fsync(fd)

    def trapped_serialize(tensors, path, *args, **kw):
        def half(p):
            serialize(tensors, path, *args, **kw)
            os.truncate(p, os.path.getsize(p)//2)
        operation('serialize', (path,), half)
        return serialize(tensors, path, *args, **kw)
    os.fsync, safetensors.torch.serialize_file = trapped_fsync, trapped_serialize


def set_traps(traps):
    "Lay traps in modules that are there, and in others when they are imported"
    by_name = {}
    for t in traps:
        if 'under' in t: _watch_files(t)
        else: by_name.setdefault(t['at'], []).append(t)
    by_module = {}
    for at, ts in by_name.items(): by_module.setdefault(MODULES[at.split('.')[0]], []).append((at, ts))

    def lay(module):
        for at, ts in by_module.get(module.__name__, []):
            first, *_, name = at.split('.')
            _wrap(getattr(module, first) if hasattr(module, first) else module, name, ts)

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name not in by_module: return None
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            run_module = spec.loader.exec_module

            def exec_module(module): run_module(module); lay(module)
            spec.loader.exec_module = exec_module
            return spec
    for name in by_module:
        if name in sys.modules: lay(sys.modules[name])
    sys.meta_path.insert(0, Finder())


# outside: to start, to kill, to look at

PATIENCE = 300      # seconds after which something must be wrong, however busy the machine is


def busy():
    "How many times longer than on an idle machine work takes now: a bound in seconds is multiplied by it"
    wall, cpu = time.monotonic(), time.thread_time()
    while time.thread_time() - cpu < .1: pass
    return max(1, (time.monotonic() - wall)/.1)


ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1', CUDA_VISIBLE_DEVICES='')      # bits are promised on the CPU
for k in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'SAXGPT_TRAPS'): ENV.pop(k, None)


class Run:
    "A process (and whatever it starts) that is or was running"
    def __init__(self, popen, log, name): self.popen, self.pid, self.log, self.name = popen, popen.pid, Path(log), name

    @property
    def said(self): return self.log.read_text(errors='replace') if self.log.exists() else ''
    @property
    def lines(self): return [l for l in self.said.splitlines() if l.strip()]

    def poll(self): return self.popen.poll()

    def wait(self, timeout=PATIENCE):
        "The exit status; minus a signal's number for a process that a signal ended"
        try: return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f'still running after {timeout} s:\n{self.said[-3000:]}') from None

    def kill(self, sig=signal.SIGKILL, group=False):
        try: (os.killpg if group else os.kill)(self.pid, sig)
        except ProcessLookupError: pass

    def family(self):
        "Process ids of everything that this run has started and that is not dead: {pid: command line}"
        out = {}
        for p in Path('/proc').iterdir():
            if not p.name.isdigit(): continue
            try:
                name, _, state = (p/'stat').read_text().partition('(')[2].rpartition(')')
                state, _, _, session = state.split()[:4]
                ours = int(session) == self.pid or name == self.name[:15] or f'SAXGPT_RUN={self.name}'.encode() in (p/'environ').read_bytes().split(b'\0')
                if ours and state not in 'ZX': out[int(p.name)] = (p/'cmdline').read_bytes().replace(b'\0', b' ').decode(errors='replace')[:120]
            except (OSError, ValueError): pass
        return out

    def orphans(self, patience=10):
        "Who is left a few seconds after the end"
        end = time.monotonic() + patience
        while (left := self.family()) and time.monotonic() < end: time.sleep(.05)
        return left

    def wait_for(self, what, timeout=PATIENCE):
        "Wait until `what()` is true, which must be before the end of the run"
        end = time.monotonic() + timeout
        while not what():
            assert self.poll() is None, f'ended too early:\n{self.said}'
            assert time.monotonic() < end, f'waited {timeout} s in vain:\n{self.said}'
            time.sleep(.01)

    def at_gate(self, gate):
        "Wait until it has come to the trap that waits for the file `gate`"
        self.wait_for(Path(f'{gate}.reached').exists)

    def awake(self):
        "Wait until Python itself is up, and begins to import"
        while not Path(f'{self.log}.awake').exists() and self.poll() is None: time.sleep(.002)

    def end(self):
        for pid in self.family():
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        self.popen.wait()


WARM = warm('saxgpt.train', 'torch._dynamo')
WARM_LAUNCHER = warm('saxgpt.train', 'torch._dynamo', 'torch.distributed.launcher.api', 'torch.distributed.run', family=True)


class Nursery:
    "Starts warm runs, whose logs are in a folder of its own"
    def __init__(self): self.folder = Path(tempfile.mkdtemp(prefix='saxgpt-kills-'))

    def start(self, *args, traps=(), **env): return start(self.folder, *args, traps=traps, **WARM, **env)

    def ranks(self, n, *args, traps=()):
        "The same command in n processes that know of each other, without a launcher"
        port = free_port()
        meet = dict(WORLD_SIZE=n, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        return [self.start(*args, traps=traps, RANK=r, LOCAL_RANK=r, **meet) for r in range(n)]

    def close(self): shutil.rmtree(self.folder, ignore_errors=True)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _path(env, *folders): # so that forked and started processes import what the tests import
    import saxgpt
    return dict(env, PYTHONPATH=os.pathsep.join([*map(str, folders), str(Path(saxgpt.__file__).parents[1]), *filter(None, [env.get('PYTHONPATH')])]))


SITE = f'''import os, sys
if "SAXGPT_TRAPS" in os.environ and not any("resource_tracker" in a for a in sys.orig_argv):
    sys.path.append({str(HERE.parent)!r})
    import json, kills
    kills.set_traps(json.loads(os.environ["SAXGPT_TRAPS"]))
open(os.environ["SAXGPT_AWAKE"], "w").close()
'''


def start(folder, *args, traps=(), launcher=(), out=None, **env):
    "The plain command: `python -m saxgpt.train ...`, also behind `launcher`; what it says goes to a file, or to `out`"
    name, site = uuid.uuid4().hex, Path(folder)/'site'
    log = Path(folder)/f'{name}.log'
    site.mkdir(exist_ok=True)
    if not (site/'sitecustomize.py').exists(): (site/'sitecustomize.py').write_text(SITE)
    env = dict(_path(ENV, site), SAXGPT_RUN=name, SAXGPT_AWAKE=f'{log}.awake', **{k: str(v) for k, v in env.items()})
    if traps: env['SAXGPT_TRAPS'] = json.dumps(list(traps))
    def normal():                               # SIGINT is ignored where the tests run in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with open(log, 'w') as f:
        p = subprocess.Popen([sys.executable, *map(str, launcher), '-m', 'saxgpt.train', *map(str, args)], env=env, stdin=subprocess.DEVNULL,
                             stdout=out or f, stderr=out or f, start_new_session=True, preexec_fn=None if 'SAXGPT_WARM' in env else normal)
    return Run(p, log, name)


def torchrun(n, *more): return ('-m', 'torch.distributed.run', f'--nproc_per_node={n}', '--rdzv-backend=c10d', '--rdzv-endpoint=127.0.0.1:0', *more)


# data and configs

def toy_file(path, clips, seed, T=60):
    "Codes in which the solo can be known from the backing"
    import torch
    from saxgpt.ops.files import write_tensors
    g = torch.Generator().manual_seed(seed)
    backing = torch.randint(0, 16, (4, clips*T), generator=g)
    about = [dict(clip=f'c{i}', recording=f'r{seed}-{i}', augmentation='') for i in range(clips)]
    write_tensors(path, dict(backing=backing.short(), lead=((3*backing + 1) % 16).short(), offsets=torch.arange(clips+1)*T),
                  dict(codec_name='toy', codec_hash='0'*16, frame_rate='50', seq_len='20', stride='20', padding_idx='16', clips=json.dumps(about)))


def toy_data(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    toy_file(folder/'train.safetensors', 20, 0)
    toy_file(folder/'val.safetensors', 4, 1)
    return folder


VARIANTS = dict(                                                 # 24 steps of two batches, validation in mid-epoch and at its end
    plain=dict(),
    workers=dict(num_workers=2, log_interval=3),
    bf16=dict(precision='bf16', gradient_accumulation_steps=3, max_steps=14, log_interval=4,
              optimizer=dict(type='muon', lr=3e-3, embedding_lr=5e-3),
              scheduler=dict(type='plateau', warmup_steps=4)),
    single=dict(gradient_accumulation_steps=1, max_steps=20, plain=True, scheduler=dict(type='linear', warmup_steps=0)),
)


def config_file(data, out, name='config', model={}, **training):
    "A config of a tiny model; dropout, moving average, scheduled sampling and windows without a past are on unless `plain`. Gives the words behind the command"
    import yaml
    data, path = Path(data), Path(out).parent/f'{Path(out).name}-{name}.yaml'
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny = dict(vocab_size=17, padding_idx=16, d_model=32, nhead=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=64, max_seq_len=32,
                dropout=.1, condition_dropout=.2)
    run = dict(num_epochs=3, batch_size=4, gradient_accumulation_steps=2, output_dir=str(out), log_interval=1, save_interval=1, val_interval=5,
               num_workers=0, use_pbar=False, optimizer=dict(lr=3e-3), scheduler=dict(warmup_steps=6), precision='fp32')
    if training.pop('plain', False): run |= dict(ema_decay=0.)
    else: run |= dict(ema_decay=.9, scheduled_sampling=dict(rate=.6, start_step=2, ramp_steps=6), context_dropout=dict(start_rate=.6, end_rate=.2, hold_steps=2, ramp_steps=6, span_rate=.3))
    path.write_text(yaml.safe_dump(dict(data=dict(train_path=str(data/'train.safetensors'), val_path=str(data/'val.safetensors')), model=tiny | model,
                                        training=run | training)))
    return ['--config', path]


# results

CLOCKS = {'seconds', 'frames_per_s', 'data_wait', 'memory_gb', 'mfu', 'saved_at', 'lap', 'waited'}   # what may differ between two runs


def whole_checkpoints(out):
    "Steps of all checkpoint folders by name, each verified; raises for one that is not whole"
    from saxgpt.training.checkpoint import verify
    folder = Path(out)/'checkpoints'
    return {p.name: verify(p)['step'] for p in sorted(folder.iterdir()) if not p.name.startswith('.')} if folder.exists() else {}


def leftovers(out): return sorted(str(p.relative_to(out)) for p in Path(out).rglob('.*') if p.name != '.lock')


def log_lines(out):
    "The last line for each kind and step of the log"
    from saxgpt.ops.files import read_jsonl
    return {(l['split'], l['step']): {k: v for k, v in l.items() if k not in CLOCKS} for l in read_jsonl(Path(out)/'metrics.jsonl')
            if l['split'] in ('train', 'val')}


def loss_difference(a, b): return max((abs(a[k]['loss'] - b[k]['loss']) for k in a.keys() & b.keys()), default=0.)


def bits(folder):
    "Every tensor of a checkpoint as bytes, and the plain part of the trainer's state"
    from safetensors import safe_open
    out = {}
    for p in sorted(Path(folder).glob('*.safetensors')):
        with safe_open(str(p), 'pt') as f:
            for k in f.keys():
                t = f.get_tensor(k)
                out[f'{p.name}: {k}'] = (str(t.dtype), tuple(t.shape), t.reshape(-1).view(__import__('torch').uint8).numpy().tobytes())
    def clean(x):
        if isinstance(x, dict): return {k: [[a, clean(b)] for a, b in v if a not in CLOCKS] if k == 'pairs' else v for k, v in x.items()}
        return [clean(i) for i in x] if isinstance(x, list) else x
    state = Path(folder)/'trainer.json'
    if state.exists():
        plain = dict(clean(json.loads(state.read_text()))['pairs'])
        place = dict(plain['data']['pairs'])
        end = place['position'] >= place['n']                         # the end of a pass is the beginning of the next
        plain['data'] = place | dict(epoch=place['epoch'] + 1, position=0) if end else place
        out |= {f'trainer.json: {k}': v for k, v in plain.items()}
    return out


def differences(out, whole):
    "In what a finished run differs from one that was never stopped"
    a, b = log_lines(out), log_lines(whole)
    said = [f'log {k}: {a.get(k)} instead of {b.get(k)}' for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    steps, names = whole_checkpoints(out), whole_checkpoints(whole)
    for d in (steps, names): d.pop('previous', None)
    if steps != names: said.append(f'checkpoints {steps} instead of {names}')
    for name in names.keys() & steps.keys():
        x, y = (bits(Path(o)/'checkpoints'/name) for o in (out, whole))
        shown = lambda v: '' if isinstance(v, tuple) else f' {v}'
        said += [f'{name}: {k}{shown(x.get(k))} instead of{shown(y.get(k))}' for k in sorted(x.keys() | y.keys()) if x.get(k) != y.get(k)]
    said += [f'left over: {p}' for p in leftovers(out)]
    return said

