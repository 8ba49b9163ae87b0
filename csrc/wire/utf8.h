// proto3's `string` is UTF-8: other clients refuse a message whose text is not, so none leaves
// here. And what others send ends up in logs and on terminals, which obey control characters.
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

/// `text` with '?' for each control character of ASCII but line feeds and tabs. For every text of a
/// peer that somebody may read.
std::string withoutControls(std::string_view text);

}  // namespace reducer::wire
