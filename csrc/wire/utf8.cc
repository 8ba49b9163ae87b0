#include "wire/utf8.h"

#include <algorithm>

namespace reducer::wire {
namespace {

unsigned at(std::string_view text, std::size_t index) {
  return static_cast<unsigned char>(text[index]);
}

bool isControl(char c) { return (c >= '\0' && c < ' ' && c != '\n' && c != '\t') || c == '\x7F'; }

bool continues(std::string_view text, std::size_t index) {
  return (at(text, index) & 0xC0U) == 0x80U;
}

}  // namespace

std::size_t utf8SequenceLength(std::string_view text) noexcept {
  if (text.empty()) return 0;
  const unsigned lead = at(text, 0);
  if (lead < 0x80) return 1;
  const std::size_t length = lead < 0xC2   ? 0
                             : lead < 0xE0 ? 2
                             : lead < 0xF0 ? 3
                             : lead < 0xF5 ? 4
                                           : 0;
  if (length == 0 || text.size() < length) return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if (!continues(text, i)) return 0;
  }
  const unsigned second = at(text, 1);
  if (lead == 0xE0 && second < 0xA0) return 0;   // would fit in two bytes
  if (lead == 0xED && second >= 0xA0) return 0;  // half of a surrogate pair
  if (lead == 0xF0 && second < 0x90) return 0;   // would fit in three bytes
  if (lead == 0xF4 && second >= 0x90) return 0;  // beyond U+10FFFF
  return length;
}

bool isUtf8(std::string_view text) noexcept {
  while (!text.empty()) {
    const std::size_t length = utf8SequenceLength(text);
    if (length == 0) return false;
    text.remove_prefix(length);
  }
  return true;
}

std::string toUtf8(std::string_view text, std::size_t nbytes_max) {
  std::string out;
  out.reserve(text.size() < nbytes_max ? text.size() : nbytes_max);
  while (!text.empty()) {
    const std::size_t length = utf8SequenceLength(text);
    const std::string_view character = length == 0 ? std::string_view("?") : text.substr(0, length);
    if (out.size() + character.size() > nbytes_max) break;
    out += character;
    text.remove_prefix(length == 0 ? 1 : length);
  }
  return out;
}

std::string withoutControls(std::string_view text) {
  std::string out(text);
  std::replace_if(out.begin(), out.end(), isControl, '?');
  return out;
}

}  // namespace reducer::wire
