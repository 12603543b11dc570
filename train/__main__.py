"""`python -m shoestring.train RECIPE.yaml key=value`, also under accelerate launch and torchrun."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
