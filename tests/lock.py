"""Write requirements.lock: exact versions and hashes of everything that settings.ini asks for.

python tests/lock.py            # settings.ini has changed: keep the versions that still satisfy it
python tests/lock.py --upgrade  # the newest versions of everything that its ranges allow
"""
import json
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]
LOCK = root/'requirements.lock'
PLATFORMS = [('linux', 'x86_64'), ('linux', 'aarch64'), ('darwin', 'arm64')]
HEADER = '# Made by `make lock` from settings.ini; edit that. Complete: install it with --no-deps.\n'


def settings() -> dict:
    "The keys of settings.ini."
    parser = ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def locked_extras() -> list:
    "Names of the extras that the lock covers."
    return settings()['lock_extras'].split()


def pyproject() -> str:
    "What uv is to resolve, as the text of a pyproject.toml."
    cfg = settings()
    needed = cfg['requirements'].split()
    for extra in locked_extras():
        needed += cfg[f'{extra}_requirements'].split()
    where = [f"sys_platform == '{s}' and platform_machine == '{m}'" for s, m in PLATFORMS]
    project = {'name': cfg['lib_name'], 'version': cfg['version'], 'dependencies': needed}
    tool = {'environments': where, 'required-environments': where,
            'override-dependencies': cfg['lock_overrides'].split(),
            'exclude-dependencies': cfg['lock_excludes'].split()}
    tables = ('[project]', project), ('[tool.uv]', tool)
    return '\n'.join(line for name, table in tables
                     for line in (name, *(f'{k} = {json.dumps(v)}' for k, v in table.items())))


def main():
    try: from uv import find_uv_bin
    except ImportError: sys.exit('requirements.lock: uv is not installed; run make lock')
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'pyproject.toml').write_text(pyproject(), encoding='utf-8')
        out = Path(folder, LOCK.name)
        if LOCK.exists() and '--upgrade' not in sys.argv: out.write_bytes(LOCK.read_bytes())
        uv = [find_uv_bin(), 'pip', 'compile', 'pyproject.toml', '-o', out.name,
              '--universal', '--python-version', settings()['min_python'], '--no-python-downloads',
              '--generate-hashes', '--no-header', '--no-annotate', '--quiet']
        if subprocess.run(uv, cwd=folder).returncode:
            sys.exit('requirements.lock: settings.ini asks for what does not go together')
        LOCK.write_text(HEADER + out.read_text(encoding='utf-8'), encoding='utf-8')


if __name__ == '__main__': main()
