"""What a TensorRT can do, asked of the module itself: its version number is never looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Capabilities:
    """What differs between 8.6, 10.x, 11.x and TensorRT for RTX, as far as building goes.

    `ahead_of_time`: builds for GPUs that need not be here, and times nothing (RTX). `explicit_batch` and
    `strongly_typed`: the network's flag is to be passed. `type_flags`: builder flags that permit a type, by the tensor
    type that calls for them; empty where the network alone decides. `quantised_flag`: one is needed for int8.
    `progress`: events can be had. `profile_sharing`: several contexts may use one optimisation profile only where the
    engine was built for it. `user_allocation`: engines that allocate nothing while they run, as a CUDA graph needs, are
    to be asked for.
    """

    ahead_of_time: bool
    explicit_batch: bool
    strongly_typed: bool
    type_flags: dict[str, str]
    quantised_flag: bool
    progress: bool
    profile_sharing: bool
    user_allocation: bool


# Tensor type and the flag that permits kernels of it, in networks that are not strongly typed.
_TYPE_FLAGS = {"HALF": "FP16", "BF16": "BF16"}


def capabilities(trt: Any) -> Capabilities:
    """Of a module `tensorrt` or `tensorrt_rtx`; constructs nothing of it, so no GPU is needed."""
    network, flag, config = trt.NetworkDefinitionCreationFlag, trt.BuilderFlag, trt.IBuilderConfig
    weak = hasattr(flag, "FP16")
    # 11.0 and RTX still have STRONGLY_TYPED, deprecated: all their networks are.
    strong = weak and hasattr(network, "STRONGLY_TYPED")
    # Where strong typing exists every network is of explicit batch and profiles are shared; what says so is deprecated.
    before_strong = not hasattr(network, "STRONGLY_TYPED")
    permitted = {
        kind: name for kind, name in _TYPE_FLAGS.items() if hasattr(flag, name) and hasattr(trt.DataType, kind)
    }
    return Capabilities(
        ahead_of_time=hasattr(trt, "ComputeCapability"),
        explicit_batch=before_strong and hasattr(network, "EXPLICIT_BATCH"),
        strongly_typed=strong,
        type_flags=permitted if weak and not strong else {},
        quantised_flag=weak and not strong and hasattr(flag, "INT8"),
        progress=hasattr(trt, "IProgressMonitor") and hasattr(config, "progress_monitor"),
        profile_sharing=before_strong and hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"),
        user_allocation=hasattr(flag, "REQUIRE_USER_ALLOCATION"),
    )
