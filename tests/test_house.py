"The house: one notebook per module, imports point one way, outputs within budget, every command starts."
import ast
import builtins
import importlib
import json
import os
import re
import runpy
import subprocess
import symtable
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

from readme import readme
from saxgpt.cli import commands, rooms

root = Path(__file__).resolve().parents[1]
notebooks = sorted(p for p in (root/'nbs').glob('[0-9]*.ipynb'))
modules = sorted(p for p in (root/'saxgpt').rglob('*.py') if p.name not in ('__init__.py', '__main__.py', '_modidx.py'))

# Each room may import from the rooms before it; rooms of one line do not import one another unless listed in `inside`.
# A module is named by itself where it stands lower than the rest of its room.
layers = [
    {'ops.packages', 'ops.words'},
    {'config', 'ops', 'audio', 'patterns', 'sampling', 'metrics'},
    {'music', 'codecs', 'data.dataset'},
    {'codecs.load', 'demo', 'data', 'model'},
    {'training.checkpoint', 'training.run_sync'},
    {'pretrained', 'music.backing'},
    {'training', 'monitor'},
    {'train', 'generation'},
    {'takes'},
    {'takes.desk'},
    {'takes.session', 'generate'},
    {'evaluation', 'evaluate', 'evaluation.sweep', 'evaluation.worlds'},
    {'pipeline', 'vertex', 'studio', 'doctor', 'cli'},
]
inside = {('audio', 'ops'), ('data.download', 'data.recordings'), ('data.stems', 'data.separation'), ('ops.parallel', 'ops.files'), ('ops.sections', 'ops.files'), ('ops.decoding', 'ops.containers'), ('ops.remote', 'ops.files'), ('config', 'ops'), ('data', 'codecs.load'), ('demo', 'codecs.load'), ('demo', 'data'), ('music', 'music'), ('codecs', 'codecs'),
          ('model', 'model'), ('training', 'training'), ('training.run_sync', 'training.checkpoint'), ('evaluate', 'evaluation'), ('evaluation.page', 'evaluation.fit'), ('evaluation.report', 'evaluation.fit'), ('evaluation.report', 'evaluation.page'), ('evaluation.sweep', 'evaluate'),
          ('evaluation.sweep', 'evaluation.testset'), ('evaluation.testset', 'evaluation.fad'),
          ('evaluation.worlds', 'evaluate'), ('evaluation.worlds', 'evaluation')}


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']


def source(cell): return ''.join(cell['source'])


def default_exp(path):
    return [m[1] for c in cells(path) if c['cell_type'] == 'code' for m in [re.search(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M)] if m]


rank = {name: i for i, layer in enumerate(layers) for name in layer}


def place(module): return module if module in rank else module.split('.')[0]


def dotted(path): return '.'.join(path.relative_to(root/'saxgpt').with_suffix('').parts)


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
    there = {dotted(p) for p in modules}
    assert there == set(made), f'modules and notebooks differ: {there ^ set(made)}'


def test_nothing_else_at_the_top():
    allowed = set('nbs saxgpt tests settings.ini setup.py requirements.lock _quarto.yml README.md Makefile LICENSE CHANGELOG.md Dockerfile MANIFEST.in '
                  '.ci .github .gitignore .dockerignore .gitattributes CONTRIBUTING.md'.split())
    tracked = subprocess.run(['git', 'ls-files'], cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {f.split('/')[0] for f in tracked} <= allowed


@pytest.mark.parametrize('path', modules, ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    mine = place(dotted(path))
    assert mine in rank, f'{mine} has no place in the house'
    for other in imports(path):
        theirs = place(other)
        if theirs.startswith('_'): continue
        assert rank[theirs] < rank[mine] or (mine, theirs) in inside or (dotted(path), other) in inside, f'{path.name} imports saxgpt.{other}'
        if mine == 'data': assert theirs != 'data' or (dotted(path), other) in inside, f'stages meet through files: {path.name} imports {other}'


@pytest.mark.parametrize('path', modules, ids=dotted)
def test_every_name_is_defined(path):
    "A notebook's hidden imports may hide that the module lacks one."
    have = {*vars(importlib.import_module('saxgpt.' + dotted(path))), *dir(builtins)}

    def missing(table):
        for s in table.get_symbols():
            if s.is_referenced() and (s.is_global() or table.get_type() == 'module') and s.get_name() not in have:
                yield f'{table.get_name()}: {s.get_name()}'
        for child in table.get_children(): yield from missing(child)
    assert not [*missing(symtable.symtable(path.read_text(encoding='utf-8'), path.name, 'exec'))]


def test_nothing_is_imported_in_vain():
    "A name that a module imports is used there, or taken from there by another module."
    trees = {dotted(p): ast.parse(p.read_text(encoding='utf-8')) for p in modules}
    taken = set()
    for name, tree in trees.items():
        for n in ast.walk(tree):
            if not isinstance(n, ast.ImportFrom): continue
            base = ['saxgpt', *name.split('.')][:-n.level] if n.level else []
            taken |= {('.'.join([*base, *filter(None, [n.module])]), a.name) for a in n.names}
    idle = []
    for name, tree in trees.items():
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        made = {(a.asname or a.name).split('.')[0] for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        idle += [f'{name}: {m}' for m in sorted(made - used) if (f'saxgpt.{name}', m) not in taken]
    assert not idle, idle


def test_imports_form_no_circle():
    TopologicalSorter({dotted(p): {*imports(p)} - {dotted(p)} for p in modules}).prepare()


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


def course():
    "The notebooks that the index lists under `## The course`, in reading order."
    text = ''.join(map(source, cells(root/'nbs/index.ipynb'))).partition('## The course')[2].partition('\n## ')[0]
    return [root/'nbs'/name for name in dict.fromkeys(re.findall(r'\((\d\d\w?_\w+\.ipynb)\)', text))]


def test_the_course_is_an_afternoon():
    "Words and exported lines within budget; each notebook ends with exercises."
    words = lines = 0
    for path in course():
        for c in cells(path):
            if c['cell_type'] == 'markdown': words += len(source(c).split())
            elif re.match(r'#\|\s*export', source(c)): lines += sum(bool(l.strip()) for l in source(c).splitlines()[1:])
        headings = [source(c) for c in cells(path) if c['cell_type'] == 'markdown' and source(c).startswith('## ')]
        assert headings[-1].startswith('## Exercises') or headings[-2].startswith('## Exercises'), f'{path.name} has no exercises at its end'
    assert 12 <= len(course()) <= 16 and words <= 12_000 and lines <= 1_950, (len(course()), words, lines)


def test_the_course_comes_first_in_the_sidebar():
    listed = re.findall(r'(\S+\.ipynb)', (root/'nbs/sidebar.yml').read_text())
    assert listed[1:1 + len(course())] == [p.name for p in course()]


def test_a_public_name_stands_in_one_module():
    "Functions and classes; commands are all called `main`, and the data stages' `run`."
    made = {}
    for p in modules:
        for n in ast.parse(p.read_text(encoding='utf-8')).body:
            patched = getattr(n, 'decorator_list', ())[:1] and ast.unparse(n.decorator_list[0]).startswith('patch')
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != '_' and not patched:
                made.setdefault(n.name, []).append(dotted(p))
    assert not {k: v for k, v in made.items() if len(v) > 1 and k not in ('main', 'run')}


def test_every_notebook_is_in_the_sidebar():
    listed = re.findall(r'(\S+\.ipynb)', (root/'nbs/sidebar.yml').read_text())
    assert sorted(listed) == sorted(p.name for p in (root/'nbs').glob('*.ipynb'))


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


def test_readme_python_finds_what_it_imports():
    blocks = re.findall(r'```python\n(.*?)```', (root/'README.md').read_text(encoding='utf-8'), re.S)
    imports = [line for b in blocks for line in b.splitlines() if line.startswith(('import ', 'from '))]
    assert len(imports) > 4
    for line in imports: exec(line, {})


def test_readme_commands_exist():
    for name in re.findall(r'(?:python -m saxgpt\.|saxgpt )([a-z]+) ', (root/'README.md').read_text()):
        assert name in commands or name in ('training', 'pretrained'), name


def packages():
    "Everything that saxgpt imports, by the names of the packages."
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import): yield from (a.name.split('.')[0] for a in node.names)
            if isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]


@pytest.fixture(scope='module')
def nothing_installed(tmp_path_factory):
    "The environment of a process for which every package that takes time to import is broken."
    folder = tmp_path_factory.mktemp('broken')
    slow = {*packages()} - {'saxgpt', 'fastcore', *sys.stdlib_module_names}
    for name in slow: (folder/f'{name}.py').write_text('raise ImportError("help needs no package")')
    assert {'torch', 'numpy', 'librosa', 'matplotlib', 'pydantic'} <= slow
    path = [str(folder), *filter(None, [os.environ.get('PYTHONPATH')])]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(path), COLUMNS='100')


def help_of(name, monkeypatch, capsys):
    "The help that the command prints where its imports are real."
    monkeypatch.setenv('COLUMNS', '100')
    monkeypatch.setattr(sys, 'argv', [name, '--help'])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f'saxgpt.{rooms.get(name, name)}', run_name='__main__', alter_sys=True)
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.filterwarnings('ignore:.*found in sys.modules')
@pytest.mark.parametrize('name', commands)
def test_help_imports_nothing_slow(name, nothing_installed, monkeypatch, capsys):
    r = subprocess.run([sys.executable, '-m', f'saxgpt.{rooms.get(name, name)}', '--help'],
                       capture_output=True, text=True, env=nothing_installed)
    assert r.returncode == 0 and 'usage' in r.stdout, r.stderr
    assert r.stdout == help_of(name, monkeypatch, capsys)


@pytest.mark.parametrize('module', ['saxgpt', 'saxgpt.cli'])
def test_python_m_is_the_command(module, nothing_installed):
    def said(*words): return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=nothing_installed)
    for words in [['--help'], ['backing', '--help'], ['genrate'], []]:
        mine, command = said('-m', module, *words), said('-c', 'from saxgpt.cli import main; main()', *words)
        assert (mine.returncode, mine.stdout, mine.stderr) == (command.returncode, command.stdout, command.stderr)
        assert mine.stdout or mine.stderr


def test_a_solo_begins_without_slow_imports():
    "Up to the first sound of a solo, beside what torch itself imports."
    code = '''
import sys, torch
before = {*sys.modules}
from saxgpt.codecs.load import load_codec
from saxgpt.pretrained import load_model
from saxgpt.takes.backings import band_tuning, read_backing
import saxgpt.generate
from saxgpt.generation import stream
(model, about), x = load_model(), read_backing("demo", 2)[1]
next(stream(model, load_codec(about["codec_name"]), x, seconds=.1, tuning=30 + band_tuning(x, {})))
print(*{*sys.modules} - before)'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    slow = ('scipy matplotlib pyloudnorm numba librosa.core pandas sklearn IPython torchaudio '
            'encodec demucs transformers huggingface_hub av fsspec sympy '
            'torch._dynamo torch._inductor torch.distributed.elastic torch.onnx').split()
    loaded = {m for m in r.stdout.split() if any(m == s or m.startswith(f'{s}.') for s in slow)}
    assert 'saxgpt.generate' in r.stdout and not loaded, loaded


def test_console_script(nothing_installed):
    saxgpt = Path(sys.executable).with_name('saxgpt')
    assert 'generate' in subprocess.run([saxgpt], capture_output=True, text=True).stdout
    r = subprocess.run([saxgpt, 'evaluate', '--help'],
                       capture_output=True, text=True, env=nothing_installed)
    assert r.returncode == 0 and 'saxgpt evaluate' in r.stdout, r.stderr
    r = subprocess.run([saxgpt, 'train', '--config', 'no-such-config'], capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'no-such-config' in r.stderr, r.stderr
