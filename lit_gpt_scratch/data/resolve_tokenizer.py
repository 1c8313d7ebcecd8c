"""Select the tokenizer for records: the pretrained model's, one loaded from a path, or one trained on the records."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from lit_gpt_scratch.data.prepare_tokens import DEFAULT_VOCAB_SIZE, validate_vocab_size
from lit_gpt_scratch.data.token_store import hash_json
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.atomic_files import create_folder_atomically
from lit_gpt_scratch.text.tokenizer import TOKENIZER_FILE, Tokenizer
from lit_gpt_scratch.text.tokenizer_training import TOKENIZER_KINDS

log = logging.getLogger(__name__)


def resolve_tokenizer(
    model_tokenizer: Tokenizer | None, init_from: str | None, data_tokenizer: str | None
) -> Tokenizer | None:
    """Return the tokenizer of the model to fine-tune or, if there is no model, the tokenizer at ``data_tokenizer``.

    Return None if ``model_tokenizer`` is None and ``data_tokenizer`` is not a path; a tokenizer must then be trained.

    Args:
        model_tokenizer: Tokenizer of the model to fine-tune, or None if a new model is trained.
        init_from: Path to the model's checkpoint, used in error messages.
        data_tokenizer: Path to a tokenizer, or type of tokenizer to train, or None if not specified.

    Raises:
        UserError: ``data_tokenizer`` differs from the model's tokenizer, so the model would misread the token ids.
    """
    path = None if data_tokenizer is None or data_tokenizer in TOKENIZER_KINDS else Path(data_tokenizer).expanduser()
    loaded = None if path is None else Tokenizer.load(path)
    same = model_tokenizer is not None and loaded is not None and loaded.to_json() == model_tokenizer.to_json()
    if model_tokenizer is not None and data_tokenizer and not same:
        raise UserError(f"data.tokenizer differs from the tokenizer of the model in {init_from}; omit data.tokenizer")
    return model_tokenizer or loaded


def train_or_load_tokenizer(
    texts: Sequence[str], kind: str, vocab_size: int | None, special: Sequence[str], cache: Path, name: str
) -> Tokenizer:
    """Train a tokenizer, or load it from the cache, so that all processes and resumed runs use the same tokenizer.

    Args:
        texts: Strings to train on.
        kind: Type of tokenizer, one of ``tokenizer_training.TOKENIZER_KINDS``.
        vocab_size: Requested vocabulary size; None requests the default size.
        special: Special tokens in addition to end-of-text.
        cache: Cache folder.
        name: Name of the data source, for log and error messages.

    Raises:
        UserError: The strings yield fewer tokens than requested.
    """
    content = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    folder = cache / "tokenizers" / hash_json([kind, vocab_size, *special, content])[:16]

    def train(target: Path) -> None:
        log.info("training a %s tokenizer on the training records of %s", kind, name)
        Tokenizer.train(texts, vocab_size or DEFAULT_VOCAB_SIZE, kind, special).save(target / TOKENIZER_FILE)

    create_folder_atomically(folder, train, "--data.cache")
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    validate_vocab_size(tokenizer, kind, vocab_size, name)
    return tokenizer
