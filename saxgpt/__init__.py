__version__ = "0.1.0"

import signal, sys
from .packages import lend_caches

lend_caches()

# `python -m saxgpt.NAME` loads for a second or two; a Ctrl-C in that time ends it without a traceback. `saxgpt.config.command` listens again.
if sys.argv[:1] == ['-m'] and signal.getsignal(signal.SIGINT) is signal.default_int_handler: signal.signal(signal.SIGINT, signal.SIG_DFL)

# `python -m saxgpt.NAME --help` imports no more than its help needs, see nbs/15_cli.ipynb.
if (sys.argv[:1] == ['-m'] and {'-h', '--help'} & {*sys.argv}
        and sys.orig_argv[-len(sys.argv)].startswith('saxgpt.')):
    from saxgpt.cli import mock_imports
    mock_imports(sys.argv[1:])
