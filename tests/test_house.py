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
