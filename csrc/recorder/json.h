// JSON text, written piece by piece.
#pragma once

#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>

namespace reducer::recorder {

/// The caller keeps beginnings and ends in pairs, and gives members in objects and items in lists.
class Json {
 public:
  void beginObject() { begin('{'); }
  void endObject() { end('}'); }
  void beginList(std::string_view name) {
    key(name);
    begin('[');
  }
  void endList() { end(']'); }

  void member(std::string_view name, std::string_view text) {
    key(name);
    string(text);
    comma_ = true;
  }
  void member(std::string_view name, const char* text) { member(name, std::string_view(text)); }
  void member(std::string_view name, bool value) { literal(name, value ? "true" : "false"); }
  void member(std::string_view name, std::integral auto value) {
    literal(name, std::to_string(value));
  }
  /// With microseconds.
  void member(std::string_view name, double value);
  void item(std::string_view text) {
    separate();
    string(text);
    comma_ = true;
  }

  const std::string& text() const { return text_; }

 private:
  void begin(char open) {
    separate();
    text_ += open;
    comma_ = false;
  }
  void end(char close) {
    text_ += close;
    comma_ = true;
  }
  void separate() {
    if (comma_) text_ += ',';
    comma_ = false;
  }
  void key(std::string_view name) {
    separate();
    string(name);
    text_ += ':';
  }
  void literal(std::string_view name, const std::string& value) {
    key(name);
    text_ += value;
    comma_ = true;
  }
  void string(std::string_view text);

  std::string text_;
  bool comma_ = false;
};

}  // namespace reducer::recorder
