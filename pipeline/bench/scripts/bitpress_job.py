"""bitpress's own part in a comparison with other programs. bench/programs.py lists the request's keys.

Options: "recipe", its keys and values.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path


def main() -> None:
    from safetensors.torch import load_file

    from bitpress.pipeline.config.load import load_recipe
    from bitpress.pipeline.data.calibration import Calibration
    from bitpress.pipeline.quantize.artifact import quantize
    from bitpress.pipeline.quantize.recipe import Recipe
    from bitpress.pipeline.storage import files
    from bitpress.pipeline.storage.checkpoint import Checkpoint
    from bitpress.pipeline.system.device import pick_device
    from bitpress.pipeline.system.versions import versions

    request = json.loads(Path(sys.argv[1]).read_text())
    start = time.perf_counter()
    recipe = Recipe.make(load_recipe(request["options"]["recipe"]))
    if recipe.calibrated:
        ids = load_file(request["tokens"])["ids"]
        device = str(pick_device("auto"))  # as the other programs, which take a GPU where there is one
        recipe = replace(recipe, calibration=Calibration("bench", ids, None), device=device)
    out = Path(request["output"])
    work = out.with_name(f"{out.name}.partial")
    files.make_folder(work)
    quantize(Checkpoint(Path(request["model"])), {"id": "bench", "revision": None}, recipe, out, work)
    seconds = time.perf_counter() - start
    used = {name: version for name, version in versions().items() if name in ("bitpress", "torch", "transformers")}
    files.write_json(Path(request["answer"]), {"seconds": seconds, "versions": used})


if __name__ == "__main__":
    main()
