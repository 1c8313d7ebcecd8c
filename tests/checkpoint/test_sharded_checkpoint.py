"""Sharded checkpoints: resharding, atomicity, and refusal of altered files."""

import json
import random
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_gpt_scratch.checkpoint import sharded_checkpoint
from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint
from lit_gpt_scratch.checkpoint.checkpoint_plugins import (
    AtomicCheckpointIO,
    BackgroundCheckpointIO,
    ShardedCheckpointIO,
)
from lit_gpt_scratch.checkpoint.run_folder import RunFolder, find_checkpoint
from lit_gpt_scratch.checkpoint.sharded_checkpoint import (
    MANIFEST,
    TRAINING_STATE,
    ShardedCheckpoint,
    has_unfinished_shards,
    is_sharded,
    named_tensors,
    save_sharded,
    verify_checkpoint,
)
from lit_gpt_scratch.distributed.parallelize import build_mesh, parallelize
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.local_shard import to_local
from lit_gpt_scratch.text.atomic_files import name_checksum
from tests.end_to_end import forked
from tests.mutations import fuzz, mutate_bytes, mutate_json, refuse_in_one_line

WORLD = 4
MESHES: Final = {"fsdp2": (4, 1, 1), "tp": (1, 4, 1), "fsdp2_tp": (2, 2, 1), "hsdp": (4, 1, 2)}
"""Arguments of ``build_mesh``, by strategy."""
CONFIGS: Final = {
    "default": GPTConfig(n_layer=2, n_head=4, n_embd=38, ffn_dim=52, head_dim=12),
    "tied": GPTConfig(n_layer=1, n_head=4, n_embd=38, ffn_dim=52, head_dim=12, tied_embeddings=True),
}
"""Few sizes are divisible by the number of processes."""


def build(gpt: GPTConfig) -> GPT:
    return GPT(gpt, 301, 64, seed=7)


def as_checkpoint(net: GPT) -> dict[str, Any]:
    """Checkpoint of a network with an optimizer state that differs from its weights."""
    moments = {
        index: {"exp_avg": p.detach() * 3, "step": torch.tensor(5.0)} for index, p in enumerate(net.parameters())
    }
    optimizer = {"state": moments, "param_groups": [{"params": list(moments), "lr": 0.1}]}
    state_dict = {name: weight.detach() for name, weight in net.state_dict().items()}
    return {"state_dict": state_dict, "optimizer_states": [optimizer], "global_step": 3, "notes": {"text": "ü"}}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    tensors = dict(sharded_checkpoint._find_tensors(one)), dict(sharded_checkpoint._find_tensors(other))
    assert tensors[0].keys() == tensors[1].keys()
    for name in tensors[0]:
        assert torch.equal(tensors[0][name], tensors[1][name]), name
    for state in one["optimizer_states"][0]["state"].values():
        assert state["step"] == 5
    assert (one["global_step"], one["notes"]) == (other["global_step"], other["notes"])


def sharded_network(gpt: GPTConfig, layout: str) -> GPT:
    with torch.device("meta"):
        net = GPT(gpt, 301, 64)
    parallelize(net, build_mesh("cpu", *MESHES[layout]), "32-true")
    net.materialize(torch.device("cpu"), 7)
    return net


def save_on_rank(rank: int, folder: str) -> None:
    """Save all layouts as one of several processes."""
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, init_method=f"file://{folder}/rendezvous")
    for layout, name in product(MESHES, CONFIGS):
        checkpoint = as_checkpoint(sharded_network(CONFIGS[name], layout))
        ShardedCheckpointIO().save_checkpoint(checkpoint, Path(folder, f"{layout}-{name}.ckpt"), dist.group.WORLD)
        if layout == "fsdp2":
            fail_on_one_rank(checkpoint, Path(folder, f"{layout}-{name}.ckpt"), rank)
    dist.barrier()


def fail_on_one_rank(checkpoint: dict[str, Any], path: Path, rank: int) -> None:
    """Fail to save on one of the ranks: all raise the same error, in the background, too."""
    changed = checkpoint | {"global_step": 4}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    writer = HuggingFaceStorageWriter
    for failing, part, step in (
        (2, writer, "write_data"), (3, sharded_checkpoint, "_record_shards"), (0, sharded_checkpoint, "_commit")
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            if rank == failing:
                patch.setattr(part, step, fail)
            with pytest.raises(UserError, match="No space left on device"):
                ShardedCheckpointIO().save_checkpoint(changed, path, dist.group.WORLD)
            plugin = BackgroundCheckpointIO(ShardedCheckpointIO())
            plugin.save_checkpoint(changed, path, dist.group.WORLD)
            with pytest.raises(UserError, match="No space left on device"):
                plugin.wait()


@pytest.fixture(scope="module")
def saved_by_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of checkpoints that four processes have saved."""
    folder = tmp_path_factory.mktemp("four")
    code = f"import sys\nfrom {__name__} import save_on_rank\nsave_on_rank(int(sys.argv[1]), sys.argv[2])"
    for done in forked.python_processes(code, [(str(rank), str(folder)) for rank in range(WORLD)]):
        assert done.code == 0, done.err
    return folder


@pytest.mark.parametrize("layout", MESHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_shards_are_assembled_in_one_process(saved_by_four: Path, layout: str, name: str) -> None:
    path, gpt = saved_by_four / f"{layout}-{name}.ckpt", CONFIGS[name]
    loaded, expected = AtomicCheckpointIO().load_checkpoint(path), as_checkpoint(build(gpt))
    same(loaded, expected)
    if gpt.tied_embeddings:
        assert loaded["state_dict"]["head.weight"] is loaded["state_dict"]["embedding.weight"]
    files = list(path.glob("shards-*/*.safetensors"))
    assert len(files) == WORLD
    contents = [load_file(file) for file in files]
    stored = sum(tensor.numel() for content in contents for tensor in content.values())
    # Each value is stored once: replicas and tied weights are not repeated.
    assert stored == sum(tensor.numel() for _, tensor in named_tensors(expected))
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 1.6 * min(sizes)


def check_resharding(folder: str) -> None:
    """Load each checkpoint with each layout, as one rank of four; loading needs no communication."""
    for saved, layout, name in product(MESHES, MESHES, CONFIGS):
        net = sharded_network(CONFIGS[name], layout)
        expected = {parameter: to_local(p.detach()).clone() for parameter, p in net.named_parameters()}
        targets = {f"state_dict.{parameter}": p.detach() for parameter, p in net.named_parameters()}
        for target in targets.values():
            to_local(target).fill_(torch.nan)
        ShardedCheckpoint.open(Path(folder, f"{saved}-{name}.ckpt")).read_tensors(targets)
        for parameter, p in net.named_parameters():
            assert torch.equal(to_local(p.detach()), expected[parameter]), (saved, layout, name, parameter)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), WORLD - 1])
@pytest.mark.slow
def test_each_layout_reads_the_shards_of_each_other(saved_by_four: Path, rank: int) -> None:
    start = f"import torch.distributed as dist\nfrom {__name__} import begin, check_resharding\nbegin({rank})\n"
    done = forked.python(f"{start}check_resharding({str(saved_by_four)!r})")
    assert done.code == 0, done.err


def begin(rank: int) -> None:
    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())


def test_formats_replace_each_other(tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "last.ckpt", as_checkpoint(build(CONFIGS["tied"]))
    for plugin, folder in ((AtomicCheckpointIO(), False), (ShardedCheckpointIO(), True)) * 2:
        plugin.save_checkpoint(checkpoint, path)
        assert path.is_dir() == folder
        assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
        same(plugin.load_checkpoint(path), checkpoint)
    plugin.remove_checkpoint(path)
    assert not path.exists()


def test_each_save_replaces_the_previous_one(tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "last.ckpt", as_checkpoint(build(CONFIGS["default"]))
    save_sharded(checkpoint, path)
    first = ShardedCheckpoint.open(path).folder
    (path / "notes.txt").write_text("mine")
    (path / "shards-of-mine").mkdir()
    abandoned = path / "shards-0123456789abcdef"  # as a killed process leaves it
    abandoned.mkdir()
    assert has_unfinished_shards(path)
    checkpoint["state_dict"]["norm.weight"] = checkpoint["state_dict"]["norm.weight"] + 1
    save_sharded(checkpoint, path)
    assert not first.exists()
    assert not abandoned.exists()
    assert {each.name for each in path.iterdir()} > {"notes.txt", "shards-of-mine", MANIFEST}
    same(ShardedCheckpoint.open(path).load(), checkpoint)


@pytest.mark.parametrize("step", ["_write_shards", "_record_shards", "_commit", "write_atomically", "save_checkpoint"])
@pytest.mark.parametrize("before", ["nothing", "file", "sharded"])
def test_failed_save_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, before: str
) -> None:
    run = RunFolder(tmp_path / "version_0")
    old, new = as_checkpoint(build(CONFIGS["tied"])), as_checkpoint(build(CONFIGS["default"]))
    if before != "nothing":
        (ShardedCheckpointIO() if before == "sharded" else AtomicCheckpointIO()).save_checkpoint(old, run.last)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharded_checkpoint, step, fail)
    with pytest.raises(UserError, match="No space left on device"):
        save_sharded(new, run.last)
    monkeypatch.undo()
    assert len(list(run.last.glob("shards-*"))) == (before == "sharded")
    if before == "nothing":
        assert not run.last_saved_at()
    else:
        same(AtomicCheckpointIO().load_checkpoint(find_checkpoint(str(run.path), tmp_path, None)), old)
    for plugin in (AtomicCheckpointIO(), ShardedCheckpointIO()):
        plugin.save_checkpoint(new, run.last)
        assert [each.name for each in run.checkpoints.iterdir()] == ["last.ckpt"]
        same(AtomicCheckpointIO().load_checkpoint(find_checkpoint(str(run.path), tmp_path, None)), new)


def copy_in_background(rank: int) -> None:
    """Copies of shards of which this process holds no part keep their global shapes."""
    dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
    mesh = build_mesh("cpu", 8, 1, 1)["data_parallel"]
    shapes = {"a": (4, 16), "head": (1, 16), "b": (4, 16), "c": (20, 16)}
    weights = {
        name: distribute_tensor(torch.ones(shape), mesh, [Shard(0)], src_data_rank=None)
        for name, shape in shapes.items()
    }
    copied: list[dict[str, Any]] = []
    plugin = BackgroundCheckpointIO()
    plugin.submit = lambda _, checkpoint, *__: copied.append(checkpoint)  # type: ignore[assignment,method-assign,return-value]
    plugin.save_checkpoint({"state_dict": weights | {"tied": weights["c"]}}, "x")
    [checkpoint] = copied
    for name, shape in shapes.items():
        assert checkpoint["state_dict"][name].shape == shape
        assert checkpoint["state_dict"][name] is not weights[name]
    assert checkpoint["state_dict"]["tied"] is checkpoint["state_dict"]["c"]


@pytest.mark.parametrize("rank", [0, 6])
def test_copies_in_the_background_keep_their_shapes(rank: int) -> None:
    done = forked.python(f"from {__name__} import copy_in_background\ncopy_in_background({rank})")
    assert done.code == 0, done.err


def test_missing_files_of_other_machines_are_reported_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, checkpoint = tmp_path / "last.ckpt", as_checkpoint(build(CONFIGS["tied"]))
    save_sharded(checkpoint, path)
    before = ShardedCheckpoint.open(path).manifest
    record_shards = sharded_checkpoint._record_shards

    def of_two_machines(folder: Path, rank: int) -> dict[str, Any]:
        own = record_shards(folder, rank)
        return own | {"shard-00002-model-00001-of-00001.safetensors": next(iter(own.values()))}

    monkeypatch.setattr(sharded_checkpoint, "_record_shards", of_two_machines)
    monkeypatch.setattr(sharded_checkpoint, "VISIBLE_SECONDS", 0.2)
    assert "shard-00002" in refuse_in_one_line(lambda: save_sharded(checkpoint, path))
    assert ShardedCheckpoint.open(path).manifest == before


def test_files_of_the_user_are_kept(tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "last.ckpt", as_checkpoint(build(CONFIGS["tied"]))
    backups = [tmp_path / name for name in ("previous-last.ckpt", f"replaced-{'0' * 32}-last.ckpt")]
    for backup in backups:
        backup.write_text("mine")
    target = tmp_path / "larger disk"
    save_sharded(checkpoint, target)
    path.symlink_to(target)
    for plugin in (ShardedCheckpointIO(), AtomicCheckpointIO()) * 2:
        plugin.save_checkpoint(checkpoint, path)
        same(plugin.load_checkpoint(path), checkpoint)
    same(ShardedCheckpoint.open(target).load(), checkpoint)
    assert {each.name for each in tmp_path.iterdir()} == {"last.ckpt", target.name, *(each.name for each in backups)}
    ShardedCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step=1.ckpt")
    (tmp_path / "step=1.ckpt" / "notes.txt").write_text("mine")
    ShardedCheckpointIO().remove_checkpoint(tmp_path / "step=1.ckpt")
    assert [each.name for each in (tmp_path / "step=1.ckpt").iterdir()] == ["notes.txt"]


def test_corrupted_manifest_is_replaced_by_the_next_save(tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "last.ckpt", as_checkpoint(build(CONFIGS["tied"]))
    save_sharded(checkpoint, path)
    (path / MANIFEST).write_text("{")
    assert has_unfinished_shards(path)
    save_sharded(checkpoint, path)
    same(ShardedCheckpoint.open(path).load(), checkpoint)
    assert len(list(path.iterdir())) == 2


@pytest.mark.parametrize("plugin", [AtomicCheckpointIO(), ShardedCheckpointIO()], ids=["file", "sharded"])
@pytest.mark.parametrize("names", [[], ["notes.txt"], [MANIFEST]], ids=["empty", "notes", "manifest"])
def test_folder_of_the_user_is_not_replaced(tmp_path: Path, plugin: AtomicCheckpointIO, names: list[str]) -> None:
    path, checkpoint = tmp_path / "results", as_checkpoint(build(CONFIGS["tied"]))
    path.mkdir()
    for name in names:
        (path / name).write_text("mine")
    if names:
        assert "folder with other files" in refuse_in_one_line(lambda: plugin.save_checkpoint(checkpoint, path))
        assert [each.name for each in path.iterdir()] == names
    else:  # nothing is lost
        plugin.save_checkpoint(checkpoint, path)
        same(plugin.load_checkpoint(path), checkpoint)
    assert [each.name for each in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interruption_is_not_reported_as_a_corrupted_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path, checkpoint = tmp_path / "last.ckpt", as_checkpoint(build(CONFIGS["tied"]))
    save_sharded(checkpoint, path)

    def interrupt(*_: Any) -> None:
        raise error

    monkeypatch.setattr(HuggingFaceStorageReader, "read_data", interrupt)
    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", interrupt)
    with pytest.raises(error):
        ShardedCheckpoint.open(path).load()
    with pytest.raises(error):
        save_sharded(checkpoint, path)
    monkeypatch.undo()
    same(ShardedCheckpoint.open(path).load(), checkpoint)


def test_folder_that_another_machine_does_not_see_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_checkpoint, "VISIBLE_SECONDS", 0.2)
    assert "all machines share" in refuse_in_one_line(lambda: sharded_checkpoint._require_folder(tmp_path / "x" / "y"))


def test_checkpoint_that_is_saved_again_while_it_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, checkpoint = tmp_path / "last.ckpt", as_checkpoint(build(CONFIGS["tied"]))
    save_sharded(checkpoint, path)
    verify_file = sharded_checkpoint._verify_file
    saves = iter([True, True, False])

    def save_first(*arguments: Any) -> None:
        if next(saves, False):
            save_sharded(checkpoint, path)
        verify_file(*arguments)

    monkeypatch.setattr(sharded_checkpoint, "_verify_file", save_first)
    same(ShardedCheckpoint.open(path).load(), checkpoint)


def test_checkpoint_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "last.ckpt", as_checkpoint(build(CONFIGS["tied"]))
    save_sharded(checkpoint, path)
    opened = ShardedCheckpoint.open(path)
    state = opened.read_training_state()
    save_sharded(checkpoint, path)
    assert state
    targets = {name: torch.empty_like(tensor) for name, tensor in named_tensors(checkpoint)}
    assert "it was replaced while it was read" in refuse_in_one_line(lambda: opened.read_tensors(targets))


def test_objects_that_could_not_be_loaded_again_are_refused(tmp_path: Path) -> None:
    checkpoint = as_checkpoint(build(CONFIGS["tied"])) | {"callbacks": {"mine": Path("x")}}
    refuse_in_one_line(lambda: save_sharded(checkpoint, tmp_path / "last.ckpt"))
    assert not is_sharded(tmp_path / "last.ckpt")


@pytest.fixture
def original(tmp_path: Path, saved_by_four: Path) -> Path:
    """Copy of a checkpoint of four processes."""
    shutil.copytree(saved_by_four / "fsdp2-tied.ckpt", tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def shard(path: Path, rank: int) -> Path:
    return next(path.glob(f"shards-*/shard-{rank + 1:05d}-*"))


def remove_shard(path: Path, other: Path) -> None:
    shard(path, 2).unlink()


def add_shard(path: Path, other: Path) -> None:
    shutil.copy(shard(path, 2), shard(path, 2).with_name("shard-00005-model-00001-of-00001.safetensors"))


def swap_shards(path: Path, other: Path) -> None:
    one, two = shard(path, 0), shard(path, 1)
    one.rename(path / "x")
    two.rename(one)
    (path / "x").rename(two)


def take_shard_of_another(path: Path, other: Path) -> None:
    shutil.copy(shard(other, 1), shard(path, 1))


def take_manifest_of_another(path: Path, other: Path) -> None:
    shutil.copy(other / MANIFEST, path / MANIFEST)


def remove_manifest(path: Path, other: Path) -> None:
    (path / MANIFEST).unlink()


def remove_training_state(path: Path, other: Path) -> None:
    next(path.glob(f"shards-*/{TRAINING_STATE}")).unlink()


ALTERATIONS: Final[dict[Callable[[Path, Path], None], str]] = {
    remove_shard: "shard-00003-model-00001-of-00001.safetensors is missing",
    add_shard: "shard-00005-model-00001-of-00001.safetensors is not in its manifest",
    swap_shards: "shard-00001-model-00001-of-00001.safetensors is corrupted",
    take_shard_of_another: "shard-00002-model-00001-of-00001.safetensors is corrupted",
    take_manifest_of_another: "is missing",
    remove_manifest: "manifest.json is missing",
    remove_training_state: "training_state.ckpt is missing",
}


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda alter: alter.__name__)
def test_altered_checkpoint_is_refused_by_name(
    original: Path, saved_by_four: Path, alter: Callable[[Path, Path], None]
) -> None:
    alter(original, saved_by_four / "hsdp-tied.ckpt")
    assert ALTERATIONS[alter] in refuse_in_one_line(lambda: verify_checkpoint(original))


def resign(path: Path, **changes: Any) -> None:
    """Change a manifest and its checksum, as somebody could who alters a checkpoint on purpose."""
    manifest = json.loads((path / MANIFEST).read_text())
    files = {file.name: sharded_checkpoint._record_file(file) for file in next(path.glob("shards-*")).iterdir()}
    content = {"version": manifest["version"], "folder": manifest["folder"], "files": files} | changes
    (path / MANIFEST).write_text(json.dumps(content | {"sha256": sharded_checkpoint._digest(content)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "newer version"),
        ({"folder": "../shards-0123456789abcdef"}, "names other files"),
        ({"folder": "."}, "names other files"),
        ({"files": {}}, "names other files"),
        ({"files": {"../x": {"bytes": 0, "sha256": ""}}}, "names other files"),
        ({"files": {TRAINING_STATE: {"bytes": "0", "sha256": ""}}}, "bytes"),
        ({"files": []}, "files"),
    ],
)
def test_invalid_manifest_is_refused(original: Path, changes: dict[str, Any], message: str) -> None:
    resign(original, **changes)
    assert message in refuse_in_one_line(lambda: verify_checkpoint(original))


FAULTS = [
    *("missing part", "repeated part", "missing tensor", "other shape"),
    *("huge", "meta elsewhere", "not a dict", "cycle"),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_signed_checkpoint_whose_tensors_do_not_match_is_refused(original: Path, fault: str) -> None:
    """The checksums match, as if a program had written a wrong checkpoint."""
    file = shard(original, 0)
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("state_dict."))
    if fault in ("huge", "meta elsewhere", "not a dict", "cycle"):
        state_file = next(original.glob(f"shards-*/{TRAINING_STATE}"))
        state = torch.load(state_file, weights_only=True)
        if fault == "huge":
            state["state_dict"]["norm.weight"] = torch.empty(10**12, device="meta")
        elif fault == "meta elsewhere":
            state["optimizer_states"][0]["state"][0]["step"] = torch.empty((), device="meta")
        elif fault == "cycle":
            state["notes"] = state
        else:
            state["state_dict"] = [1]
        save_checkpoint(state, state_file)
    elif fault == "repeated part":
        tensors = load_file(shard(original, 1))
        with safe_open(str(shard(original, 1)), framework="pt") as stream:
            metadata = stream.metadata()
        info = json.loads(metadata["DCP_SHARDING_INFO"])
        name = next(name for name in tensors if tensors[name].ndim == 2 and name.startswith("state_dict."))
        info[name]["saved_offsets"][0] = 0
        metadata["DCP_SHARDING_INFO"] = json.dumps(info)
        save_file(tensors, shard(original, 1), metadata)
    else:
        with safe_open(str(file), framework="pt") as stream:
            metadata = stream.metadata()
        if fault == "other shape":
            tensors[name] = tensors[name][..., None].contiguous()
            info = json.loads(metadata["DCP_SHARDING_INFO"])
            info[name]["saved_offsets"].append(0)
            metadata["DCP_SHARDING_INFO"] = json.dumps(info)
        for rank in range(WORLD) if fault == "missing tensor" else [0]:
            kept = load_file(shard(original, rank)) if rank else tensors
            if fault != "other shape":
                kept.pop(name, None)
            save_file(kept, shard(original, rank), metadata)
    resign(original)
    refuse_in_one_line(lambda: ShardedCheckpoint.open(original).load())


def attempt_on(original: Path, folder: Path) -> Callable[[int, random.Random], object]:
    """Return a function that alters one file of a copy of a checkpoint, and must be refused."""

    def attempt(seed: int, rng: random.Random) -> None:
        copy = folder / "copy.ckpt"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        file = rng.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
        content = file.read_bytes()
        if file.name == MANIFEST and rng.random() < 0.5:
            altered = json.dumps(mutate_json(json.loads(content), rng)).encode()
        else:
            altered = mutate_bytes(content, rng)
        if altered == content or (file.name == MANIFEST and _equal_json(altered, content)):
            return
        file.write_bytes(altered)
        with pytest.raises(UserError, match=re.escape(file.name)) as refused:
            ShardedCheckpoint.open(copy).load()
        raise refused.value

    return attempt


def _equal_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except (ValueError, RecursionError):
        return False


@pytest.mark.parametrize("n", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_every_altered_file_is_refused_by_name(original: Path, tmp_path: Path, n: int) -> None:
    fuzz("sharded checkpoint", tmp_path, range(n), attempt_on(original, tmp_path))


@pytest.mark.parametrize("content", ["nothing", "shards", "unfinished manifest", "notes"])
def test_run_folder_with_an_incomplete_checkpoint_only_is_deleted(tmp_path: Path, content: str) -> None:
    run = RunFolder(tmp_path / "runs" / "x" / "version_0")
    if content == "unfinished manifest":
        (run.last / "shards-0123456789abcdef").mkdir(parents=True)
        token = "0" * 16
        name = f".{MANIFEST}.{token}{name_checksum(MANIFEST, token)}.unfinished"
        (run.last / name).write_text("{")
    elif content != "nothing":
        folder = run.last / "shards-0123456789abcdef"
        folder.mkdir(parents=True)
        (folder / TRAINING_STATE).write_bytes(b"x")
    else:
        run.last.mkdir(parents=True)
    if content == "notes":
        (run.last / "notes.txt").write_text("mine")
    run.delete()
    assert run.path.exists() == (content == "notes")


def test_shard_that_is_no_file_is_refused(original: Path) -> None:
    file = shard(original, 1)
    manifest = json.loads((original / MANIFEST).read_text())
    file.unlink()
    file.symlink_to("/dev/zero")
    manifest["files"][file.name]["bytes"] = 0
    content = {key: manifest[key] for key in ("version", "folder", "files")}
    (original / MANIFEST).write_text(json.dumps(content | {"sha256": sharded_checkpoint._digest(content)}))
    assert file.name in refuse_in_one_line(lambda: verify_checkpoint(original))


def test_a_run_folder_finds_its_sharded_checkpoint(tmp_path: Path) -> None:
    run, checkpoint = RunFolder(tmp_path / "version_0"), as_checkpoint(build(CONFIGS["tied"]))
    ShardedCheckpointIO().save_checkpoint(checkpoint, run.checkpoints / "step=1.ckpt")
    ShardedCheckpointIO().save_checkpoint(checkpoint, run.last)
    assert find_checkpoint(str(run.path), tmp_path, None) == run.last
    assert find_checkpoint(str(run.last), tmp_path, None) == run.last
    shard(run.last, 0).write_bytes(b"x")
    assert find_checkpoint(str(run.path), tmp_path, None) == run.checkpoints / "step=1.ckpt"
    assert run.last_saved_at() > 0
