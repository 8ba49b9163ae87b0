// CRC32C, the polynomial of Castagnoli (reflected 0x82F63B78): by the processor's own instruction
// where it has one, else by tables that take eight bytes at a time.
#include "wire/crc32c.h"

#include <array>
#include <cstring>

#include "wire/frame.h"

namespace reducer::wire {
namespace {

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

constexpr Tables makeTables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82F63B78U : 0U);
    tables[0][byte] = crc;
  }
  // tables[k][b]: what byte b does to the checksum when k more bytes follow it.
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    for (std::size_t k = 1; k < tables.size(); ++k) {
      const std::uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = makeTables();

std::uint64_t loadLittle64(const std::byte* bytes) {
  std::uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word |= std::to_integer<std::uint64_t>(bytes[i]) << (8 * i);
  return word;
}

std::uint32_t extendByTable(std::uint32_t crc, Bytes bytes) {
  const std::byte* at = bytes.data();
  std::size_t left = bytes.size();
  for (; left >= 8; at += 8, left -= 8) {
    const std::uint64_t word = loadLittle64(at) ^ crc;
    crc = 0;
    for (std::size_t i = 0; i < 8; ++i) crc ^= kTables[7 - i][(word >> (8 * i)) & 0xFF];
  }
  for (; left > 0; ++at, --left) {
    crc = (crc >> 8) ^ kTables[0][(crc ^ std::to_integer<std::uint32_t>(*at)) & 0xFF];
  }
  return crc;
}

#if defined(__x86_64__)

__attribute__((target("sse4.2"))) std::uint32_t extendByInstruction(std::uint32_t crc,
                                                                    Bytes bytes) {
  const std::byte* at = bytes.data();
  std::size_t left = bytes.size();
  std::uint64_t wide = crc;
  for (; left >= 8; at += 8, left -= 8) {
    std::uint64_t word;
    std::memcpy(&word, at, 8);
    wide = __builtin_ia32_crc32di(wide, word);
  }
  auto narrow = static_cast<std::uint32_t>(wide);
  for (; left > 0; ++at, --left) {
    narrow = __builtin_ia32_crc32qi(narrow, std::to_integer<std::uint8_t>(*at));
  }
  return narrow;
}

bool hasInstruction() { return __builtin_cpu_supports("sse4.2") != 0; }

#else

std::uint32_t extendByInstruction(std::uint32_t crc, Bytes bytes) {
  return extendByTable(crc, bytes);
}
bool hasInstruction() { return false; }

#endif

}  // namespace

std::uint32_t crc32c(const Payload& payload) {
  static const bool by_instruction = hasInstruction();
  std::uint32_t crc = 0xFFFFFFFFU;
  for (const Bytes& piece : payload.pieces()) {
    crc = by_instruction ? extendByInstruction(crc, piece) : extendByTable(crc, piece);
  }
  return ~crc;
}

namespace internal {

std::uint32_t crc32cByTable(const Payload& payload) {
  std::uint32_t crc = 0xFFFFFFFFU;
  for (const Bytes& piece : payload.pieces()) crc = extendByTable(crc, piece);
  return ~crc;
}

}  // namespace internal
}  // namespace reducer::wire
