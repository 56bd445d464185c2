"Every notebook runs from its top to its end, in a process of its own."
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forks import warm

root = Path(__file__).resolve().parents[1]
notebooks = sorted(p for p in (root/'nbs').glob('*.ipynb') if p.name[0] != '_')
# What many notebooks import; a notebook imports the rest, and the package itself, as its reader does.
IMPORTED = 'nbdev.test', 'torch', 'scipy.signal', 'librosa', 'matplotlib.pyplot', 'IPython.display'
STARTS_MORE = '07c_distributed', '07j_pretrained', '12n_backing'   # what these start has it imported, too
env = dict(os.environ, OMP_NUM_THREADS='1', PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')]))
# As `nbdev_test --path` does it; a cell that fails is shown with its traceback.
RUN = '''import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
ok, _ = test_nb(Path(sys.argv[1]), skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)
sys.exit(not ok)'''


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebook_runs(path):
    r = subprocess.run([sys.executable, '-c', RUN, path], cwd=root/'nbs', env=env | warm(*IMPORTED, family=path.stem in STARTS_MORE), capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr
