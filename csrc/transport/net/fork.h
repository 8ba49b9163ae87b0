// What a forked child needs: to know that it is one, and not to keep the parent's connections open.
//
// A DataLoader worker is forked from a process that has a group. Its copies of the sockets would
// keep the connections alive when the parent dies, and the other ranks would not notice the death:
// they are closed there.
#pragma once

#include <cstdint>

namespace reducer::transport::net {

/// Counts the forks between the first process and this one. Objects remember it: if it has changed,
/// their threads do not exist in this process.
std::uint64_t forkGeneration() noexcept;

/// Has this socket closed in forked children (if the number still stands for the same socket at the
/// fork).
void closeInChildren(int fd);

}  // namespace reducer::transport::net
