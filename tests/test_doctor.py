"The doctor, and the commands' own messages, in real processes where a package is broken on purpose."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fakes import fake_package
from saxgpt.ops.packages import installed

root = Path(__file__).resolve().parents[1]
torch, torchaudio = installed('torch'), installed('torchaudio').split('+')[0]
newer = '.'.join([*torchaudio.split('.')[:2], str(int(torchaudio.split('.')[2]) + 1)])     # torchaudio 2.11.1 beside torch 2.11.0
misfit = f'torchaudio {newer} does not fit torch {torch}'
remedy = f'pip install torchaudio=={torchaudio}'


def run(*args, first):
    "`python -m saxgpt.NAME ...` with the packages of a folder in front of all others."
    env = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONPATH=os.pathsep.join([str(first), str(root)]))
    r = subprocess.run([sys.executable, *map(str, args)], cwd=first, env=env, capture_output=True, text=True)
    assert 'Traceback' not in r.stdout + r.stderr, r.stderr
    return r


@pytest.fixture(scope='module')
def broken_torchaudio(tmp_path_factory):
    d = tmp_path_factory.mktemp('torchaudio')
    fake_package(d, 'torchaudio', newer, 'raise OSError("libtorchaudio.so: undefined symbol: torch_exception_get_what_without_backtrace")')
    return d


@pytest.fixture(scope='module')
def broken_torch(tmp_path_factory):
    d = tmp_path_factory.mktemp('torch')
    fake_package(d, 'torch', torch, 'raise OSError("libcudart.so.13: cannot open shared object file: No such file or directory")')
    return d


def test_broken_torchaudio_is_named_and_the_main_job_works(broken_torchaudio):
    r = run('-m', 'saxgpt.doctor', '--json', first=broken_torchaudio)
    assert r.returncode == 0 and not r.stderr, r.stdout + r.stderr
    found = json.loads(r.stdout)
    checks = {c['name']: c for c in found['checks']}
    assert found['works'] and all(checks[k]['state'] == 'ok' for k in ('codec', 'model', 'solo', 'Demucs'))
    for name in ('packages', 'EnCodec'):
        assert checks[name]['state'] == 'broken' and misfit in checks[name]['says'] and remedy in checks[name]['says']
    assert checks['hub']['state'] == 'absent' and 'offline' in checks['hub']['says']


def test_a_command_that_needs_encodec_says_so_in_one_line(broken_torchaudio):
    r = run('-m', 'saxgpt.generate', 'demo', '--codec', 'encodec', '-o', broken_torchaudio/'solo.wav', first=broken_torchaudio)
    line = f'saxgpt: EnCodec cannot be imported: {misfit}; {remedy}, or use the bundled codec (saxgpt doctor tells more)\n'
    assert (r.returncode, r.stderr) == (2, line)
    assert not (broken_torchaudio/'solo.wav').exists()


def test_broken_torch_is_named_and_the_main_job_does_not_work(broken_torch):
    r = run('-m', 'saxgpt.doctor', first=broken_torch)
    lines = r.stdout.splitlines()
    assert r.returncode == 1 and not r.stderr, r.stdout + r.stderr
    states = {l[7:].split('  ')[0]: (l.split()[0], l) for l in lines[:-1]}
    for name in ('codec', 'model', 'solo'):
        assert states[name][0] == 'BROKEN' and 'torch cannot be imported: libcudart.so.13' in states[name][1]
        assert f'pip install --force-reinstall --no-deps torch=={torch}' in states[name][1]
    assert all(states[name][0] == 'ok' for name in ('python', 'packages', 'caches')) and 'does not work here' in lines[-1]


@pytest.mark.parametrize('args', [('generate', 'demo'), ('train', '--config', 'xsmall')], ids=lambda a: a[0])
def test_a_command_beside_a_broken_torch_is_one_line(broken_torch, args):
    r = run('-c', 'from saxgpt.cli import main; main()', *args, first=broken_torch)
    assert r.returncode == 2 and r.stderr.count('\n') == 1, r.stderr
    assert r.stderr.startswith('saxgpt: torch cannot be imported: libcudart.so.13') and 'saxgpt doctor' in r.stderr
