"""Settings of a published model that are not in its ``tokenizer.json``, such as stop tokens and the chat template."""

from dataclasses import dataclass, field

Scalar = bool | int | float | str
FlatValue = Scalar | list[Scalar] | None


@dataclass(frozen=True)
class PublishedSettings:
    """Model type, special tokens, generation config and chat template of a model in ``transformers`` format.

    Attributes:
        bos_token_id: ``bos_token_id`` in ``config.json``.
        eos_token_id: ``eos_token_id`` in ``config.json``, either an id or a list of ids.
        generation_config: Fields of ``generation_config.json`` except nested objects; None if there is no such file.
        tokens: Special token strings in ``tokenizer_config.json``, keyed by name, such as ``bos_token``. The chat
            template can insert them.
        chat_template: Jinja template that renders messages as text; None if the model has none.
        model_type: ``model_type`` in ``config.json``; None in checkpoints of models that were imported before it was
            stored.
    """

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    generation_config: dict[str, FlatValue] | None = None
    tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    model_type: str | None = None

    @property
    def eos_ids(self) -> list[int]:
        """Ids of the tokens that end generated text, from ``generation_config`` or, as a fallback, ``eos_token_id``."""
        for value in ((self.generation_config or {}).get("eos_token_id"), self.eos_token_id):
            ids = value if isinstance(value, list) else [value]
            if ids := [id_ for id_ in ids if type(id_) is int]:
                return ids
        return []
