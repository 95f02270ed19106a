"""The model card of a published run: metadata that the Hub reads, then what one needs to know, in words and figures."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from bitpress.eval.report import report
from bitpress.eval.report.words import printable

from ..config.schema import Calibrate, Dataset, check_repo
from ..data.calibration import source_of
from ..evaluate import gates
from ..formats import registry as formats
from .bundle import Item
from .usage import unsupported_runtimes, usage_snippets
from .vocabulary import LICENCES, is_licence_file, languages, licence_slug

_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LICENCE_KEYS = ("license", "license_name", "license_link", "language")
_LONGEST = 200  # characters of a value that is carried over
_LONGEST_FRONT = 1 << 16  # characters in which a card's metadata is looked for


@dataclass(frozen=True)
class Origin:
    """The model that a run quantized, as far as it is known.

    id: its Hub id, or the name of a folder. carried: its own card's licence and languages. files: its licence's files.
    """

    id: str
    revision: str | None
    carried: dict[str, Any]
    files: list[str]

    @property
    def on_hub(self) -> bool:
        return self.revision is not None

    def metadata(self) -> dict[str, Any]:
        """The metadata that goes onto the card of the quantized model."""
        base = {"base_model": self.id, "base_model_relation": "quantized"} if self.on_hub else {}
        return base | self._licence_metadata() | self._language_metadata()

    def _licence_metadata(self) -> dict[str, Any]:
        """The licence in the Hub's words; one that the Hub does not list is "other", with its name."""
        named = self.carried.get("license")
        slugs = [licence_slug(name) for name in (named if isinstance(named, list) else [named] if named else [])]
        if not slugs and not self.files:
            return {}
        listed = bool(slugs) and LICENCES.issuperset(slugs)
        if listed and slugs != ["other"]:
            licence: dict[str, Any] = {"license": slugs if isinstance(named, list) else slugs[0]}
        else:
            own = "" if listed else "-".join(slugs)
            name = licence_slug(str(self.carried.get("license_name") or own))
            licence = {"license": "other", "license_name": name or "that-of-the-base-model"}
        link = str(self.carried.get("license_link") or "")
        if not (link.startswith(("https://", "http://")) or link in self.files):
            link = self.files[0] if self.files and licence["license"] == "other" else ""
        return licence | ({"license_link": link} if link else {})

    def _language_metadata(self) -> dict[str, Any]:
        named = self.carried.get("language") or []
        codes = languages(named if isinstance(named, list) else [named])
        return {"language": codes if isinstance(named, list) else codes[0]} if codes else {}

    def licence(self) -> str:
        """Sentences on the licence, for the card."""
        named = self.carried.get("license_name") or self.carried.get("license")
        listed = ", ".join(named) if isinstance(named, list) else named
        words = [f"That of {self.id}: {listed}." if named else f"That of {self.id}."]
        if self.files:
            words.append(f"Its text is in {', '.join(self.files)}.")
        if not named and not self.files:
            words.append("It came with none; ask whoever published it before you use or pass on this model.")
        return " ".join(words)


def origin_of(metrics: Mapping[str, Any], card: Path, names: Sequence[str]) -> Origin:
    """From the source's own card, where it came along, and the names of the files that go up."""
    model = metrics["model"]
    files = [name for name in names if is_licence_file(name)]
    return Origin(model["id"], model.get("revision"), _carried(card), files)


def _carried(path: Path) -> dict[str, Any]:
    """The licence and the languages that a card names; what is no short text is left out."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        front = _FRONT.search(file.read(_LONGEST_FRONT))
    if not front:
        return {}
    try:
        metadata = YAML(typ="safe").load(front[1])
    except (YAMLError, ValueError, RecursionError):  # it is the source's: a card that cannot be read says nothing
        return {}
    return {key: metadata[key] for key in _LICENCE_KEYS if isinstance(metadata, dict) and _plain(metadata.get(key))}


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= _LONGEST and all(isinstance(one, str) and _plain(one) for one in value)
    return isinstance(value, str) and 0 < len(value) <= _LONGEST and "\n" not in value


def write_card(
    repo: str,
    runs: Sequence[Mapping[str, Any]],
    origin: Origin,
    runtimes: Mapping[str, Any],
    files: Sequence[Item],
    figures: Mapping[str, str],
) -> str:
    """The text of README.md.

    Args:
        runs: the metrics of the run, after those of its baseline where there are any.
        runtimes: see runtimes.verdicts.
        files: what else goes up. figures: those of them that are pictures, with their captions.
    Raises:
        ValueError: `repo` is no name of a repository.
    """
    check_repo(repo)  # it stands in code
    runs = printable(runs)
    metrics = runs[-1]
    chat = any(item.name.startswith("chat_template.") for item in files)
    verdict = metrics["gates"] or {"judged": []}
    page = {
        "name": repo.split("/")[1],
        "what": _what(metrics, origin),
        "missed": gates.missed(verdict["judged"]),
        "snippets": [vars(snippet) for snippet in usage_snippets(repo, runtimes, chat)],
        "unsupported": unsupported_runtimes(runtimes),
        "figures": list(figures.items()),
        "provenance": _provenance(metrics, origin),
        "command": str(metrics["command"]),
        "config": json.dumps(metrics["config"], indent=2),
        "files": [(item.name, f"{item.size:,}", item.sha256) for item in files],
        "licence": origin.licence(),
    }
    data = ModelCardData(**printable(_metadata(repo, metrics, origin, runtimes)), eval_results=_results(metrics))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{report.card(runs, page)}"))


def _what(metrics: Mapping[str, Any], origin: Origin) -> str:
    bits = metrics["size"]["bits_per_weight"]["quantized"]
    calibrated = f", calibrated on {metrics['calibration']['text']}" if metrics["calibration"] else ""
    stored = f"stored in the format {metrics['format']}"
    cache = (metrics["memory"].get("kv_cache") or {}).get("type")
    rounded = f", keys and values rounded to {cache}" if cache else ""
    if bits is None:
        return f"{origin.id}, its weights as they are{rounded}{calibrated}, {stored}."
    stored += f" ({bits:.2f} bits per quantized weight)"
    weights = f"its weights quantized to {metrics['scheme']} by {metrics['method']}"
    return f"{origin.id}, {weights}{rounded}{calibrated}, {stored}."


def _provenance(metrics: Mapping[str, Any], origin: Origin) -> list[tuple[str, str]]:
    source = f"{origin.id}, revision {origin.revision}" if origin.on_hub else f"{origin.id}, which is not of the Hub"
    return [
        ("from", source),
        ("scheme", metrics["scheme"]),
        *([("method", metrics["method"])] if metrics["method"] else []),
        ("format", metrics["format"]),
    ]


def _metadata(
    repo: str, metrics: Mapping[str, Any], origin: Origin, runtimes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    bits = re.search(r"\d+", metrics["scheme"])
    reads_images = any(verdict["class"] == "AutoModelForImageTextToText" for verdict in runtimes.values())
    tags = [
        "bitpress",
        formats()[metrics["format"]].quant_method,
        metrics["scheme"],
        *([f"{bits[0]}-bit"] if bits else []),
    ]
    return {
        "pipeline_tag": "image-text-to-text" if reads_images else "text-generation",
        "library_name": "transformers",
        "model_name": repo.split("/")[1],
        "tags": tags,
        "datasets": _calibration_sets(metrics),
        **origin.metadata(),
    }


def _calibration_sets(metrics: Mapping[str, Any]) -> list[str] | None:
    """The data sets of the Hub that it was calibrated on."""
    if not metrics["calibration"]:
        return None
    recipes = metrics["config"]["recipes"]
    texts = [source_of(Calibrate.model_validate(recipe["calibration"] or {}).text) for recipe in recipes]
    names = [text.dataset for text in texts if isinstance(text, Dataset)]
    return list(dict.fromkeys(names)) or None


def _results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    """The figures for the model-index: those of the text, and those of tasks."""
    text, quality = metrics["config"]["eval"]["text"], metrics["quality"]
    of = text if isinstance(text, dict) else {"dataset": metrics["protocol"]["text"]}
    figures = [
        (of, "perplexity", f"perplexity ({metrics['protocol']['name']})", quality["perplexity"]),
        (of, "kl_divergence", "mean KL from the unquantized model, nats", quality["kl_mean"]),
        (of, "top1_agreement", "same next token as the unquantized model", quality["top1_agreement"]),
    ]
    figures += [({"dataset": line["task"]}, line["metric"], line["metric"], line["value"]) for line in metrics["tasks"]]
    return [_result(*figure) for figure in figures if figure[-1] is not None]


def _result(of: Mapping[str, Any], kind: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=of["dataset"],
        dataset_name=of["dataset"],
        dataset_config=of.get("config"),
        dataset_split=of.get("split"),
        dataset_revision=of.get("revision"),
        metric_type=kind,
        metric_name=name,
        metric_value=value,
    )
