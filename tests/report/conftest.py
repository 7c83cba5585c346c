"""Lets tests import what several of them use."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
