"""Where on the Hub runs go: the publish section of a config."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .problems import Several

_SECRETS = ("token", "hf_token", "api_key", "password")
_LONGEST_TITLE = 59  # characters; the Hub takes no longer ones


class Publish(BaseModel):
    """Where a batch goes once it is finished; what misses a gate stays here."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    repo: str  # owner/name; {model} and {scheme} in it stand for what a job is on
    private: bool = False  # of repositories that do not exist yet
    collection: str | None = Field(None, min_length=1, max_length=_LONGEST_TITLE)  # the title of one for all of them

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, value: Any) -> Any:
        if isinstance(value, dict) and (found := [key for key in _SECRETS if key in value]):
            raise ValueError(
                f"{found[0]} is never read from a config; take it out, and `hf auth login` or set HF_TOKEN"
            )
        return value

    def name_of(self, model: str, scheme: str) -> str:
        """The repository of one job; see check_repo for what is raised."""
        short = re.split(r"[/:]", model.rstrip("/"))[-1]
        return check_repo(self.repo.replace("{model}", short).replace("{scheme}", scheme))

    def check(self, models: Sequence[str], schemes: Sequence[str]) -> None:
        """Raises Several if a job has no repository of its own."""
        jobs = [(model, scheme) for model in models for scheme in schemes if scheme != "none"]
        try:
            names = [self.name_of(*job) for job in jobs]
        except ValueError as error:
            raise Several([(("repo",), str(error))]) from error
        if twice := next((name for name in names if names.count(name) > 1), None):
            said = f"several jobs would go to {twice}; tell them apart by {{model}} and {{scheme}}"
            raise Several([(("repo",), said)])


def check_repo(name: str) -> str:
    """The name of a repository, unchanged.

    Raises:
        ValueError: the Hub would not take it.
    """
    from huggingface_hub.utils import validate_repo_id  # brings the client along

    if name.count("/") != 1:
        raise ValueError(f"{name!r} is no repository of the Hub; expected owner/name")
    validate_repo_id(name)
    return name
