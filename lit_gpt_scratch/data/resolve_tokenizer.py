"""The tokenizer of records: that of the model to tune, one that is given, or one that learns from them."""

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


def resolve_tokenizer(own: Tokenizer | None, init_from: str | None, given: str | None) -> Tokenizer | None:
    """The tokenizer of a model, or the one that was given by its path; None where neither is there.

    Args:
        own: The model's.
        init_from: Where that is from.
        given: The path of another, or the kind of one to train.

    Raises:
        UserError: Both are there and differ: a model of one vocabulary makes gibberish of another's ids.
    """
    path = None if given is None or given in TOKENIZER_KINDS else Path(given).expanduser()
    found = None if path is None else Tokenizer.load(path)
    if own is not None and given and (found is None or found.to_json() != own.to_json()):
        raise UserError(f"data.tokenizer is another one than that of the model in {init_from}; leave it out")
    return own or found


def train_or_load_tokenizer(
    texts: Sequence[str], kind: str, vocab_size: int | None, special: Sequence[str], cache: Path, name: str
) -> Tokenizer:
    """Train a tokenizer, or find it in the cache: all processes of a run have the same, and so has a resumed one.

    Args:
        texts: To learn from.
        kind: A key of ``training.KINDS``.
        vocab_size: Tokens that were asked for, or None.
        special: Its special tokens, beside the end of text.
        cache: Folder of many.
        name: Of the texts, for messages.

    Raises:
        UserError: The texts give fewer tokens than were asked for.
    """
    content = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    folder = cache / "tokenizers" / hash_json([kind, vocab_size, *special, content])[:16]

    def fill(place: Path) -> None:
        log.info("training a %s tokenizer on the training records of %s", kind, name)
        Tokenizer.train(texts, vocab_size or DEFAULT_VOCAB_SIZE, kind, special).save(place / TOKENIZER_FILE)

    create_folder_atomically(folder, fill, "--data.cache")
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    validate_vocab_size(tokenizer, kind, vocab_size, name)
    return tokenizer
