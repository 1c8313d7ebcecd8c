"""Checkpoints with wrong types, sizes and shapes: one error before memory is allocated, whatever the file says."""

import json
import random
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_gpt_scratch.callbacks.checkpointing import Checkpointing
from lit_gpt_scratch.callbacks.spike_guard import SpikeGuard
from lit_gpt_scratch.callbacks.summary import RunMetadata, RunSummary
from lit_gpt_scratch.callbacks.throughput import Throughput
from lit_gpt_scratch.checkpoint.adapters import apply_adapter, save_adapter
from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint
from lit_gpt_scratch.checkpoint.checkpoint_plugins import AtomicCheckpointIO
from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX, build_model, load_checkpoint
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, CheckpointMetadata
from lit_gpt_scratch.checkpoint.safetensors_export import export_safetensors
from lit_gpt_scratch.cli.resume import ResumedRun
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.lora import LoRA
from lit_gpt_scratch.tasks import LanguageModel
from tests.conftest import TINY, sentences
from tests.end_to_end import forked
from tests.mutations import DEPTH, fuzz, mutate_bytes, mutate_json, refuse_in_one_line

Build = Callable[..., L.Trainer]


def make_trainer(folder: Path) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=1, max_steps=3, logger=False, enable_checkpointing=True,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        use_distributed_sampler=False, plugins=[AtomicCheckpointIO()],
        callbacks=[RunMetadata(), SpikeGuard("warn"), Throughput(), RunSummary(), Checkpointing()],
    )  # fmt: skip


def make_task() -> LanguageModel:
    return LanguageModel(gpt=TINY, compile=False, ema_decay=0.9)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PackedText:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "text").mkdir()
    for seed in range(20):
        (folder / "text" / f"{seed}.txt").write_text(sentences(seed), encoding="utf-8")
    return PackedText(
        source=str(folder / "text"), vocab_size=280, block_size=32, batch_size=4, cache=str(folder / "cache")
    )


@pytest.fixture(scope="module")
def saved(data: PackedText, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Checkpoint of a run of two steps, with the states of our callbacks."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder)
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(make_task(), data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return load_checkpoint(folder / "last.ckpt")


def changed(saved: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    """Copy a checkpoint with other metadata; a nested field is named with two underscores."""
    copy = {**saved, METADATA_KEY: deepcopy(saved[METADATA_KEY])}
    for name, value in metadata.items():
        part, _, field = name.rpartition("__")
        (copy[METADATA_KEY][part] if part else copy[METADATA_KEY])[field] = value
    return copy


def load(checkpoint: dict[str, Any], path: Path) -> None:
    save_checkpoint(checkpoint, path)
    build_model(load_checkpoint(path), path)


WRONG = {
    "gpt": None, "gpt__n_layer": "2", "gpt__n_embd": [32], "gpt__qk_norm": 1, "gpt__norm": "batchnorm",
    "gpt__attention": 3, "gpt__rotary_base": float("nan"), "gpt__position": None, "vocab_size": "280",
    "block_size": 0, "tokenizer": b"x", "start_of_text": [0], "lora": 3, "lora__rank": 8, "base": 7, "new_head": "no",
    "classes": "ab", "pooling": 9, "rewards": None,
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_metadata_of_another_type(saved: dict[str, Any], tmp_path: Path, field: str) -> None:
    value = WRONG[field]
    if field == "lora__rank":
        field, value = "lora", {"rank": "8"}
    with pytest.raises(UserError) as refused:
        load(changed(saved, **{field: value}), tmp_path / "x.ckpt")
    assert "\n" not in str(refused.value)
    assert field.rpartition("__")[2] in str(refused.value)


def test_start_of_text_and_classes_out_of_range(saved: dict[str, Any], tmp_path: Path) -> None:
    for field, value in (("start_of_text", 280), ("start_of_text", -1), ("classes", []), ("vocab_size", -1)):
        with pytest.raises(UserError, match=field):
            load(changed(saved, **{field: value}), tmp_path / "x.ckpt")


def test_a_newer_version_is_not_called_foreign(saved: dict[str, Any], tmp_path: Path) -> None:
    for field in ("optimal", "gpt__mixture"):
        with pytest.raises(UserError, match="written by a newer version of lit_gpt_scratch"):
            load(changed(saved, **{field: 4}), tmp_path / "x.ckpt")
    foreign = {key: value for key, value in saved.items() if key != METADATA_KEY}
    with pytest.raises(UserError, match="not written by lit_gpt_scratch"):
        CheckpointMetadata.from_checkpoint(foreign)


SIZES = [
    {"gpt__n_layer": 10**9}, {"gpt__n_layer": 9_999}, {"gpt__n_layer": 10**30}, {"gpt__n_embd": 2**30},
    {"gpt__n_embd": 10**18}, {"gpt__n_head": 2**30, "gpt__head_dim": 1}, {"gpt__ffn_dim": 2**31 - 1},
    {"gpt__vocab_multiple": 2**31 - 1}, {"gpt__bigram_rows": 2**31 - 1}, {"gpt__head_dim": 2**30},
    {"gpt__n_head": 50_000, "gpt__head_dim": 1, "gpt__position": "alibi"}, {"vocab_size": 10**12},
    {"block_size": 2**31 - 1}, {"block_size": 10**18}, {"block_size": 2**31 - 1, "gpt__position": "learned"},
    {"block_size": 2**31 - 1, "gpt__position": "sinusoidal"}, {"lora": asdict(LoRA(rank=8)) | {"rank": 10**12}},
    {"lora": asdict(LoRA(rank=8)) | {"pattern": "(([a-z.]+)+)+$x"}}, {"classes": ["a"] * 100_000},
    {"gpt__rotary_base": 1e308, "gpt__rotary_scaling": "ntk", "gpt__rotary_factor": 1e308},
    {"gpt__rotary_share": 1e-300},
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: " ".join(sizes))
def test_sizes_are_compared_with_the_tensors(saved: dict[str, Any], tmp_path: Path, sizes: dict[str, Any]) -> None:
    save_checkpoint(changed(saved, **sizes), tmp_path / "x.ckpt")
    refuse_in_one_line(lambda: build_model(load_checkpoint(tmp_path / "x.ckpt"), tmp_path / "x.ckpt"))


LIMITED = """
import resource, sys
from pathlib import Path
from lit_gpt_scratch.checkpoint.loading import build_model, load_checkpoint
from lit_gpt_scratch.errors import UserError
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in map(Path, sys.argv[1:]):
    try:
        build_model(load_checkpoint(path), path)
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of a process from /proc")
@pytest.mark.slow
def test_sizes_take_less_than_a_gigabyte(saved: dict[str, Any], tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.ckpt" for number in range(len(SIZES))]
    for path, sizes in zip(paths, SIZES, strict=True):
        save_checkpoint(changed(saved, **sizes), path)
    done = forked.python(LIMITED, *paths)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == len(SIZES)


def test_state_dict_of_another_type(saved: dict[str, Any], tmp_path: Path) -> None:
    weight = saved["state_dict"][f"{STATE_PREFIX}norm.weight"]
    wide = torch.zeros(1).expand(10**6, 10**6)
    shared = dict.fromkeys(map(str, range(100)), torch.zeros(1000))
    name = f"{STATE_PREFIX}embedding.weight"
    for state in (
        None, [], {}, {1: weight}, {name: 3}, {name: wide}, {name: weight.to_sparse()}, {name: weight.to("meta")},
        saved["state_dict"] | {name: saved["state_dict"][name].int()}, saved["state_dict"] | {name: weight},
        saved["state_dict"] | shared,
        saved["state_dict"] | {name: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)},
    ):  # fmt: skip
        with pytest.raises(UserError) as refused:
            load(saved | {"state_dict": state}, tmp_path / "x.ckpt")
        assert "\n" not in str(refused.value)


def test_tensors_of_the_training_state_are_dense(saved: dict[str, Any], tmp_path: Path) -> None:
    wide = torch.zeros(1).expand(4, 4)
    for name, value in (
        ("optimizer_states", [{"state": {0: {"exp_avg": wide}}, "param_groups": []}]),
        ("callbacks", {"X": {"a": [(wide,)]}}),
        ("other", torch.zeros(3).to_sparse()),
    ):
        save_checkpoint(saved | {name: value}, tmp_path / "x.ckpt")
        with pytest.raises(UserError, match=f"is corrupted: {name} is not a dense tensor"):
            load_checkpoint(tmp_path / "x.ckpt")


def test_containers_that_contain_themselves(saved: dict[str, Any], tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["again"] = [loop]
    save_checkpoint(saved | {"other": loop}, tmp_path / "x.ckpt")
    assert load_checkpoint(tmp_path / "x.ckpt")["global_step"] == 2


def test_compressed_records_are_refused(saved: dict[str, Any], tmp_path: Path) -> None:
    """A kilobyte of compressed zeros would be a megabyte in memory."""
    save_checkpoint(saved, tmp_path / "x.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "x.ckpt") as before,
        zipfile.ZipFile(tmp_path / "y.ckpt", "w", zipfile.ZIP_DEFLATED) as after,
    ):
        for record in before.infolist():
            after.writestr(record.filename, before.read(record))
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "y.ckpt")


def test_tokenizer_with_more_tokens_than_the_network(saved: dict[str, Any], tmp_path: Path) -> None:
    spec = json.loads(saved[METADATA_KEY]["tokenizer"])
    spec["model"]["vocab"]["zz"] = 300
    with pytest.raises(UserError, match="its tokenizer has 301 tokens, but its vocab_size is 280"):
        load(changed(saved, tokenizer=json.dumps(spec)), tmp_path / "x.ckpt")


def test_callback_state_cannot_delete_other_files(saved: dict[str, Any]) -> None:
    callback = Checkpointing()
    callback.load_state_dict({"best": {"../../thesis.tex": 1.0, "step=3.ckpt": 2.0}})
    assert callback.best == {"step=3.ckpt": 2.0}


def resume(checkpoint: dict[str, Any], data: PackedText, path: Path, train: bool = True) -> None:
    """Resume from a checkpoint as ``fit`` does."""
    save_checkpoint(checkpoint, path)
    trainer = make_trainer(path.parent)
    ResumedRun(path).steps_done(trainer)
    if train:
        trainer.fit(make_task(), data, ckpt_path=path)


@pytest.mark.parametrize(
    "part", ["epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers", "layout"]
)
@pytest.mark.parametrize("value", [None, [], {}, "x", -1, [3], {"x": {}}])
def test_training_state_of_another_type(
    saved: dict[str, Any], data: PackedText, tmp_path: Path, part: str, value: Any
) -> None:
    with suppress(UserError):
        resume(saved | {part: value}, data, tmp_path / "x.ckpt", train=False)


@pytest.mark.parametrize("value", [None, [], {}, 3, "x", {"best": 3}, {"best": {"step=1.ckpt": "x"}}])
def test_callback_states_of_another_type(saved: dict[str, Any], data: PackedText, tmp_path: Path, value: Any) -> None:
    for name in saved["callbacks"]:
        with suppress(UserError):
            resume(saved | {"callbacks": saved["callbacks"] | {name: value}}, data, tmp_path / "x.ckpt", train=False)


def fuzz_metadata(saved: dict[str, Any], path: Path, seeds: range) -> None:
    # A tokenizer mutated as text would mostly fail in the same way; it has a test of its own.
    def attempt(seed: int, rng: random.Random) -> None:
        load(saved | {METADATA_KEY: mutate_json(saved[METADATA_KEY], rng)}, path)

    fuzz("checkpoint metadata", path.parent, seeds, attempt)


def fuzz_bytes(saved: dict[str, Any], path: Path, seeds: range) -> None:
    """Damage a file, and give it the right checksum."""
    torch.save(saved, path)
    whole = path.read_bytes()

    def attempt(seed: int, rng: random.Random) -> None:
        path.write_bytes(mutate_bytes(whole, rng))
        build_model(load_checkpoint(path), path)

    fuzz("checkpoint bytes", path.parent, seeds, attempt)


def fuzz_training_state(saved: dict[str, Any], data: PackedText, path: Path, seeds: range) -> None:
    parts = ("epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers", "layout")
    rest = {key: value for key, value in saved.items() if key not in parts}

    def attempt(seed: int, rng: random.Random) -> None:
        mutated = mutate_json({part: saved[part] for part in parts if part in saved}, rng)
        resume(rest | mutated, data, path, train=seed % 5 == 0)

    fuzz("training state", path.parent, seeds, attempt)


def fuzz_safetensors(saved: dict[str, Any], path: Path, seeds: range) -> None:
    """Mutate the metadata with the right checksum, the header, and the bytes."""
    weights = {name: weight for name, weight in saved["state_dict"].items() if name.startswith(STATE_PREFIX)}

    def attempt(seed: int, rng: random.Random) -> None:
        metadata = mutate_json(saved[METADATA_KEY], rng) if seed % 3 == 0 else saved[METADATA_KEY]
        export_safetensors({METADATA_KEY: metadata, "state_dict": weights}, STATE_PREFIX, path)
        content = path.read_bytes()
        if seed % 3 == 1:
            (size,) = struct.unpack("<Q", content[:8])
            header = json.dumps(mutate_json(json.loads(content[8 : 8 + size]), rng)).encode()
            content = struct.pack("<Q", len(header)) + header + content[8 + size :]
        elif seed % 3 == 2:
            content = mutate_bytes(content, rng)
        path.write_bytes(content)
        build_model(load_checkpoint(path), path)

    fuzz("safetensors", path.parent, seeds, attempt)


@pytest.fixture(scope="module")
def adapter(saved: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A base model, and a file with adapters for it."""
    from lit_gpt_scratch.checkpoint.adapters import hash_base_weights
    from lit_gpt_scratch.model.lora import add_lora

    folder = tmp_path_factory.mktemp("adapter")
    save_checkpoint(saved, folder / "base.ckpt")
    base = build_model(load_checkpoint(folder / "base.ckpt"), folder / "base.ckpt")
    net = GPT(base.net.config, base.net.vocab_size, base.net.block_size)
    net.load_state_dict(base.net.state_dict())
    digest = hash_base_weights(net.state_dict(), False)
    add_lora(net, LoRA(rank=2))
    metadata = saved[METADATA_KEY] | {"lora": asdict(LoRA(rank=2)), "base": digest}
    state = {STATE_PREFIX + name: weight for name, weight in net.state_dict().items()}
    save_checkpoint({METADATA_KEY: metadata, "state_dict": state}, folder / "tuned.ckpt")
    save_adapter(folder / "tuned.ckpt", folder / "adapter.safetensors")
    return base, folder / "adapter.safetensors"


def fuzz_adapter(adapter: tuple[Any, Path], path: Path, seeds: range) -> None:
    base, whole = adapter
    contents = load_adapter(whole)

    def attempt(seed: int, rng: random.Random) -> None:
        metadata = mutate_json(contents[METADATA_KEY], rng) if seed % 2 else contents[METADATA_KEY]
        export_safetensors({METADATA_KEY: metadata, "state_dict": contents["state_dict"]}, "", path)
        if seed % 2 == 0:
            path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        apply_adapter(base, path)

    fuzz("adapter", path.parent, seeds, attempt)


def load_adapter(path: Path) -> dict[str, Any]:
    from lit_gpt_scratch.checkpoint.safetensors_export import load_safetensors

    return load_safetensors(path, "")


@pytest.mark.parametrize(
    "change",
    [
        {"gpt": {"n_layer": 10**9}}, {"gpt": {"n_embd": 2**30}}, {"lora": {"rank": 10**12}}, {"block_size": 2**31 - 1},
        {"lora": {"pattern": "(([a-z.]+)+)+$x"}}, {"classes": ["a"] * 100_000, "new_head": True}, {"gpt": []},
        {"lora": {"rank": None}}, {"new_head": True},
    ],
)  # fmt: skip
def test_hostile_adapter(adapter: tuple[Any, Path], tmp_path: Path, change: dict[str, Any]) -> None:
    base, whole = adapter
    contents = load_adapter(whole)
    metadata = dict(contents[METADATA_KEY])
    for name, value in change.items():
        metadata[name] = {**metadata[name], **value} if isinstance(value, dict) else value
    export_safetensors({METADATA_KEY: metadata, "state_dict": contents["state_dict"]}, "", tmp_path / "x.safetensors")
    refuse_in_one_line(lambda: apply_adapter(base, tmp_path / "x.safetensors"))


def test_deep_metadata_of_safetensors(saved: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import save

    from lit_gpt_scratch.checkpoint.safetensors_export import compute_digest

    deep = '{"gpt": ' * DEPTH
    header = {METADATA_KEY: deep, "sha256": compute_digest(deep, {})}
    (tmp_path / "x.safetensors").write_bytes(save({}, header))
    with pytest.raises(UserError, match="nested more than"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_damaged_checkpoints(
    saved: dict[str, Any], data: PackedText, adapter: tuple[Any, Path], tmp_path: Path
) -> None:
    fuzz_metadata(saved, tmp_path / "x.ckpt", range(50))
    fuzz_bytes(saved, tmp_path / "x.ckpt", range(50))
    fuzz_training_state(saved, data, tmp_path / "x.ckpt", range(50))
    fuzz_safetensors(saved, tmp_path / "x.safetensors", range(50))
    fuzz_adapter(adapter, tmp_path / "x.safetensors", range(50))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("form", ["metadata", "bytes", "training state", "safetensors", "adapter"])
def test_many_damaged_checkpoints(
    saved: dict[str, Any], data: PackedText, adapter: tuple[Any, Path], tmp_path: Path, form: str
) -> None:
    seeds = range(50, 550)
    match form:
        case "metadata":
            fuzz_metadata(saved, tmp_path / "x.ckpt", seeds)
        case "bytes":
            fuzz_bytes(saved, tmp_path / "x.ckpt", seeds)
        case "training state":
            fuzz_training_state(saved, data, tmp_path / "x.ckpt", seeds)
        case "safetensors":
            fuzz_safetensors(saved, tmp_path / "x.safetensors", seeds)
        case _:
            fuzz_adapter(adapter, tmp_path / "x.safetensors", seeds)
