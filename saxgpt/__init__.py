__version__ = "0.1.0"

import signal, sys

# `python -m saxgpt.NAME` loads for a second or two; a Ctrl-C in that time ends it without a traceback. `saxgpt.config.command` listens again.
if sys.argv[:1] == ['-m'] and signal.getsignal(signal.SIGINT) is signal.default_int_handler: signal.signal(signal.SIGINT, signal.SIG_DFL)
