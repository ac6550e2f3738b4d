# SPDX-License-Identifier: Apache-2.0
"""The hash of the policies, as docs/workers.md has it, and as the library computes it."""

from __future__ import annotations

from typing import Any

WORD = 2**64 - 1
K = 0x9E3779B97F4A7C15


def hash_words(words: list[int]) -> int:
    h = K
    for word in words:
        h = (h ^ word) * K & WORD
        h ^= h >> 32
    return (h * 0xD6E8FEB86659FD93 & WORD) >> 32


def computed(core: Any, policy: str, data: bytes) -> int:
    out = core.ffi.new("uint32_t *")
    core.check(core.lib.rb_policy_hash_of(policy.encode(), data, len(data), out))
    return int(out[0])
