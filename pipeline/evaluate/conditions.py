"""How a model is evaluated, and what its figures depend on."""

import json
from dataclasses import dataclass

from ..config.schema import Eval
from ..data.text import Text
from ..storage.fingerprint import Fingerprint
from ..system.device import pick_device
from ..system.machine import machine
from ..system.versions import releases, versions

_COMPUTE = ("bitpress", "torch", "transformers", "tokenizers")  # whose releases may change a perplexity


@dataclass(frozen=True)
class Conditions:
    """How a model is evaluated. text, text_sha256: the name and the hash of what settings.text leads to.

    command: what the user typed, for the report. redo: measure again what was measured before.
    """

    settings: Eval
    device: str
    text: str
    text_sha256: str
    command: str = ""
    redo: bool = False

    @staticmethod
    def make(settings: Eval, device: str, text: Text, command: str = "", redo: bool = False) -> "Conditions":
        return Conditions(settings, device, text.name, text.sha256, command, redo)

    def fingerprint(self, artifact: Fingerprint) -> Fingerprint:
        """Everything that figures depend on, by stage: "artifact.…" is of the files, "quality.…" and "speed.…" are of
        how these are measured.

        Quality is that of the files: the same on every CPU and by any number of threads. Speed, memory and the loss of
        the kernels are those of a machine.

        Args:
            artifact: what tells the files that are measured from others, the stage in front of each name.
        """
        settings = {
            key: json.dumps(value, sort_keys=True) for key, value in self.settings.model_dump(mode="json").items()
        }
        del settings["text"]  # its name; what it says is in its hash
        for key, default in (("bos", "auto"), ("task_fewshot", None), ("task_chat", False)):
            if getattr(self.settings, key) == default:  # figures from before there was a choice hold
                del settings[key]
        described, exact = machine(pick_device(self.device)), versions()
        speed = {"eval.speed": settings.pop("speed")}
        speed |= {f"machine.{key}": described[key] for key in ("cpu", "device", "threads")}
        speed |= {f"versions.{name}": exact[name] for name in ("bitpress", "torch")}
        quality = {f"eval.{key}": value for key, value in settings.items()}
        quality |= {"text.sha256": self.text_sha256, "device": self.device}
        quality |= {f"versions.{name}": value for name, value in releases().items() if name in _COMPUTE}
        by_stage = {"quality": quality, "speed": speed}
        return artifact | {f"{stage}.{key}": by_stage[stage][key] for stage in by_stage for key in by_stage[stage]}
