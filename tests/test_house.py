"The house: one notebook per module, imports point one way, outputs within budget, every command starts."
import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

from readme import readme
from saxgpt.cli import commands

root = Path(__file__).resolve().parents[1]
notebooks = sorted(p for p in (root/'nbs').glob('[0-9]*.ipynb'))
modules = sorted(p for p in (root/'saxgpt').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))

# Each room may import from the rooms before it; rooms of one line do not import one another unless listed in `inside`.
layers = [
    {'config', 'files', 'remote', 'audio', 'patterns', 'sampling', 'metrics', 'spectra'},
    {'music'},
    {'codec', 'demo', 'data', 'model'},
    {'training', 'monitor'},
    {'train', 'generate'},
    {'fit', 'fad', 'report', 'evaluate', 'sweep'},
    {'pipeline', 'vertex', 'studio', 'cli'},
]
inside = {('audio', 'files'), ('remote', 'files'), ('config', 'remote'), ('data', 'codec'), ('demo', 'codec'), ('demo', 'data'), ('music', 'music'),
          ('model', 'model'), ('training', 'training'), ('evaluate', 'fit'), ('evaluate', 'fad'), ('evaluate', 'report'), ('report', 'fit'), ('sweep', 'evaluate')}


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']


def source(cell): return ''.join(cell['source'])


def default_exp(path):
    return [m[1] for c in cells(path) if c['cell_type'] == 'code' for m in [re.search(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M)] if m]


def room(module): return module.split('.')[0]


def imports(path):
    "Modules of saxgpt that `path` imports, also inside functions, as dotted names below saxgpt."
    here = ('saxgpt', *path.relative_to(root/'saxgpt').with_suffix('').parts)
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            base = '.'.join(here[:-node.level]) + '.' if node.level else ''
            names = [base + (node.module or '')] if node.module else [base + a.name for a in node.names]
        elif isinstance(node, ast.Import): names = [a.name for a in node.names]
        else: continue
        yield from (n.removeprefix('saxgpt.') for n in names if n.startswith('saxgpt.'))


def test_one_notebook_makes_one_module():
    made = {}
    for p in notebooks:
        exp = default_exp(p)
        assert len(exp) == 1, f'{p.name} names {len(exp)} modules'
        assert exp[0] not in made, f'{p.name} and {made.get(exp[0])} both make {exp[0]}'
        made[exp[0]] = p.name
    there = {'.'.join(p.relative_to(root/'saxgpt').with_suffix('').parts) for p in modules}
    assert there == set(made), f'modules and notebooks differ: {there ^ set(made)}'


def test_nothing_else_at_the_top():
    allowed = set('nbs saxgpt tests settings.ini setup.py _quarto.yml README.md Makefile LICENSE CHANGELOG.md Dockerfile MANIFEST.in '
                  '.ci .github .gitignore .dockerignore .gitattributes'.split())
    tracked = subprocess.run(['git', 'ls-files'], cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {f.split('/')[0] for f in tracked} <= allowed


@pytest.mark.parametrize('path', modules, ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    rank = {name: i for i, layer in enumerate(layers) for name in layer}
    mine = path.relative_to(root/'saxgpt').with_suffix('').parts[0]
    assert mine in rank, f'{mine} has no place in the house'
    for other in imports(path):
        theirs = room(other)
        if theirs.startswith('_'): continue
        assert rank[theirs] < rank[mine] or (mine, theirs) in inside, f'{path.name} imports saxgpt.{other}'
        if path.parent.name == 'data': assert not other.startswith('data.'), f'stages meet through files: {path.name} imports {other}'


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebook_is_fit_to_read(path):
    assert path.stat().st_size <= 300_000, 'outputs over budget'
    first = source(cells(path)[0])
    assert re.match(r'# .+\n+> .+', first), 'a notebook begins with a title and a subtitle'
    for c in cells(path):
        if c['cell_type'] != 'code': continue
        for o in c['outputs']:
            assert o['output_type'] != 'error', 'a stored traceback'
            assert not re.search('Traceback|/(?:root|home|tmp)/|%\\|', ''.join(o.get('text', ''))), 'a stored traceback, path or progress bar'
        if re.match(r'#\|\s*export', source(c)): assert source(c).count('\n') < 60, f'a long cell: {source(c)[:80]}'
    ids = [c['id'] for c in cells(path)]
    assert len(ids) == len(set(ids))


def test_every_notebook_is_in_the_sidebar():
    listed = re.findall(r'(\S+\.ipynb)', (root/'nbs/sidebar.yml').read_text())
    assert sorted(listed) == sorted([p.name for p in notebooks] + ['index.ipynb'])


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_documentation_can_be_made(path):
    "What the site shows: exported cells run, and each public definition gets its entry."
    processor = NBProcessor(path, procs=FilterDefaults().procs())
    processor.process()
    shown = '\n'.join(source(c) + str(c.get('outputs', '')) for c in processor.nb.cells)
    module = importlib.import_module('saxgpt.' + default_exp(path)[0])
    missing = [n for n in module.__all__ if n.islower() and callable(getattr(module, n)) and n not in shown]
    assert not missing, missing


def test_quarto_config_is_one_file():
    assert (root/'nbs/_quarto.yml').is_symlink() and (root/'nbs/_quarto.yml').resolve() == root/'_quarto.yml'


def test_readme_is_made_from_the_index():
    assert (root/'README.md').read_text(encoding='utf-8') == readme()


def test_readme_commands_exist():
    for name in re.findall(r'(?:python -m saxgpt\.|saxgpt )([a-z]+) ', (root/'README.md').read_text()):
        assert name in commands or name == 'training', name


def test_importing_saxgpt_touches_no_audio_io_of_torchaudio():
    code = 'import sys, saxgpt.generate, saxgpt.audio; sys.exit("torchaudio" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize('name', commands)
def test_command_starts(name):
    r = subprocess.run([sys.executable, '-m', f'saxgpt.{name}', '--help'], capture_output=True, text=True)
    assert r.returncode == 0 and 'usage' in r.stdout, r.stderr


def test_console_script():
    saxgpt = Path(sys.executable).with_name('saxgpt')
    assert 'generate' in subprocess.run([saxgpt], capture_output=True, text=True).stdout
    r = subprocess.run([saxgpt, 'train', '--config', 'no-such-config'], capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'no-such-config' in r.stderr, r.stderr
