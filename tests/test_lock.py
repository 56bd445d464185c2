"The lock: it holds what settings.ini asks for, everything that this needs in turn, and the pairs that must match."
import re
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import distribution
from importlib.metadata import requires as needs

import pytest
from lock import LOCK, PLATFORMS, locked_extras, settings
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTHONS = '3.10.0 3.11.0 3.12.0 3.13.0'.split()
environments = [default_environment() | dict(
    python_version=p.rpartition('.')[0], python_full_version=p, sys_platform=s, platform_machine=m,
    platform_system={'linux': 'Linux', 'darwin': 'Darwin'}[s]) for p in PYTHONS for s, m in PLATFORMS]


def pins() -> dict:
    "The lock as name -> list of requirements `name==version; marker`."
    found = defaultdict(list)
    text = LOCK.read_text(encoding='utf-8')
    for line in re.sub(r'\\\n', ' ', text).splitlines():
        if line.startswith('#'): continue
        line, *hashes = line.split(' --hash=')
        assert hashes and all(re.fullmatch(r'sha256:[0-9a-f]{64} *', h) for h in hashes), f'{line}: no hashes'
        pin = Requirement(line.strip())
        assert re.fullmatch(r'==[\w.+!]+', str(pin.specifier)), f'{pin}: not one exact version'
        found[canonicalize_name(pin.name)].append(pin)
    return found


locked = pins()


def version(name: str, environment: dict) -> str:
    "The version that the lock gives a package there; empty where it gives none."
    there = [p for p in locked[canonicalize_name(name)] if not p.marker or p.marker.evaluate(environment)]
    assert len(there) < 2, f'{name} is locked twice for {environment}'
    return str(there[0].specifier)[2:] if there else ''


def requested() -> list:
    "The requirements of settings.ini that the lock covers."
    names = ['requirements', *(f'{e}_requirements' for e in locked_extras())]
    return [Requirement(r) for name in names for r in settings()[name].split()]


@pytest.mark.parametrize('environment', environments,
                         ids=lambda e: f"{e['python_version']}-{e['sys_platform']}-{e['platform_machine']}")
def test_the_lock_satisfies_the_settings(environment):
    overruled = [Requirement(r) for r in settings()['lock_overrides'].split()]
    for r in requested() + overruled:
        v = version(r.name, environment)
        assert v and r.specifier.contains(v, prereleases=True), \
            f'settings.ini asks for {r}, the lock has {v or "nothing"}: run make lock'


def test_nothing_is_missing_and_nothing_else_is_installed():
    "From saxgpt through the metadata of what is installed, package by package."
    here, excluded = default_environment(), settings()['lock_excludes'].split()
    todo, done = [(r, '') for r in requested()], set()
    while todo:
        r, by = todo.pop()
        name = canonicalize_name(r.name)
        if name in excluded or (r.marker and not any(r.marker.evaluate(here | {'extra': e}) for e in ('', *by))): continue
        if (name, frozenset(r.extras)) in done: continue
        done.add((name, frozenset(r.extras)))
        have, pinned = distribution(name).version, version(name, here)
        assert have.split('+')[0] == pinned, f'{name}: {have} is installed, the lock has {pinned or "nothing"}'
        todo += [(Requirement(n), r.extras) for n in needs(name) or ()]


def test_pairs_that_must_match_are_exact_and_import():
    exact = {r.name: r for r in requested() if str(r.specifier).startswith('==')}
    assert {'torch', 'torchaudio', 'torchvision', 'nbdev', 'fastcore', 'execnb', 'ghapi'} <= set(exact)
    assert exact['torch'].specifier == exact['torchaudio'].specifier
    code = ('import torch, torchaudio, encodec, demucs.api, nbdev.export, execnb.nbio, ghapi.core\n'    # torchvision: see test_evaluate
            'torchaudio.functional.lfilter(torch.ones(4), torch.ones(2), torch.ones(2))')
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
