"How the tests are dealt out to processes, with `-n`, and how these end."
import gc


def pytest_xdist_make_scheduler(config, log):
    "The tests of a file share what it sets up and stay together; a notebook goes alone."
    from xdist.scheduler import LoadFileScheduling

    class Deal(LoadFileScheduling):
        def _split_scope(self, nodeid): return nodeid if 'test_notebooks.py' in nodeid else super()._split_scope(nodeid)
    return Deal(config, log)


def pytest_unconfigure():
    "Each IPython shell of test_house collects garbage when the process ends, among millions of objects: there is nothing left to find."
    gc.freeze()
