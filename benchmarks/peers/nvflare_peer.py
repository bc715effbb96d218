"""NVFlare's collab interface in its simulator, which runs a server and a client as processes.

The driver's process only starts it; the server connects to the harness.
"""

from __future__ import annotations

import tempfile

from nvflare.collab import CollabRecipe
from nvflare.recipe import SimEnv

from benchmarks.peers.driving import task
from benchmarks.peers.nvflare_sides import Ends, Trunk


def main() -> None:
    given = task()
    host, port = given.control
    paths = str(given.model), str(given.adapter)
    recipe = CollabRecipe(
        "step",
        server=Ends(*paths, host, port, given.threads),
        client=Trunk(*paths, given.threads),
    )
    with tempfile.TemporaryDirectory() as workspace:
        recipe.execute(SimEnv(num_clients=1, workspace_root=workspace))


if __name__ == "__main__":
    main()
