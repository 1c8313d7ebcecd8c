"""Networks that are built on the meta device, sharded, and then initialized.

The processes of a group are simulated, each in a process of its own, because torch keeps the meshes of a process.
"""

from dataclasses import asdict
from itertools import product
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lit_gpt_scratch.checkpoint.init_from import copy_weights
from lit_gpt_scratch.checkpoint.loading import StoredModel
from lit_gpt_scratch.checkpoint.metadata import CheckpointMetadata
from lit_gpt_scratch.distributed.parallelize import DATA_PARALLEL, SHARD, TENSOR_PARALLEL, build_mesh, parallelize
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.tensor_stream import LazyTensors
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.attention import Attention
from lit_gpt_scratch.model.local_shard import shard_slices, to_local
from lit_gpt_scratch.model.lora import LoRA, add_lora
from lit_gpt_scratch.model.weight_sampler import WeightSampler
from lit_gpt_scratch.optim import AdamW, Muon
from tests.end_to_end import forked

VOCAB, BLOCK_SIZE, SEED, WORLD = 301, 64, 7, 4
MESHES: Final = {"fsdp2": (4, 1, 1), "tp": (1, 4, 1), "fsdp2_tp": (2, 2, 1), "hsdp": (4, 1, 2)}
"""Arguments of ``build_mesh``, by strategy."""
CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "tied": {"tied_embeddings": True, "initialisation": "gpt2"},
    "additions": {
        "value_embeddings": True, "bigram_rows": 50, "smear": True, "residual_scalars": True, "bias": True,
        "norm_placement": "sandwich",
    },
    "learned positions": {
        "position": "learned", "norm": "layernorm", "initialisation": "xavier", "bias": True,
    },
    "norms of outputs": {"norm_placement": "output", "qkv_bias": True, "rotary_skip_every": 2},
    "experts": {"feed_forward": "moe", "n_experts": 8, "n_shared_experts": 2, "expert_bias_rate": 0.001},
    "experts, not divisible": {"feed_forward": "moe", "n_experts": 6, "initialisation": "normal", "bias": True},
    "multi-token prediction": {"multi_token_depth": 2},
    "latent attention": {"attention": "latent", "latent_kv_rank": 30, "latent_query_rank": 17, "attention_sinks": True},
    "zero-centered norms": {"norm": "zero_centered_rmsnorm", "norm_placement": "sandwich", "scaled_embeddings": True},
    "local blocks, sinks": {
        "sliding_window": 8, "sliding_window_pattern": 2, "rotary_local_base": 50.0, "attention_sinks": True,
    },
    "joint norms": {"qk_norm_joint": True},
    "mup": {
        "parametrisation": "mup", "mup_base_width": 19, "mup_base_head_dim": 6, "tied_embeddings": True,
        "initialisation": "normal", "smear": True,
    },
    "sinusoidal positions": {"position": "sinusoidal", "initialisation": "normal", "norm_placement": "post"},
}  # fmt: skip


def config(**changes: Any) -> GPTConfig:
    """Few sizes are divisible by the number of processes."""
    return GPTConfig(**({"n_layer": 2, "n_head": 4, "n_embd": 38, "ffn_dim": 52, "head_dim": 12} | changes))


def on_meta(gpt: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(gpt, VOCAB, BLOCK_SIZE)


def begin(rank: int) -> None:
    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())


def in_simulated_process(function: str, rank: int) -> None:
    done = forked.python(f"from {__name__} import begin, {function}\nbegin({rank})\n{function}()")
    assert done.code == 0, done.err


def check_networks() -> None:
    """Compare the shards of this process with parts of a network that was built as a whole."""
    for layout, (name, changes) in product(MESHES, CONFIGS.items()):
        is_split = MESHES[layout][1] > 1
        if (name == "joint norms" and is_split) or (name == "experts, not divisible" and layout == "tp"):
            continue  # not supported
        if layout != "fsdp2_tp" and name not in ("tied", "additions", "joint norms", "mup", "experts, not divisible"):
            continue
        gpt, mesh = config(**changes), build_mesh("cpu", *MESHES[layout])
        whole, sharded = GPT(gpt, VOCAB, BLOCK_SIZE, seed=SEED), on_meta(gpt)
        parallelize(sharded, mesh, "32-true")
        sharded.materialize(torch.device("cpu"), SEED)
        assert (sharded.head.weight is sharded.embedding.weight) == gpt.tied_embeddings
        n_sharded = 0
        for (parameter, p), q in zip(sharded.named_parameters(), whole.parameters(), strict=True):
            assert p.shape == q.shape
            assert torch.equal(to_local(p), part_of(q, p)), (layout, name, parameter)
            n_sharded += to_local(p).shape != q.shape
        assert n_sharded > len(list(whole.parameters())) / 2
        for (buffer, one), (_, other) in zip(sharded.named_buffers(), whole.named_buffers(), strict=True):
            assert torch.equal(one, other), (layout, name, buffer)
        for recipe in (AdamW(), Muon()):
            assert hyperparameters(recipe, sharded) == hyperparameters(recipe, whole), (layout, name)


def hyperparameters(recipe: AdamW | Muon, net: GPT) -> dict[str, tuple[Any, ...]]:
    """The update rule and the hyperparameters of each parameter."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    return {
        names[parameter]: tuple(group.get(key) for key in ("name", "rule", "lr", "weight_decay", "eps"))
        for group in recipe.build(net).param_groups
        for parameter in group["params"]
    }


def part_of(whole: Tensor, sharded: Tensor) -> Tensor:
    """The part that FSDP2 on top of tensor parallelism assigns to this process, computed by ``torch.chunk``."""
    if isinstance(sharded, DTensor):
        mesh = sharded.device_mesh
        coordinate = dict(zip(mesh.mesh_dim_names or (), mesh.get_coordinate() or (), strict=True))
        placement = dict(zip(mesh.mesh_dim_names or (), sharded.placements, strict=True))
        for dimension in (TENSOR_PARALLEL, SHARD, DATA_PARALLEL):  # in the order in which they are applied
            if dimension in placement and not placement[dimension].is_replicate():
                chunks = whole.chunk(mesh[dimension].size(), placement[dimension].dim)  # type: ignore[attr-defined]
                index = coordinate[dimension]
                whole = chunks[index] if index < len(chunks) else whole[:0]
    return whole


def check_parameters() -> None:
    """Compare the shards of single parameters with torch's own sharding of the whole parameter."""
    mesh = init_device_mesh("cpu", (2, 2))
    for shape, *dimensions in product([(1,), (5,), (4, 6), (7, 3), (3, 1, 5), (300, 500)], (None, 0, 1), (None, 0, 1)):
        if any(d is not None and d >= len(shape) for d in dimensions) or dimensions == [0, 0] or dimensions == [1, 1]:
            continue
        placements: list[Placement] = [Replicate() if d is None else Shard(d) for d in dimensions]
        module = nn.ParameterDict({"weight": nn.Parameter(torch.empty(shape))})
        sampler = WeightSampler(module, SEED)
        with torch.no_grad():
            sampler.normal_(module["weight"], 1.0)
            whole = module["weight"].clone()
            expected = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            module["weight"] = nn.Parameter(torch.zeros_like(expected))
            WeightSampler(module, SEED).normal_(module["weight"], 1.0)
        assert torch.equal(module["weight"].data.to_local(), expected.to_local()), (shape, dimensions)
        assert torch.equal(whole[tuple(shard_slices(expected))], expected.to_local()), (shape, dimensions)


def check_pretrained() -> None:
    """Compare shards of a pretrained model with parts of it, and shards of new adapters with whole ones."""
    gpt = config(tied_embeddings=True, bias=True)
    pretrained, lora = GPT(gpt, VOCAB, BLOCK_SIZE, seed=SEED + 1), LoRA(rank=4)
    weights = {name: weight.clone() for name, weight in pretrained.state_dict().items()}
    metadata = CheckpointMetadata(asdict(gpt), VOCAB, BLOCK_SIZE, "{}")
    lazy = LazyTensors({name: weight.to("meta") for name, weight in weights.items()}, weights.__getitem__)
    add_lora(pretrained, lora, SEED)
    whole = dict(pretrained.named_parameters())
    for layout in ("fsdp2", "hsdp"):
        net = on_meta(gpt)
        add_lora(net, lora, SEED)
        parallelize(net, build_mesh("cpu", *MESHES[layout]), "32-true")
        net.materialize(torch.device("cpu"), SEED)
        copy_weights(StoredModel(gpt, None, lazy, metadata), net)
        assert net.state_dict().keys() == pretrained.state_dict().keys()
        for name, p in net.named_parameters():
            assert torch.equal(to_local(p), part_of(whole[name], p)), (layout, name)
            assert p.requires_grad == whole[name].requires_grad == ("lora" in name)


QUICK_RANKS: Final = (WORLD - 1,)  # whose shards are the most uneven


@pytest.mark.parametrize(
    "rank", [pytest.param(r, marks=[] if r in QUICK_RANKS else pytest.mark.slow) for r in range(WORLD)]
)
@pytest.mark.parametrize("function", ["check_networks", "check_parameters", "check_pretrained"])
def test_shards_are_parts_of_the_whole(function: str, rank: int) -> None:
    in_simulated_process(function, rank)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that is allocated on the CPU, in bytes."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor) and tensor.device.type == "cpu":
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return out


def check_allocations() -> None:
    gpt = config(n_embd=256, ffn_dim=4096, head_dim=64)
    mesh = build_mesh("cpu", *MESHES["fsdp2"])
    with CommDebugMode() as communication, LargestTensor() as largest:
        net = on_meta(gpt)
        parallelize(net, mesh, "32-true")
        net.materialize(torch.device("cpu"), SEED)
    assert communication.get_total_counts() == 0
    whole = max(p.numel() for p in net.parameters()) * 4
    assert whole == 4 * 256 * 4096
    assert whole / WORLD <= largest.size <= whole / WORLD + 2**18, largest.size  # a shard; blocks of random numbers


def test_construction_allocates_only_shards() -> None:
    in_simulated_process("check_allocations", 1)


class WithParameter(Attention):
    """Has a parameter whose initial value only the constructor knows."""

    def __init__(self, gpt: GPTConfig) -> None:
        super().__init__(gpt)
        self.scale = nn.Parameter(torch.full((3,), 2.0))


class WithBuffer(Attention):
    """Has a buffer whose value only the constructor knows."""

    def __init__(self, gpt: GPTConfig) -> None:
        super().__init__(gpt)
        self.register_buffer("slope", torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (WithParameter, r"blocks\.0\.attention has parameters.*WithParameter does not define init_weights"),
        (WithBuffer, r"blocks\.0\.attention has buffers.*WithBuffer does not define init_buffers"),
    ],
)
def test_custom_attention_without_initial_values_is_an_error(attention: type[Attention], message: str) -> None:
    net = on_meta(config(attention=f"{__name__}.{attention.__name__}"))
    with pytest.raises(UserError, match=message):
        net.materialize(torch.device("cpu"), SEED)
