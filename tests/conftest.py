"How the tests are dealt out to processes, with `-n`, and how these begin and end."
import gc
import os

from forks import warm

# What the tests import, and what they start: once, by a server from which the processes of the tests are forked. Each of them has such a server of its own.
IMPORTED = ('pytest', 'nbdev.test', 'nbconvert', 'torch', 'torch._dynamo', 'torch.distributed.run', 'scipy.signal', 'librosa', 'matplotlib.pyplot',
            'IPython.display', 'av', 'demucs.api', 'gcsfs', 'mido', 'pydantic', 'soundfile', 'soxr')
for name in 'SAXGPT_WARM', 'SAXGPT_WARM_FAMILY': os.environ.pop(name, None)      # what the tests start is warm where it asks for it
# Notebooks that take longest. They begin first, so that at the end no process works at one of them while the others have nothing left.
SLOW = '08c 09_ 08_ 09b 08e 09c 08b 07c 08f 04b 01_ 03_ 04g 06_'.split()


def pytest_xdist_setupnodes(config, specs): os.environ.update(warm(*IMPORTED, family=True))


def pytest_collection_modifyitems(items): items.sort(key=lambda item: not any(f'notebook_runs[{name}' in item.nodeid for name in SLOW))


def pytest_xdist_make_scheduler(config, log):
    "The tests of a file share what it sets up and stay together; a notebook goes alone."
    from xdist.scheduler import LoadFileScheduling

    class Deal(LoadFileScheduling):
        def _split_scope(self, nodeid): return nodeid if 'test_notebooks.py' in nodeid else super()._split_scope(nodeid)
    return Deal(config, log)


def pytest_unconfigure():
    "Each IPython shell of test_house collects garbage when the process ends, among millions of objects: there is nothing left to find."
    gc.freeze()
