__version__ = "0.1.0"

import os, sys

def _look_elsewhere_first():
    "`python -m` looks for modules in the working directory first. There may lie anything, even a pickle.py: it comes last."
    try: here = os.getcwd()
    except OSError: return                               # it is gone
    if sys.argv[:1] == ['-m'] and sys.path and sys.path[0] and os.path.realpath(sys.path[0]) == here: sys.path.append(sys.path.pop(0))

_look_elsewhere_first()

import signal

# `python -m saxgpt.NAME` loads for a second or two; a Ctrl-C in that time ends it without a traceback. `saxgpt.config.command` listens again.
if sys.argv[:1] == ['-m'] and signal.getsignal(signal.SIGINT) is signal.default_int_handler: signal.signal(signal.SIGINT, signal.SIG_DFL)

from .ops.packages import lend_caches

lend_caches()

# `python -m saxgpt.NAME --help` imports no more than its help needs, see nbs/15_cli.ipynb.
if (sys.argv[:1] == ['-m'] and {'-h', '--help'} & {*sys.argv}
        and sys.orig_argv[-len(sys.argv)].startswith('saxgpt.')
        and sys.orig_argv[-len(sys.argv)] != 'saxgpt.cli'):
    from saxgpt.cli import mock_imports
    mock_imports(sys.argv[1:])
