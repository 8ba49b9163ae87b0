"""For the tests that need Lightning, Accelerate and Ray: `make test-integrations` runs them, `make test` does not."""

from __future__ import annotations

import sys
from pathlib import Path

# Where servers.py is.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
