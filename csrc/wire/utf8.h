// proto3's `string` is UTF-8: other clients refuse a message whose text is not, so none leaves
// here.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace reducer::wire {

/// Bytes of the well-formed UTF-8 sequence that `text` begins with, 1 to 4; 0 if there is none.
std::size_t utf8SequenceLength(std::string_view text) noexcept;

bool isUtf8(std::string_view text) noexcept;

/// `text` with each byte that is not part of a well-formed sequence replaced by '?', cut before the
/// first character that does not fit in `nbytes_max`.
std::string toUtf8(std::string_view text, std::size_t nbytes_max);

}  // namespace reducer::wire
