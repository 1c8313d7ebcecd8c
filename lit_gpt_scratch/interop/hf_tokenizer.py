"""Read and write the files of a Hugging Face folder that describe special tokens, generation and the chat template."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from typing_extensions import TypedDict

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hf_config import shorten
from lit_gpt_scratch.schema import read_json, validate
from lit_gpt_scratch.text.published_settings import FlatValue, PublishedSettings
from lit_gpt_scratch.text.template_process import MAX_TEMPLATE
from lit_gpt_scratch.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

GENERATION_FILE: Final = "generation_config.json"
SETTINGS_FILE: Final = "tokenizer_config.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Fields of ``tokenizer_config.json`` that contain special tokens, which ``transformers`` passes to chat templates."""
DEFAULT_TEMPLATE: Final = "default"


class NamedTemplate(TypedDict):
    """One of several chat templates in ``tokenizer_config.json``."""

    name: str
    template: str


def read_published_settings(folder: Path, config: Mapping[str, Any], config_path: Path) -> PublishedSettings:
    """Read the special tokens, the generation config and the chat template of a model, which are optional.

    Args:
        folder: Hugging Face folder.
        config: Parsed ``config.json``.
        config_path: Path to ``config.json``, used in error messages.

    Raises:
        UserError: A file cannot be read, or a field has the wrong type.
    """
    generation, settings = (_read_optional(folder / name) for name in (GENERATION_FILE, SETTINGS_FILE))
    start = config.get("bos_token_id")
    fields: dict[str, Any] = {
        "model_type": config["model_type"],
        "bos_token_id": start if type(start) is int else None,
    }
    try:
        where = config_path
        fields["eos_token_id"] = validate(config.get("eos_token_id"), int | list[int] | None, "eos_token_id")  # type: ignore[arg-type]
        where = folder / GENERATION_FILE
        if generation is not None:
            validate(generation.get("eos_token_id"), int | list[int] | None, "eos_token_id")  # type: ignore[arg-type]
            flat = {name: value for name, value in generation.items() if _is_flat(value)}
            fields["generation_config"] = flat
            if left_out := sorted(generation.keys() - flat):
                log.warning("%s: these fields are not imported: %s", where, ", ".join(map(shorten, left_out)))
        where = folder / SETTINGS_FILE
        found = {name: _token_text((settings or {}).get(name)) for name in NAMED_TOKENS}
        fields["tokens"] = {name: validate(text, str, name) for name, text in found.items() if text is not None}
        template = validate((settings or {}).get("chat_template"), str | list[NamedTemplate] | None, "chat_template")  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"{where}: {error}; download it again") from error
    fields["chat_template"] = _read_template(folder, template)
    return PublishedSettings(**fields)


def build_settings_files(tokenizer: Tokenizer, block_size: int) -> dict[str, dict[str, Any]]:
    """Return the JSON objects for ``generation_config.json`` and ``tokenizer_config.json``, keyed by file name.

    Args:
        tokenizer: Tokenizer of the model.
        block_size: Context length in tokens.
    """
    published, ids = tokenizer.published, special_ids(tokenizer)
    tokens = {} if published is None else published.tokens
    if not tokens:
        tokens = {
            "bos_token": tokenizer.token_name(tokenizer.start_of_text),
            "eos_token": tokenizer.token_name(tokenizer.end_of_text),
        }
    generation = None if published is None else published.generation_config
    return {
        # pad_token_id is not in config.json, because the embedding of that token would then receive no gradient.
        GENERATION_FILE: {**ids, "pad_token_id": tokenizer.end_of_text} if generation is None else dict(generation),
        SETTINGS_FILE: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **tokens,
            "model_max_length": block_size,
            "clean_up_tokenization_spaces": False,
        },
    }


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the special token ids for ``config.json``, from the published model if known, else from the tokenizer."""
    published = tokenizer.published
    if published is None or published.eos_token_id is None:
        ends = sorted(tokenizer.stop_ids)
        return {"bos_token_id": tokenizer.start_of_text, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    return {"bos_token_id": published.bos_token_id, "eos_token_id": published.eos_token_id}


def _read_optional(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; return None if the file does not exist."""
    try:
        return read_json(path, dict[str, Any])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a valid config, or cannot be read ({error}); download it again") from error


def _is_flat(value: object) -> bool:
    """Return whether a checkpoint can store a field of a generation config: a scalar, a list of scalars, or null."""
    try:
        validate({"value": value}, dict[str, FlatValue], "generation_config")
    except ValueError:
        return False
    return True


def _token_text(token: Any) -> Any:
    """Return the string of a special token, which some files store as an object with flags."""
    return token.get("content") if isinstance(token, dict) else token


def _read_template(folder: Path, configured: str | list[NamedTemplate] | None) -> str | None:
    """Return the default chat template, from ``chat_template.jinja`` or else from ``tokenizer_config.json``.

    Raises:
        UserError: The file cannot be read, or the template is too long.
    """
    path = folder / TEMPLATE_FILE
    try:
        with path.open("rb") as file:
            template: str | None = file.read(4 * MAX_TEMPLATE + 1).decode()
    except FileNotFoundError:
        path = folder / SETTINGS_FILE
        if isinstance(configured, list):
            templates = {each["name"]: each["template"] for each in configured}
            template = templates.pop(DEFAULT_TEMPLATE, None)
            if template is None:
                log.warning("%s has no chat template named %s", path, DEFAULT_TEMPLATE)
            if templates:
                log.warning("%s: these chat templates are not imported: %s", path, ", ".join(map(shorten, templates)))
        else:
            template = configured
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from error
    if template is not None and len(template) > MAX_TEMPLATE:
        raise UserError(
            f"the chat template in {path} has more than {MAX_TEMPLATE:,} characters; remove it to use the template of "
            "this package"
        )
    return template
