"""Python processes without the seconds of importing, for tests that start many of them.

Where the environment of a new process has SAXGPT_WARM (see `warm`), the process does not begin with exec: a server that has imported
the modules named there forks it. Arguments, environment, folder, session and open files are those that it was to get, and it is a child
of the process that asked, so `subprocess.Popen`, signals and exit statuses are the real ones. The server's own child only forks the
wanted process and ends; an orphan goes to its nearest ancestor that collects orphans (PR_SET_CHILD_SUBREAPER), which is the one that asked.
"""
import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import resource
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
import weakref
from contextlib import contextmanager
from fcntl import F_DUPFD_CLOEXEC, fcntl
from pathlib import Path

import _posixsubprocess

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
NUMBERS = struct.Struct('ii')
prctl = getattr(ctypes.CDLL(None), 'prctl', None)     # of Linux
exec_python, lock = _posixsubprocess.fork_exec, threading.Lock()
server, strays = None, []                      # the socket to this process's server; servers of its children, which end by themselves


def warm(*modules, family=False):
    "Environment variables of a process that has these modules imported; with `family`, so have the Python processes that it starts."
    if sys.platform != 'linux': return {}
    return dict(SAXGPT_WARM=' '.join(modules)) | (dict(SAXGPT_WARM_FAMILY='1') if family else {})


@contextmanager
def another_server():
    "Here warm processes come from a server that starts in the environment of now, and ends."
    global server
    before, server = server, None
    try: yield
    finally:
        if server: server.close()
        server = before


def first(call):
    "Environment variables of a warm process that begins, as those that it starts do, with this call of a function below."
    return dict(SAXGPT_FIRST=call)


def limit_files(n):
    "No file of this process grows beyond `n` bytes."
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


def forget_rights():
    "Root minds the permissions of files like everybody else."
    libc, head, sets = ctypes.CDLL(None), (ctypes.c_uint32*2)(0x20080522), (ctypes.c_uint32*6)()
    assert libc.capget(head, sets) == 0
    sets[0] &= ~2                                                          # CAP_DAC_OVERRIDE, of those in effect
    assert libc.capset(head, sets) == 0


# the process that asks

def fork_exec(args, executables, close_fds, pass_fds, cwd, env, *more):
    "Takes the place of `_posixsubprocess.fork_exec`, by which `subprocess` and multiprocessing's `spawn` start processes."
    variables = {os.fsdecode(k): os.fsdecode(v) for k, v in (os.environb.items() if env is None else (e.split(b'=', 1) for e in env))}
    words = [os.fsdecode(a) for a in args]
    while words[1:2] in (['-u'], ['-B'], ['-W']):
        option = words.pop(1)
        if option == '-u': variables['PYTHONUNBUFFERED'] = '1'
        if option == '-W': variables['PYTHONWARNINGS'] = words.pop(1)
    if 'SAXGPT_WARM' not in variables or words[0] != sys.executable or words[1] not in ('-m', '-c') or any(map(callable, more)):
        return exec_python(args, executables, close_fds, pass_fds, cwd, env, *more)
    std = [fd if fd != -1 else n for n, fd in enumerate((more[0], more[3], more[5]))]
    others = [fd for fd in pass_fds if fd not in more[6:8]]                # without the pipe that would tell of a failed exec
    ask = dict(args=words[1:], cwd=os.fspath(cwd or os.getcwd()), env=variables, fds=[0, 1, 2, *others], session=bool(more[9]), group=os.getpgrp())
    with lock: return _ask(ask, [*std, *others])


def _ask(ask, fds):
    if server is None: _begin()
    message = json.dumps(ask).encode()
    socket.send_fds(server, [struct.pack('i', len(message))], fds)
    server.sendall(message)
    answer = server.recv(NUMBERS.size, socket.MSG_WAITALL)
    assert len(answer) == NUMBERS.size, 'the server of warm processes has ended; what it said is above'
    pid, its_server = NUMBERS.unpack(answer)
    strays[:] = [s for s in [*strays, its_server] if s and not _reaped(s)]
    return pid


def _reaped(pid):
    try: return os.waitpid(pid, os.WNOHANG)[0]
    except ChildProcessError: return False                                 # its process is still there


def _begin():
    global server
    server, theirs = socket.socketpair()
    _collect_orphans()
    env = {k: v for k, v in os.environ.items() if not k.startswith('SAXGPT_WARM') and k not in ('MPLBACKEND', 'DISPLAY')}
    code = f'import sys; sys.path.append({str(Path(__file__).parent)!r}); import forks; forks.serve_at({theirs.fileno()})'
    # EAGER_IMPORT: with librosa all its parts, which it imports, and numba compiles, only when they are used: seconds for each process.
    # Their order is that of a set, so one hash seed in six meets a circle.
    p = subprocess.Popen([sys.executable, '-c', code], pass_fds=[theirs.fileno()], env=env | dict(OMP_NUM_THREADS='1', EAGER_IMPORT='1', PYTHONHASHSEED='0'), stdin=subprocess.DEVNULL)
    theirs.close()
    atexit.register(lambda ours: (ours.close(), p.wait()), server)


def _collect_orphans(): prctl(36, 1, 0, 0, 0)


# the server

def serve_at(fd): serve(socket.socket(fileno=fd))


def serve(here):
    "Fork what is asked for, until nobody is left to ask."
    for s in SIGNALS: signal.signal(s, signal.SIG_IGN)
    while True:
        size, fds, *_ = socket.recv_fds(here, 4, 64)
        if len(size) < 4: os._exit(0)
        ask = json.loads(here.recv(struct.unpack('i', size)[0], socket.MSG_WAITALL))
        for name in ask['env']['SAXGPT_WARM'].split(): importlib.import_module(name)
        if 'tqdm' in sys.modules: sys.modules['tqdm'].tqdm.set_lock(threading.RLock())      # its own begins one more process
        gc.collect()
        gc.freeze()                                                       # what is never looked at again stays shared
        for f in weakref.finalize._registry.values(): f.atexit = False    # the objects of the server outlive its forks
        middle = os.fork()
        if not middle:
            middle = os.getpid()
            if os.fork(): os._exit(0)
            try: _become(ask, fds, here, middle)
            finally: os._exit(1)
        for fd in fds: os.close(fd)
        os.waitpid(middle, 0)


# the process that was asked for

def _become(ask, fds, here, middle):
    while os.getppid() == middle: time.sleep(.0005)
    if ask['session']: os.setsid()
    else: os.setpgid(0, ask['group'])                                      # not sooner: a stopped group that loses a parent is sent SIGHUP
    high = [fcntl(fd, F_DUPFD_CLOEXEC, 300) for fd in (*fds, here.fileno())]
    for fd, to in zip(high, ask['fds']): os.dup2(fd, to)
    own = _own_server(ask) if ask['env'].pop('SAXGPT_WARM_FAMILY', None) else 0
    os.write(high[-1], NUMBERS.pack(os.getpid(), own))
    _close_all_but(*ask['fds'], *([server.fileno()] if own else []))
    _environment(ask, own)
    _leave(*_run(*ask['args']))


def _own_server(ask):
    "Fork a server for the children of this process."
    global server
    server, theirs = socket.socketpair()
    if pid := os.fork():
        _collect_orphans()
        return pid
    server.detach()                                                        # its number may be somebody else's by and by
    os.setpgid(0, 0)                                                       # signals to the process group are for others
    null = os.open(os.devnull, os.O_RDWR)
    for fd in 0, 1, 2: os.dup2(null, fd)
    _close_all_but(theirs.fileno())
    serve(theirs)


def _close_all_but(*fds):
    for fd in map(int, os.listdir('/proc/self/fd')):
        if fd > 2 and fd not in fds:
            try: os.close(fd)
            except OSError: pass


def _environment(ask, own):
    "What the interpreter takes from its surroundings when it starts."
    for s in SIGNALS: signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL)
    os.chdir(ask['cwd'])
    server_path = os.environ.get('PYTHONPATH', '').split(os.pathsep)
    os.environ.clear()
    os.environ.update({k: v for k, v in ask['env'].items() if k != 'SAXGPT_WARM'} | (warm(*ask['env']['SAXGPT_WARM'].split(), family=True) if own else {}))
    path = [p for p in os.environ.get('PYTHONPATH', '').split(os.pathsep) if p]
    sys.path[:] = [ask['cwd'] if ask['args'][0] == '-m' else '', *path, *(p for p in sys.path[1:] if p not in server_path)]
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = _text(1), _text(2, 'backslashreplace')
    tempfile.tempdir = None
    if name := os.environ.get('SAXGPT_RUN'): prctl(15, name.encode())      # by which kills.py finds the processes of a run
    if 'numpy' in sys.modules: sys.modules['numpy'].random.seed()
    if 'torch' in sys.modules: sys.modules['torch'].set_num_threads(int(os.environ.get('OMP_NUM_THREADS', os.cpu_count())))
    warnings._processoptions([w for w in os.environ.get('PYTHONWARNINGS', '').split(',') if w])
    eval(os.environ.get('SAXGPT_FIRST', 'None'))
    for p in path:
        if (Path(p)/'sitecustomize.py').exists(): runpy.run_path(str(Path(p)/'sitecustomize.py'))


def _text(fd, errors='strict'):
    now = bool(os.environ.get('PYTHONUNBUFFERED'))
    binary = open(fd, 'wb', buffering=0 if now else -1, closefd=False)
    return io.TextIOWrapper(binary, errors=errors, line_buffering=fd == 2 or os.isatty(fd), write_through=now)


def _run(kind, what, *args):
    "Be `python -m what ...` or `python -c what ...`; gives the exit status and the signal to end with."
    sys.argv = [kind, *args]
    commands = [n for n, m in sys.modules.items() if n.startswith('saxgpt.') and n.count('.') == 1 and hasattr(m, 'main')]
    for name in {*commands, what} & sys.modules.keys(): del sys.modules[name]
    try:
        if kind == '-m': runpy.run_module(what, run_name='__main__', alter_sys=True)
        else:
            sys.modules['__main__'] = main = types.ModuleType('__main__')
            exec(compile(what, '<string>', 'exec'), vars(main))
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int): return e.code or 0, None
        print(e.code, file=sys.stderr)
        return 1, None
    except BaseException as e:
        sys.excepthook(*sys.exc_info())
        return 1, signal.SIGINT if isinstance(e, KeyboardInterrupt) else None
    return 0, None


def _leave(status, by_signal):
    "What the interpreter does at its end."
    threading._shutdown()
    atexit._run_exitfuncs()
    try: sys.stdout.flush()
    except OSError: status = 120
    try: sys.stderr.flush()
    except OSError: pass
    if by_signal:
        signal.signal(by_signal, signal.SIG_DFL)
        os.kill(os.getpid(), by_signal)
    os._exit(status & 255)


_posixsubprocess.fork_exec = fork_exec
if hasattr(subprocess, '_fork_exec'): subprocess._fork_exec = fork_exec     # Python 3.11 and later
