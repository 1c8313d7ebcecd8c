"""From texts to token ids on disk: what decides them, and how they are made once."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from lit_gpt_scratch.data.token_store import MANIFEST_FILE, STORE_FORMAT, TokenStore, hash_json
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.atomic_files import create_folder_atomically, fill_folder_atomically
from lit_gpt_scratch.text.cleaning_report import add_token_counts, format_report
from lit_gpt_scratch.text.corpus import SPLITS, CleanedCorpus, CorpusSpec, SplitName
from lit_gpt_scratch.text.token_shards import ShardedTokenStream
from lit_gpt_scratch.text.tokenize_corpus import BATCH_CHARACTERS, progress_bar, remove_shard_notes, tokenize_corpus
from lit_gpt_scratch.text.tokenizer import TOKENIZER_FILE, Tokenizer
from lit_gpt_scratch.text.tokenizer_training import TOKENIZER_KINDS, TRAINED_KINDS

log = logging.getLogger(__name__)

TOKENIZER_TRAINING_BYTES: Final = 2**28
"""Bytes of text that a tokenizer is trained on, of a longer corpus; more changes hardly a merge."""
DEFAULT_VOCAB_SIZE: Final = 1024
"""Tokens of a tokenizer of which nobody said how large it is to be."""


@dataclass(frozen=True)
class TokenPreparation:
    """All that decides which ids a corpus becomes.

    Args:
        selection: The texts.
        vocab_size: Tokens of the tokenizer to train; None for 1,024, or as many as the texts give.
        tokenizer: Its kind, or the path of one to use instead.
        special: Its special tokens, beside the end of text.
    """

    selection: CorpusSpec
    vocab_size: int | None
    tokenizer: str
    special: tuple[str, ...]

    def prepare(self, cache: Path, store: Path | None = None, given: Tokenizer | None = None) -> TokenStore:
        """Open the store of this recipe, making it first if it is not there.

        Args:
            cache: Folder of many stores, each under a hash of its tokens and of its cleaning.
            store: A folder for this store alone, and for its texts.
            given: A tokenizer to use instead of what ``tokenizer`` names.

        Raises:
            UserError: A source, the tokenizer or a folder is unusable, or ``store`` holds other tokens.
        """
        if given is None and self.tokenizer not in TOKENIZER_KINDS:
            given = Tokenizer.load(Path(self.tokenizer).expanduser())
        if store is not None:
            self._refuse_place(store)
            if not store.exists() or not any(store.iterdir()):
                purpose = json.dumps([STORE_FORMAT, self._settings(given), self.selection.stamps])
                create_folder_atomically(store, lambda folder: self._fill(folder, given), "--data.store", purpose)
            self._compare(store, given)
            return self._opened(store)
        corpus = self.selection.prepare(cache / "corpora")
        # Two cleanings may leave the same texts; the audit is of one of them.
        name = hash_json([self._fingerprint(corpus, given), corpus.folder.name])
        folder = cache / name[:16]
        create_folder_atomically(folder, lambda folder: self._write(folder, corpus, given), "--data.cache", folder.name)
        return self._opened(folder)

    def tokenizer_training_share(self, corpus: CleanedCorpus) -> float:
        """The share of a corpus that a tokenizer learns from."""
        return min(1.0, TOKENIZER_TRAINING_BYTES / max(corpus.n_bytes, 1))

    def _settings(self, given: Tokenizer | None) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "tokenizer": hashlib.sha256(given.to_json().encode()).hexdigest() if given else self.tokenizer,
            "special_tokens": list(self.special),
            **self.selection.settings,
        }

    def _fingerprint(self, corpus: CleanedCorpus, given: Tokenizer | None) -> str:
        trained = [self.tokenizer, self.vocab_size or DEFAULT_VOCAB_SIZE, *self.special]
        facts = {
            "format": STORE_FORMAT,
            "corpus": corpus.fingerprint,
            "tokenizer": given.to_json() if given else trained,
        }
        return hash_json(facts)

    def _refuse_place(self, store: Path) -> None:
        """Tokens do not go where something else is, nor among the texts they are made of."""
        if store.exists() and not (store / MANIFEST_FILE).exists() and (not store.is_dir() or any(store.iterdir())):
            raise UserError(f"{store} has something else in it; name another folder as --data.store")
        for source, _ in self.selection.sources:
            if Path(source.name).expanduser().resolve() in store.parents:
                raise UserError(f"{store} is inside {source.name}; name another folder as --data.store")

    def _fill(self, folder: Path, given: Tokenizer | None) -> None:
        text = folder / "text"
        if not text.exists():
            fill_folder_atomically(text, self.selection.write)
        self._write(folder, CleanedCorpus.open(text), given)
        (text / "sample.json").unlink(missing_ok=True)  # texts as they were before they were cleaned

    def _compare(self, store: Path, given: Tokenizer | None) -> None:
        """Refuse a folder whose tokens were made in another way; that its text is no longer there is only said."""
        about = TokenStore.read_manifest(store)
        before, now = about.get("recipe", {}), json.loads(json.dumps(self._settings(given)))
        for name in now:
            if before.get(name) != now[name]:
                raise UserError(
                    f"{store} holds tokens of another {name.replace('_', ' ')}; name another folder as --data.store, "
                    "or delete this one"
                )
        try:
            same = about.get("stamps") == self.selection.stamps
        except UserError:
            same = False
        if not same:  # it was copied to a machine without the text, or somebody wrote more
            log.warning(
                "%s is not here as it was when %s was made; its tokens are used as they are (to make them anew, delete "
                "that folder)",
                self.selection.name,
                store,
            )

    def _write(self, folder: Path, corpus: CleanedCorpus, given: Tokenizer | None) -> None:
        """Make what is not there yet: an interrupted call is gone on with."""
        if not (folder / MANIFEST_FILE).exists():
            tokenizer = self._kept(folder) or given or self._train(corpus)
            if tokenizer.loss:
                log.warning("the tokenizer loses something: %s", tokenizer.loss)
            tokenizer.save(folder / TOKENIZER_FILE)
            log.info("encoding %s", self.selection.name)
            shards = tokenize_corpus(corpus, folder, self.selection.processes)
            self._account(folder, corpus, tokenizer, {side: ShardedTokenStream(tuple(shards[side])) for side in SPLITS})
            about: dict[str, Any] = {
                "fingerprint": self._fingerprint(corpus, given),
                "fingerprints": {
                    "source": hash_json(self.selection.stamps),
                    "cleaning": hash_json(self.selection.settings["cleaning"]),
                    "text": corpus.fingerprint,
                    "tokenizer": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
                },
                "vocab_size": tokenizer.vocab_size,
                "recipe": self._settings(given),
                "stamps": self.selection.stamps,
                **{side: [shard.about for shard in shards[side]] for side in SPLITS},
            }
            TokenStore.write_manifest(folder, about)
        remove_shard_notes(TokenStore.read_unverified(folder).shards)

    def _kept(self, folder: Path) -> Tokenizer | None:
        """The tokenizer that an interrupted call has made."""
        try:
            return Tokenizer.load(folder / TOKENIZER_FILE)
        except UserError:
            return None

    def _account(
        self, folder: Path, corpus: CleanedCorpus, tokenizer: Tokenizer, streams: dict[SplitName, ShardedTokenStream]
    ) -> None:
        kept = {side: stream.n_tokens - stream.n_documents for side, stream in streams.items()}

        def count(texts: Sequence[str]) -> list[int]:
            return [len(ids) for ids in tokenizer.encode_many(texts)]

        audit = add_token_counts(corpus.audit, corpus.sample, count, sum(kept.values()))
        for side in SPLITS:
            audit["split"][side]["tokens"] = kept[side]
        (folder / "audit.json").write_text(json.dumps(audit, indent=2), encoding="utf-8")
        (folder / "audit.md").write_text(format_report(audit), encoding="utf-8")

    def _train(self, corpus: CleanedCorpus) -> Tokenizer:
        share = self.tokenizer_training_share(corpus)
        some = "the" if share == 1 else f"{share:.1%} of the"
        log.info("training a %s tokenizer on %s training documents of %s", self.tokenizer, some, self.selection.name)
        with progress_bar("learning", corpus.audit["split"]["train"]["bytes"] * share) as progress:
            texts = _split_long_texts(_report_progress(corpus.texts("train", share), progress))
            tokenizer = Tokenizer.train(texts, self.vocab_size or DEFAULT_VOCAB_SIZE, self.tokenizer, self.special)
        validate_vocab_size(tokenizer, self.tokenizer, self.vocab_size, self.selection.name)
        return tokenizer

    def _opened(self, folder: Path) -> TokenStore:
        store = TokenStore.open(folder)
        # It may have been made for somebody who did not ask for a number.
        validate_vocab_size(store.tokenizer, self.tokenizer, self.vocab_size, self.selection.name)
        return store


def validate_vocab_size(tokenizer: Tokenizer, kind: str, asked: int | None, name: str) -> None:
    """Refuse a smaller vocabulary than was asked for.

    Raises:
        UserError: The text gives no more.
    """
    if kind in TRAINED_KINDS and tokenizer.vocab_size < (asked or 0):
        raise UserError(
            f"data.vocab_size is {asked:,}, but {name} gives a tokenizer of kind {kind} only "
            f"{tokenizer.vocab_size:,} tokens; ask for no more, or name more text"
        )


def _report_progress(texts: Iterable[str], progress: "tqdm[Any]") -> Iterator[str]:
    for text in texts:
        yield text
        progress.update(len(text.encode()))


def _split_long_texts(texts: Iterable[str]) -> Iterator[str]:
    """Long texts in pieces, whole lines if they have any: a trainer takes many times the memory of what it is given."""
    for text in texts:
        start = 0
        while start < len(text):
            end = len(text)
            if end - start > BATCH_CHARACTERS:
                end = text.rfind("\n", start, start + BATCH_CHARACTERS) + 1 or start + BATCH_CHARACTERS
            yield text[start:end]
            start = end
