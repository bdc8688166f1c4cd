"""StrictModel: the base of every configuration model."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Frozen; an unknown key is an error, so that a misspelt setting never passes silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
