"""Tokenizers of every kind that can be trained, and of the forms in which models are published, built by hand."""

from collections.abc import Callable
from functools import cache

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.text.tokenizer_training import BYTES, TOKENIZER_KINDS
from tests.conftest import sentences

TEXTS = [sentences(seed, 20) for seed in range(10)]
SIZES = {"bpe": 300, "wordpiece": 560, "unigram": 300, "char": 24, "byte": 257}
LETTERS = sorted(set("".join(TEXTS)))


def gpt2(add_prefix_space: bool = False, normalizer: normalizers.Normalizer | None = None) -> Backend:
    backend = Backend(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=BYTES, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def llama2(metaspace: bool) -> Backend:
    """SentencePiece BPE with byte fallback, in its older form with a normalizer, or in its newer form."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *(c for c in LETTERS if c.strip())]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "s"), ("\u2581", "\u2581")]
    vocabulary = {piece: id_ for id_, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    backend.add_special_tokens(special)
    return backend


def bert() -> Backend:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [c for c in LETTERS if c.isalnum()]
    pieces = [*special, *letters, *("##" + c for c in letters), ".", "the", "##at", "bird"]
    backend = Backend(models.WordPiece({p: n for n, p in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))]
    )
    return backend


def t5() -> Backend:
    """SentencePiece Unigram, whose vocabulary contains the special tokens with the highest score."""
    special = ["<pad>", "</s>", "<unk>"]
    pieces = [*((name, 0.0) for name in special), ("\u2581", -2.0), ("\u2581the", -3.0), ("at", -4.0)]
    pieces += [(c, -5.0 - n / 100) for n, c in enumerate([*(c for c in LETTERS if c.strip()), "/"])]
    backend = Backend(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(special)
    return backend


def words() -> Backend:
    """Whole words without a decoder."""
    names = ["[SEP]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()})]
    backend = Backend(models.WordLevel({name: id_ for id_, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[SEP]", "[UNK]"])
    return backend


PUBLISHED: dict[str, Callable[[], Backend]] = {
    "GPT-2": gpt2,
    "RoBERTa with a space before the text": lambda: gpt2(add_prefix_space=True),
    "Qwen, which normalizes": lambda: gpt2(normalizer=normalizers.NFC()),
    "Llama 2": lambda: llama2(metaspace=False),
    "Mistral": lambda: llama2(metaspace=True),
    "BERT": bert,
    "T5": t5,
    "words": words,
}
FORMS = (*TOKENIZER_KINDS, *PUBLISHED)


@cache
def build_tokenizer(form: str) -> Tokenizer:
    """Build a tokenizer: one that is trained on ``TEXTS``, or a published one."""
    if form in PUBLISHED:
        return Tokenizer(PUBLISHED[form]())
    return Tokenizer.train(TEXTS, SIZES[form], form)
