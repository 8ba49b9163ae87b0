#include "recorder/json.h"

#include <cstdio>

#include "wire/utf8.h"

namespace reducer::recorder {

void Json::member(std::string_view name, double value) {
  char digits[64];
  std::snprintf(digits, sizeof digits, "%.6f", value);
  literal(name, digits);
}

void Json::string(std::string_view text) {
  text_ += '"';
  for (const char c : wire::toUtf8(std::string(text), text.size())) {
    if (c == '"' || c == '\\') {
      text_ += '\\';
      text_ += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      text_ += escaped;
    } else {
      text_ += c;
    }
  }
  text_ += '"';
}

}  // namespace reducer::recorder
