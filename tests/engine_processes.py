"""One of several processes that train the same recipes: started by test_engine_processes, not a test itself.

    python engine_processes.py FOLDER

For each FOLDER/NAME/recipe.yaml: one run to the end, and one that is left half-way and gone on with.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from shoestring.train import deepspeed_config
from shoestring.train.run import train_recipe


def main(folder: Path) -> None:
    deepspeed_config.PERSISTENT = 0  # small weights are cut too
    for recipe in sorted(folder.glob("*/recipe.yaml")):
        whole, paused = (f"output_dir={recipe.parent / name}" for name in ("whole", "paused"))
        for where, pause_at in ((whole, None), (paused, 0.5), (paused, None)):
            code = train_recipe(
                str(recipe), (where,), fresh=False, started=time.monotonic(), pause_at=pause_at
            )
            assert code == 0, (recipe, where)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
