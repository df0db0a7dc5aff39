"""What a decoder stores, computes and moves: bytes, FLOPs, a roof on speed.

``architecture`` has the sizes of each layer, ``traffic`` what a cache of each kind holds and moves,
``roofline`` the least time a machine can take. Everything is a pure function of integers; nothing here
touches a model, a file or a clock.
"""

from kvbench.physics.architecture import Architecture, Layer, UnknownFamily, text_part
from kvbench.physics.roofline import (
    BYTES_PER_ELEMENT,
    Ceilings,
    Prediction,
    bytes_per_element,
    decode_bytes,
    forward_flops,
    generation_flops,
    link_bytes,
    masked_flops,
    parameters,
    predicted_generation,
    predicted_kv_bytes,
    prefill_flops,
    weight_bytes,
    weight_bytes_read,
)
from kvbench.physics.traffic import (
    KINDS,
    Dynamic,
    NoCache,
    Offloaded,
    Paged,
    Pruned,
    Quantized,
    Static,
    Traffic,
    Window,
    kv_bytes,
    kv_elements,
    quantized_kv_bytes,
    residual_tokens,
)
from kvbench.physics.traffic import read as read_traffic

__all__ = [
    "BYTES_PER_ELEMENT",
    "KINDS",
    "Architecture",
    "Ceilings",
    "Dynamic",
    "Layer",
    "NoCache",
    "Offloaded",
    "Paged",
    "Prediction",
    "Pruned",
    "Quantized",
    "Static",
    "Traffic",
    "UnknownFamily",
    "Window",
    "bytes_per_element",
    "decode_bytes",
    "forward_flops",
    "generation_flops",
    "kv_bytes",
    "kv_elements",
    "link_bytes",
    "masked_flops",
    "parameters",
    "predicted_generation",
    "predicted_kv_bytes",
    "prefill_flops",
    "quantized_kv_bytes",
    "read_traffic",
    "residual_tokens",
    "text_part",
    "weight_bytes",
    "weight_bytes_read",
]
