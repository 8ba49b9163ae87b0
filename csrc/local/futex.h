// Sleeping on a word that processes share.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/clock.h"

namespace reducer::local {

/// Sleeps until woken, at most for `most`; returns at once if the word is not `seen` any more, and
/// may return for no reason. Between processes: the word is one of a shared mapping.
void futexWait(const std::atomic<std::uint32_t>& word, std::uint32_t seen, Duration most) noexcept;

/// Wakes all that sleep on the word.
void futexWakeAll(const std::atomic<std::uint32_t>& word) noexcept;

}  // namespace reducer::local
