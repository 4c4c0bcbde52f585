"""What every section of a configuration is: frozen, typed, without unknown keys, without secrets."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

Share = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]

_SECRET = re.compile(r"token|api_?key|password|passwd|secret|credential", re.IGNORECASE)
_PASSWORD_IN_URI = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@]*:[^/?#@]*@", re.IGNORECASE)
_INSTEAD = "would be written to config.yaml, logs and checkpoints; give it in the environment"


class Section(BaseModel):
    """A frozen group of fields; an unknown key and a secret are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _without_secrets(cls, value: Any) -> Any:
        if (found := secret_in(value)) is not None:
            raise ValueError(f"{found} {_INSTEAD}")
        return value


def secret_in(value: Any, key: str = "") -> str | None:
    """The secret in a field's value, in words. Numbers under such keys are none: `pad_token_id`, `num_tokens`."""
    if isinstance(value, str):
        if value and _SECRET.search(key):
            return f"the text of '{key}'"
        return "the password in a URI" if _PASSWORD_IN_URI.match(value) else None
    if isinstance(value, dict):
        found = [secret_in(inner, str(name)) for name, inner in value.items()]
    else:
        found = [secret_in(inner, key) for inner in value] if isinstance(value, (list, tuple)) else []
    return next(filter(None, found), None)
