"""One of several processes that train the same recipes: started by test_engine_processes, not a test itself.

    python engine_processes.py FOLDER NAME ...

For each FOLDER/*/recipe.yaml one run to the end; for those named also one that is left half-way and gone on
with.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shoestring.train import deepspeed_config
from shoestring.train.run import train_recipe


def main(folder: Path, paused: Sequence[str]) -> None:
    deepspeed_config.PERSISTENT = 0  # small weights are cut too
    for recipe in sorted(folder.glob("*/recipe.yaml")):
        starts: list[tuple[str, float | None]] = [("whole", None)]
        if recipe.parent.name in paused:
            starts += [("paused", 0.5), ("paused", None)]
        for name, pause_at in starts:
            where = f"output_dir={recipe.parent / name}"
            started = time.monotonic()
            code = train_recipe(str(recipe), (where,), fresh=False, started=started, pause_at=pause_at)
            assert code == 0, (recipe, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
