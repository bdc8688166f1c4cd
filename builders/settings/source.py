"""SourceSettings: where the checkpoint is."""

from pydantic import Field

from serve.core.strict_model import StrictModel


class SourceSettings(StrictModel):
    """The unquantized checkpoint. In a build file a text is taken for `location`."""

    location: str = Field(
        min_length=1,
        description="Directory of a Hugging Face checkpoint, the same path on every node; builtin:quickstart; "
        "hf://organisation/model, or organisation/model@revision of the Hugging Face hub; or an fsspec URL "
        "(s3://, gs://, ...).",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub's model.")
    allow_pickle: bool = Field(
        default=False,
        description="Accept weights as Python pickles (*.bin, *.pt), which can run any code when they are loaded.",
    )
