"""How long tests wait for what comes for certain: only a hang takes as long, on any machine.

Nothing passes because this time is over, and nothing is said to be soon.
"""

from __future__ import annotations

PATIENCE_S = 300.0
"""For one thing: an answer, a file, the end of a process. A whole test has its `timeout`."""
