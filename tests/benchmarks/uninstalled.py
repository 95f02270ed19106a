"""Imported before bitpress: makes `bitpress.kernels` this repository's where bitpress is not installed.

GPU machines of benchmarks often have torch and Triton, and little else.
"""

import importlib.util
import sys
import types
from pathlib import Path

if importlib.util.find_spec("bitpress") is None:
    package = types.ModuleType("bitpress")
    package.__path__ = [str(Path(__file__).parents[2])]
    sys.modules["bitpress"] = package
