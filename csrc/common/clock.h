// Time as the core sees it. The engine and the exchange never ask for the time: they are told.
#pragma once

#include <chrono>

namespace reducer {

using Clock = std::chrono::steady_clock;
using TimePoint = Clock::time_point;
using Duration = Clock::duration;

}  // namespace reducer
