// Any bytes in any portions: the inbox of a TCP connection must neither crash nor write over what
// it has handed out, and what it gives out must be the bytes that came.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/limits.h"
#include "transport/tcp/inbox.h"
#include "wire/fields.h"

namespace {

using reducer::Payload;
using reducer::transport::tcp::BlockPool;
using reducer::transport::tcp::Inbox;

void require(bool condition) {
  if (!condition) std::abort();
}

struct Taken {
  Payload message;
  std::size_t begin;
};

/// Puts bytes where the inbox wants them; how many.
std::size_t put(Inbox& inbox, const std::uint8_t* data, std::size_t nbytes) {
  iovec pieces[Inbox::kPiecesMax];
  const int count = inbox.space(pieces);
  require(count > 0);
  std::size_t done = 0;
  for (int i = 0; i < count && done < nbytes; ++i) {
    const std::size_t part = std::min(nbytes - done, pieces[i].iov_len);
    std::memcpy(pieces[i].iov_base, data + done, part);
    done += part;
  }
  inbox.received(done);
  return done;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static BlockPool& pool = *new BlockPool;
  Inbox inbox(pool);
  std::vector<Taken> taken;
  std::size_t read = 0;  // of the messages taken out
  bool bad = false;
  for (std::size_t at = 0; at < size && !bad;) {
    // The portions depend on the input only, so that a finding can be replayed.
    const std::size_t portion = 1 + data[at] * std::size_t{37} % (size - at);
    at += put(inbox, data + at, std::min(portion, size - at));
    while (true) {
      Payload message;
      std::string why;
      const Inbox::Next next = inbox.next(message, why);
      if (next == Inbox::Next::kMore) break;
      bad = next == Inbox::Next::kBad;
      if (bad) {
        require(!why.empty());
        break;
      }
      require(message.nbytes() <= reducer::kMaxChunkBytes + reducer::wire::kMaxHeaderBytes);
      read += reducer::transport::tcp::kPrefixBytes;
      taken.push_back({message, read});
      read += message.nbytes();
      require(read <= at);
    }
  }
  for (const Taken& one : taken) {
    std::vector<std::byte> bytes(one.message.nbytes());
    one.message.copyTo(bytes.data());
    require(bytes.empty() || std::memcmp(bytes.data(), data + one.begin, bytes.size()) == 0);
  }
  return 0;
}
