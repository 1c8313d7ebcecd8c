"""Prepare a corpus once: clean and split it, train a tokenizer, and save the encoded token ids to disk."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from lit_gpt_scratch.data.token_store import STORE_FORMAT, TokenStore, hash_json
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import validate
from lit_gpt_scratch.text.atomic_files import create_folder_atomically, fill_folder_atomically
from lit_gpt_scratch.text.cleaning_report import add_token_counts, format_report
from lit_gpt_scratch.text.corpus import SPLITS, CleanedCorpus, CorpusSpec, SplitName, upgrade_stored_cleaning
from lit_gpt_scratch.text.token_shards import MANIFEST_FILE, REBUILD_HINT, ShardedTokenStream
from lit_gpt_scratch.text.tokenize_corpus import BATCH_CHARACTERS, progress_bar, remove_shard_markers, tokenize_corpus
from lit_gpt_scratch.text.tokenizer import TOKENIZER_FILE, Tokenizer
from lit_gpt_scratch.text.tokenizer_training import TOKENIZER_KINDS, TRAINED_KINDS

log = logging.getLogger(__name__)

TOKENIZER_TRAINING_BYTES: Final = 2**28
"""Maximum number of bytes of text to train a tokenizer on; more text would hardly change the merges."""
DEFAULT_VOCAB_SIZE: Final = 1024
"""Default vocabulary size of a trained tokenizer."""
DEFAULT_KIND: Final = "bpe"
"""Default type of tokenizer to train."""


def default_tokenizer(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults for a data module's ``tokenizer`` and ``vocab_size``, given its other arguments.

    Return an empty dict if the tokenizer comes from ``init_from`` or a file, because its vocabulary is then fixed.
    """
    kind = arguments.get("tokenizer") or DEFAULT_KIND
    if arguments.get("init_from") is not None or kind not in TOKENIZER_KINDS:
        return {}
    return {"tokenizer": DEFAULT_KIND, **({"vocab_size": DEFAULT_VOCAB_SIZE} if kind in TRAINED_KINDS else {})}


@dataclass(frozen=True)
class TokenPreparation:
    """Settings that determine the token ids of a corpus.

    Args:
        selection: Sources of the documents, and how to clean and split them.
        vocab_size: Vocabulary size of the tokenizer to train; None means 1,024, or less if the text yields
            fewer tokens.
        tokenizer: Type of tokenizer to train, or path of an existing tokenizer.
        special: Special tokens in addition to end-of-text.
    """

    selection: CorpusSpec
    vocab_size: int | None
    tokenizer: str
    special: tuple[str, ...]

    def prepare(self, cache: Path, store: Path | None = None, given: Tokenizer | None = None) -> TokenStore:
        """Open the token store, creating it first if it does not exist.

        Args:
            cache: Cache folder, used if ``store`` is None. Each token store in it is named after a hash of
                everything that determines its tokens and its cleaning report.
            store: Folder for this store and its text only; None uses ``cache``.
            given: Tokenizer to use instead of ``tokenizer``.

        Raises:
            UserError: A source, the tokenizer or a folder cannot be used, or ``store`` contains tokens prepared
                with different settings.
        """
        if given is None and self.tokenizer not in TOKENIZER_KINDS:
            given = Tokenizer.load(Path(self.tokenizer).expanduser())
        if store is not None:
            self._validate_store_folder(store)
            if not store.exists() or not any(store.iterdir()):
                purpose = json.dumps([STORE_FORMAT, self._settings(given), self.selection.source_fingerprints])
                create_folder_atomically(
                    store, lambda folder: self._write_texts_and_tokens(folder, given), "--data.store", purpose
                )
            self._validate_settings(store, given)
            return self._open(store)
        corpus = self.selection.prepare(cache / "corpora")
        # Different cleaning steps may yield the same text, but the audit in the store describes only one of them.
        name = hash_json([self._fingerprint(corpus, given), corpus.folder.name])
        folder = cache / name[:16]
        create_folder_atomically(
            folder, lambda folder: self._write_tokens(folder, corpus, given), "--data.cache", folder.name
        )
        return self._open(folder)

    def tokenizer_training_share(self, corpus: CleanedCorpus) -> float:
        """Return the fraction of a corpus on which the tokenizer is trained.

        The fraction is 1 if the corpus has at most ``TOKENIZER_TRAINING_BYTES`` bytes of text.
        """
        return min(1.0, TOKENIZER_TRAINING_BYTES / max(corpus.n_bytes, 1))

    def _settings(self, given: Tokenizer | None) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "tokenizer": hashlib.sha256(given.to_json().encode()).hexdigest() if given else self.tokenizer,
            "special_tokens": list(self.special),
            **self.selection.settings,
        }

    def _fingerprint(self, corpus: CleanedCorpus, given: Tokenizer | None) -> str:
        training_settings = [self.tokenizer, self.vocab_size or DEFAULT_VOCAB_SIZE, *self.special]
        facts = {
            "format": STORE_FORMAT,
            "corpus": corpus.fingerprint,
            "tokenizer": given.to_json() if given else training_settings,
        }
        return hash_json(facts)

    def _validate_store_folder(self, store: Path) -> None:
        """Reject a folder that contains anything other than a token store, or that is inside a source folder."""
        if store.exists() and not (store / MANIFEST_FILE).exists() and (not store.is_dir() or any(store.iterdir())):
            raise UserError(f"{store} is neither an empty folder nor a token store; set --data.store to another folder")
        for source, _ in self.selection.sources:
            if Path(source.name).expanduser().resolve() in store.parents:
                raise UserError(f"{store} is inside {source.name}; set --data.store to another folder")

    def _write_texts_and_tokens(self, folder: Path, given: Tokenizer | None) -> None:
        text = folder / "text"
        if not text.exists():
            fill_folder_atomically(text, self.selection.write)
        self._write_tokens(folder, CleanedCorpus.open(text), given)
        (text / "sample.json").unlink(missing_ok=True)  # it contains uncleaned text

    def _validate_settings(self, store: Path, given: Tokenizer | None) -> None:
        """Reject a store with different settings; log a warning if its source text has changed or is missing."""
        manifest = TokenStore.read_manifest(store)
        try:
            stored = validate(manifest.get("recipe", {}), dict[str, Any], "recipe")
            cleaning = validate(stored.get("cleaning", []), list[str], "recipe.cleaning")
        except ValueError as error:
            raise UserError(f"{store / MANIFEST_FILE} is corrupted ({error}); {REBUILD_HINT}") from error
        stored, current = (
            stored | {"cleaning": upgrade_stored_cleaning(cleaning)},
            json.loads(json.dumps(self._settings(given))),
        )
        for name in current:
            if stored.get(name) != current[name]:
                raise UserError(
                    f"{store} contains tokens prepared with different settings ({name.replace('_', ' ')}); set "
                    "--data.store to another folder, or delete this folder"
                )
        try:
            unchanged = manifest.get("stamps") == self.selection.source_fingerprints
        except UserError:
            unchanged = False
        if not unchanged:  # the store was copied to a machine that lacks the text, or the text was edited
            log.warning(
                "the source %s has changed or is missing, but the existing tokens in %s are used; to prepare them "
                "again, delete that folder",
                self.selection.name,
                store,
            )

    def _write_tokens(self, folder: Path, corpus: CleanedCorpus, given: Tokenizer | None) -> None:
        """Write the missing files of the token store, so that an interrupted call can be resumed."""
        if not (folder / MANIFEST_FILE).exists():
            tokenizer = self._load_partial(folder) or given or self._train(corpus)
            if tokenizer.round_trip_loss:
                log.warning("the tokenizer is lossy: %s", tokenizer.round_trip_loss)
            tokenizer.save(folder / TOKENIZER_FILE)
            log.info("encoding %s", self.selection.name)
            shards = tokenize_corpus(corpus, folder, self.selection.processes)
            self._write_audit(
                folder, corpus, tokenizer, {side: ShardedTokenStream(tuple(shards[side])) for side in SPLITS}
            )
            manifest: dict[str, Any] = {
                "fingerprint": self._fingerprint(corpus, given),
                "fingerprints": {
                    "source": hash_json(self.selection.source_fingerprints),
                    "cleaning": hash_json(self.selection.settings["cleaning"]),
                    "text": corpus.fingerprint,
                    "tokenizer": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
                },
                "vocab_size": tokenizer.vocab_size,
                "recipe": self._settings(given),
                "stamps": self.selection.source_fingerprints,
                "hub_datasets": self.selection.hub_datasets,
                **{side: [shard.metadata for shard in shards[side]] for side in SPLITS},
            }
            TokenStore.write_manifest(folder, manifest)
        remove_shard_markers(TokenStore.read_unverified(folder).shards)

    def _load_partial(self, folder: Path) -> Tokenizer | None:
        """Load the tokenizer that an interrupted call saved; return None if no tokenizer was saved."""
        try:
            return Tokenizer.load(folder / TOKENIZER_FILE)
        except UserError:
            return None

    def _write_audit(
        self, folder: Path, corpus: CleanedCorpus, tokenizer: Tokenizer, streams: dict[SplitName, ShardedTokenStream]
    ) -> None:
        n_tokens = {side: stream.n_tokens - stream.n_documents for side, stream in streams.items()}

        def count(texts: Sequence[str]) -> list[int]:
            return [len(ids) for ids in tokenizer.encode_many(texts)]

        audit = add_token_counts(corpus.audit, corpus.sample, count, sum(n_tokens.values()))
        for side in SPLITS:
            audit["split"][side]["tokens"] = n_tokens[side]
        (folder / "audit.json").write_text(json.dumps(audit, indent=2), encoding="utf-8")
        (folder / "audit.md").write_text(format_report(audit), encoding="utf-8")

    def _train(self, corpus: CleanedCorpus) -> Tokenizer:
        share = self.tokenizer_training_share(corpus)
        portion = "the" if share == 1 else f"{share:.1%} of the"
        log.info("training a %s tokenizer on %s training documents of %s", self.tokenizer, portion, self.selection.name)
        with progress_bar("learning", corpus.audit["split"]["train"]["bytes"] * share) as progress:
            texts = _split_long_texts(_report_progress(corpus.texts("train", share), progress))
            tokenizer = Tokenizer.train(texts, self.vocab_size or DEFAULT_VOCAB_SIZE, self.tokenizer, self.special)
        validate_vocab_size(tokenizer, self.tokenizer, self.vocab_size, self.selection.name)
        return tokenizer

    def _open(self, folder: Path) -> TokenStore:
        store = TokenStore.open(folder)
        # The store may have been created by a call without a vocabulary size.
        validate_vocab_size(store.tokenizer, self.tokenizer, self.vocab_size, self.selection.name)
        return store


def validate_vocab_size(tokenizer: Tokenizer, kind: str, requested: int | None, name: str) -> None:
    """Reject a trained vocabulary that is smaller than requested.

    Raises:
        UserError: The text yields fewer tokens than requested.
    """
    if kind in TRAINED_KINDS and tokenizer.vocab_size < (requested or 0):
        raise UserError(
            f"data.vocab_size is {requested:,}, but {name} yields a {kind} tokenizer of only "
            f"{tokenizer.vocab_size:,} tokens; lower data.vocab_size, or add text"
        )


def _report_progress(texts: Iterable[str], progress: "tqdm[Any]") -> Iterator[str]:
    for text in texts:
        yield text
        progress.update(len(text.encode()))


def _split_long_texts(texts: Iterable[str]) -> Iterator[str]:
    """Split long strings, at line breaks if possible, to limit the memory that training a tokenizer requires.

    A tokenizer trainer uses many times the memory of its longest string.
    """
    for text in texts:
        start = 0
        while start < len(text):
            end = len(text)
            if end - start > BATCH_CHARACTERS:
                end = text.rfind("\n", start, start + BATCH_CHARACTERS) + 1 or start + BATCH_CHARACTERS
            yield text[start:end]
            start = end
