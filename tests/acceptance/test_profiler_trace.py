"""Times and counts of a trace, against a trace written by hand and one of the profiler."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lit_gpt_scratch.acceptance.profiler_trace import (
    READ_SCALAR,
    STEP_MARK,
    count_by_step,
    find_origins,
    longest_events,
    read_trace,
    time_by_kind,
)


def event(name: str, ts: float, dur: float, cat: str = "kernel", tid: int = 7) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "pid": 0, "tid": tid}


GPU_STEP = [
    event("nvjet_tst_128x256_64x4_TNT", 0, 100),
    event("void pytorch_flash::flash_fwd_kernel<...>", 100, 50),
    event("triton_poi_fused_add_0", 150, 30),
    event("Memcpy DtoH (Device -> Pageable)", 200, 10, "gpu_memcpy"),
    event("ncclDevKernel_AllReduce_Sum_f32_RING", 190, 40, tid=9),  # on another stream: 20 with a copy, 20 alone
    event("void multi_tensor_apply_kernel<...FusedAdamMathFunctor...>", 250, 50),
    event("Optimizer.step#MuonAdamW.step", 250, 50, "gpu_user_annotation"),
    event("cudaStreamSynchronize", 0, 400, "cuda_runtime"),
    event("aten::mm", 0, 100, "cpu_op"),
]


def test_time_by_kind_of_a_gpu() -> None:
    found = time_by_kind(GPU_STEP)
    expected = {
        "matmul": 100, "attention": 50, "compiled elementwise": 30, "copies": 10, "communication": 40, "optimizer": 50,
        "idle": 300 - (180 + 40 + 50),
    }  # fmt: skip
    assert found == pytest.approx({kind: 1e-6 * micros for kind, micros in expected.items()})
    assert next(iter(found)) == "matmul"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_poi_fused__scaled_dot_product_flash_attention_add_3", "compiled elementwise"),
        ("triton_red_fused_addmm_native_layer_norm_sdpa_5", "compiled elementwise"),
        ("triton_per_fused__to_copy_copy_adam_1", "compiled elementwise"),
        ("triton_tem_fused_flex_attention_backward_12", "attention"),
        ("triton_tem_fused_mm_2", "other compiled"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matmul"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "matmul"),
    ],
)
def test_kind_of_a_kernel(name: str, kind: str) -> None:
    assert time_by_kind([event(name, 0, 10)]) == pytest.approx({kind: 1e-5, "idle": 0})


def test_longest_events() -> None:
    twice = [*GPU_STEP, event("nvjet_tst_128x256_64x4_TNT", 400, 10)]
    found = longest_events(twice, 2)
    assert found[0] == ("nvjet_tst_128x256_64x4_TNT", pytest.approx(110e-6), 2)
    assert len(found) == 2


def test_nested_operators_of_a_cpu_are_counted_once() -> None:
    events = [
        event("aten::linear", 0, 100, "cpu_op"),
        event("aten::addmm", 10, 80, "cpu_op"),
        event("aten::copy_", 20, 30, "cpu_op"),
        event("aten::gelu", 120, 40, "cpu_op"),
        event("aten::addmm", 0, 10, "cpu_op", tid=8),  # another thread is not nested
    ]
    found = time_by_kind(events)
    assert found == pytest.approx({"matmul": 80e-6, "copies": 30e-6, "other": 40e-6, "idle": 20e-6})


def test_counts_between_the_marks_of_steps() -> None:
    events = [
        event("cudaStreamSynchronize", 5, 1, "cuda_runtime"),  # before the first mark
        *(event(f"{STEP_MARK}{12 + n}", 10 + 100 * n, 1, "user_annotation") for n in range(3)),
        *(event(f"{STEP_MARK}{12 + n}", 10 + 100 * n, 1, "gpu_user_annotation") for n in range(3)),
        event("cudaStreamSynchronize", 20, 1, "cuda_runtime"),
        event("cudaStreamSynchronize", 30, 1, "cuda_runtime"),
        event(READ_SCALAR, 29, 3, "cpu_op"),
        event("Memcpy DtoH (Device -> Pinned)", 31, 1, "gpu_memcpy"),
        event("cudaEventSynchronize", 150, 1, "cuda_runtime"),
        event("cudaDeviceSynchronize", 215, 1, "cuda_runtime"),  # of the profiler, after the last mark
    ]
    found = count_by_step(sorted(events, key=lambda each: each["ts"]))
    assert found == {
        12: {"cudaStreamSynchronize": 2, READ_SCALAR: 1, "Memcpy DtoH": 1},
        13: {"cudaEventSynchronize": 1},
    }


def test_copies_belong_to_the_step_that_submitted_them() -> None:
    """The device is a step behind the host."""
    events = [
        *(event(f"{STEP_MARK}{n}", 100 * n, 1, "user_annotation") for n in range(3)),
        {**event("cudaMemcpyAsync", 50, 1, "cuda_runtime"), "args": {"correlation": 7}},
        {**event("Memcpy DtoH (Device -> Pinned)", 150, 1, "gpu_memcpy"), "args": {"correlation": 7}},
        {**event("Memcpy DtoH (Device -> Pinned)", 160, 1, "gpu_memcpy"), "args": {"correlation": 8}},
    ]
    found = count_by_step(sorted(events, key=lambda each: each["ts"]))
    assert found == {0: {"Memcpy DtoH": 1}, 1: {"Memcpy DtoH": 1}}


def test_origins_of_synchronizations() -> None:
    events = [
        *(event(f"{STEP_MARK}{n}", 1000 * n, 999, "user_annotation") for n in range(3)),
        event("[Callback]Outer.hook", 10, 100, "user_annotation"),
        event("[Callback]Inner.hook", 20, 80, "user_annotation"),
        event("aten::item", 30, 20, "cpu_op"),
        event("aten::_local_scalar_dense", 31, 18, "cpu_op"),
        event("cudaStreamSynchronize", 32, 10, "cuda_runtime"),
        event("cudaStreamSynchronize", 60, 10, "cuda_runtime"),
        event("aten::to", 200, 20, "cpu_op", tid=8),
        event("cudaStreamSynchronize", 205, 10, "cuda_runtime", tid=8),
        event("cudaStreamSynchronize", 1500, 10, "cuda_runtime"),  # another step
    ]
    found = find_origins(events, ["cudaStreamSynchronize"], [0])
    assert found == {
        "[Callback]Inner.hook: aten::item": 1,
        "[Callback]Inner.hook: cudaStreamSynchronize": 1,
        "no annotation: aten::to": 1,
    }


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_trace_of_the_profiler(tmp_path: Path, name: str) -> None:
    """One ``item`` in the first step and three in the second, as written by this version of PyTorch."""
    a = torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for step, reads in enumerate([1, 3, 0]):
            with record_function(f"{STEP_MARK}{step}"):
                pass
            (a @ a).softmax(-1)
            for _ in range(reads):
                a[0, 0].item()
    profiled.export_chrome_trace(str(tmp_path / name))
    events = read_trace(tmp_path / name)
    counts = count_by_step(events)
    assert {step: found[READ_SCALAR] for step, found in counts.items()} == {0: 1, 1: 3}
    shares = time_by_kind(events)
    assert shares["matmul"] > 0
    assert [each["ts"] for each in events] == sorted(each["ts"] for each in events)


def test_only_complete_events_are_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "x.json.gz", "wt") as file:
        json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, event("k", 2, 1), event("j", 1, 1)]}, file)
    assert [each["name"] for each in read_trace(tmp_path / "x.json.gz")] == ["j", "k"]
